"""Gradients against the eager formula, gradcheck and opcheck."""

from __future__ import annotations

import pytest
import torch
from op_inputs import SHAPES, Sample, latent, sample_inputs

from cosmos3_fast.ops.prepare_latents import prepare_latents_formula

OPS = torch.ops.cosmos3
SAMPLES = list(sample_inputs(layouts=("contiguous", "sliced", "permuted")))
MASKABLE = [s for s in SAMPLES if not 1 < s.cond_latent.shape[2] < s.noise.shape[2]]


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_gradients_equal_the_formula_s(sample: Sample, device: str, poison: None):
    def leaves() -> tuple[torch.Tensor, torch.Tensor]:
        cond, noise = sample.on(device)
        return cond.detach().requires_grad_(), noise.detach().requires_grad_()

    ours, theirs = leaves(), leaves()
    latents, _velocity = OPS.prepare_latents(*ours, sample.frames)
    wanted, _ = prepare_latents_formula(*theirs, sample.frames)
    upstream = latent(latents.shape, latents.dtype, device=device, seed=9)
    latents.backward(upstream)
    wanted.backward(upstream)
    for our, their in zip(ours, theirs, strict=True):
        if their.grad is None:  # no conditioned frame: the formula never reads the latent
            assert our.grad is None or not our.grad.any()
            continue
        # Sums over the batch and over frames may be taken in another order.
        eps = max(torch.finfo(our.dtype).eps, torch.finfo(upstream.dtype).eps)
        torch.testing.assert_close(our.grad, their.grad, rtol=8 * eps, atol=8 * eps)


@pytest.mark.parametrize(("cond_batch", "cond_frames", "shape", "frames"), SHAPES[2:8])
def test_gradcheck(cond_batch: int, cond_frames: int, shape: tuple[int, ...], frames, device: str):
    cond = latent((cond_batch, shape[1], cond_frames, *shape[3:]), torch.float64, device=device)
    noise = latent(shape, torch.float64, device=device, seed=1)
    inputs = (cond.requires_grad_(), noise.requires_grad_())
    assert torch.autograd.gradcheck(
        lambda c, n: OPS.prepare_latents(c, n, frames)[0], inputs, fast_mode=True
    )
    assert not frames or torch.autograd.gradgradcheck(
        lambda c, n: OPS.prepare_latents(c, n, frames)[0], inputs, fast_mode=True
    )
    if cond_frames == 1 or cond_frames >= shape[2]:
        for mask_batch in {1, shape[0]}:
            mask = torch.rand(mask_batch, 1, shape[2], 1, 1, dtype=torch.float64, device=device)
            assert torch.autograd.gradcheck(
                OPS.prepare_latents.mask, (*inputs, mask.requires_grad_()), fast_mode=True
            )


# Every fourth: with three layouts per shape, that is each layout in turn.
@pytest.mark.parametrize("sample", SAMPLES[::4], ids=str)
def test_opcheck_frames(sample: Sample, device: str):
    cond, noise = sample.on(device)
    arguments = (cond, noise, list(sample.frames))
    torch.library.opcheck(OPS.prepare_latents.default, arguments)
    torch.library.opcheck(OPS.prepare_latents_.default, (cond, noise.clone(), list(sample.frames)))
    torch.library.opcheck(
        OPS.prepare_latents.default,
        (cond.detach().requires_grad_(), noise.detach().requires_grad_(), list(sample.frames)),
    )


@pytest.mark.parametrize("sample", MASKABLE[::4], ids=str)
def test_opcheck_mask(sample: Sample, device: str):
    cond, noise = sample.on(device)
    mask = sample.mask().to(device)
    torch.library.opcheck(OPS.prepare_latents.mask, (cond, noise, mask))
    torch.library.opcheck(
        OPS.prepare_latents.mask,
        tuple(x.detach().requires_grad_() for x in (cond, noise, mask)),
    )


def test_only_what_needs_a_gradient_gets_one():
    cond, noise = latent((1, 2, 1, 3, 3)), latent((1, 2, 4, 3, 3)).requires_grad_()
    latents, _ = OPS.prepare_latents(cond, noise, [1])
    latents.sum().backward()
    assert cond.grad is None
    assert noise.grad[:, :, 1].abs().sum() == 0
    assert (noise.grad[:, :, [0, 2, 3]] == 1).all()


def test_a_nan_gradient_of_a_conditioned_frame_does_not_leak_into_the_noise():
    cond, noise = latent((1, 2, 1, 3, 3)), latent((1, 2, 4, 3, 3)).requires_grad_()
    latents, _ = OPS.prepare_latents(cond, noise, [1])
    upstream = torch.ones_like(latents)
    upstream[:, :, 1] = float("nan")
    latents.backward(upstream)
    assert not noise.grad.isnan().any()


def test_in_place_counts_as_a_write_for_autograd():
    weight = torch.ones((), requires_grad=True)
    noise = latent((1, 2, 3, 2, 2))
    product = weight * noise  # saves noise
    OPS.prepare_latents_(latent((1, 2, 1, 2, 2)), noise)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
