"""Views that torch negates when they are read (`z.conj().imag`), for every op and argument."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from cosmos3_fast import ops
from cosmos3_fast.ops import registry

OPS = torch.ops.cosmos3


def negated(*shape: int, device: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    view = torch.randn(shape, generator=generator, dtype=torch.complex64).to(device).conj().imag
    assert view.is_neg()
    return view


CALLS = {
    "prepare_latents": (((1, 2, 1, 3, 4), (2, 2, 4, 3, 4)), lambda c, n: (c, n, [0, 2])),
    "prepare_latents.mask": (
        ((1, 2, 1, 3, 4), (2, 2, 4, 3, 4), (1, 1, 4, 1, 1)),
        lambda c, n, m: (c, n, m),
    ),
    "rms_norm_silu": (((2, 3, 4, 5), (3,)), lambda x, w: (x, w, True)),
    "add_pad": (((2, 3, 4, 5), (3,), (2, 3, 4, 5)), lambda *arguments: arguments),
    "pack_pixels": (((1, 3, 4, 6),), lambda p: (p, 2, torch.float32)),
    "transform_frames": (
        (*[(2, 3, 4, 5)] * 3, (3,), (2, 1, 3, 4, 5), (3,), (2, 1, 3, 4, 5)),
        lambda a, b, c, bias, residual, weight, past: (
            *([a, b, c], 2, 1, bias, residual, weight, True, past),
        ),
    ),
    "winograd_pack": (((32, 16, 3, 3),), lambda w: (w,)),
    "winograd_conv3x3": (
        ((1, 16, 5, 6), (36, 1, 16, 32), (32,), (1, 32, 5, 6)),
        lambda *arguments: arguments,
    ),
}


@pytest.mark.parametrize("op", CALLS)
def test_they_are_read_as_what_they_hold(op: str, device: str):
    shapes, arguments = CALLS[op]
    views = [negated(*shape, device=device, seed=i) for i, shape in enumerate(shapes)]
    plain = [view.resolve_neg() for view in views]
    wanted = registry.REGISTERED[op](*arguments(*plain))
    for mixture in itertools.product(*zip(views, plain, strict=True)):
        for call in (registry.REGISTERED[op], registry.select(op, None, torch.device(device))):
            got = call(*arguments(*mixture))
            torch.testing.assert_close(got, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("call", [OPS.prepare_latents_, ops.prepare_latents_])
@pytest.mark.parametrize("negative_cond", [False, True])
@pytest.mark.parametrize("negative_noise", [False, True])
def test_they_are_written_as_what_they_are_to_hold(
    negative_noise: bool, negative_cond: bool, call, device: str
):
    cond, noise = negated(1, 2, 1, 3, 4, device=device), negated(2, 2, 4, 3, 4, device=device)
    wanted = noise.clone()
    wanted[:, :, [0, 2]] = cond
    if not negative_cond:
        cond = cond.resolve_neg()
    if not negative_noise:
        noise = noise.resolve_neg()
    version = noise._version
    velocity = call(cond, noise, [0, 2])
    assert torch.equal(noise, wanted)
    assert noise._version > version
    assert velocity.flatten().tolist() == [0, 1, 0, 1]


def test_conjugates_are_refused_by_their_dtype(device: str):
    z = torch.zeros(1, 2, 3, 2, 2, dtype=torch.complex64, device=device).conj()
    real = torch.zeros(1, 2, 3, 2, 2, device=device)
    for cond, noise, name in ((z, real, "cond_latent"), (real, z, "noise")):
        for op in (OPS.prepare_latents, OPS.prepare_latents_):
            with pytest.raises(RuntimeError, match=f"{name} must be float32, .*got torch.complex"):
                op(cond, noise, [0])
