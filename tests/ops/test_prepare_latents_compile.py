"""torch.compile, torch.export and FakeTensor."""

from __future__ import annotations

import pytest
import torch
from op_inputs import LAYOUTS, latent
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

from cosmos3_fast import ops
from cosmos3_fast.ops.prepare_latents import (
    prepare_latents_mask_reference,
    prepare_latents_reference,
)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step(cond: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    latents, velocity = ops.prepare_latents(cond * 2, noise, (0, 2))
    return latents + 1, velocity


def eager_step(cond: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    latents, velocity = prepare_latents_reference(cond * 2, noise, (0, 2))
    return latents + 1, velocity


def assert_all_equal(actual, wanted):
    for a, w in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a, w, rtol=0, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_static(layout: str, device: str):
    cond = latent((1, 3, 1, 4, 6), layout=layout, device=device)
    noise = latent((2, 3, 5, 4, 6), layout=layout, device=device, seed=1)
    compiled = torch.compile(step, fullgraph=True, dynamic=False)
    assert_all_equal(compiled(cond, noise), eager_step(cond, noise))


def test_compiled_dynamic_does_not_recompile(device: str):
    counter = CompileCounter()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    inductor = torch.compile(step, fullgraph=True, dynamic=True)
    for batch, frames, height, width in [(2, 5, 4, 6), (3, 6, 5, 7), (4, 9, 8, 2), (2, 21, 30, 52)]:
        cond = latent((1, 3, 1, height, width), device=device)
        noise = latent((batch, 3, frames, height, width), device=device, seed=1)
        assert_all_equal(compiled(cond, noise), eager_step(cond, noise))
        assert_all_equal(inductor(cond, noise), eager_step(cond, noise))
    assert counter.frame_count == 1


def test_the_same_call_does_not_recompile(device: str):
    counter = CompileCounter()
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for seed in range(4):
        compiled(
            latent((1, 3, 1, 4, 6), device=device, seed=seed),
            latent((2, 3, 5, 4, 6), device=device, seed=seed),
        )
    assert counter.frame_count == 1


def test_compiled_in_place_and_mask(device: str):
    def both(cond, noise, mask):
        blended, _ = ops.prepare_latents(cond, noise, condition_mask=mask)
        work = noise * 1
        velocity = ops.prepare_latents_(cond, work, (1,))
        return blended, work, velocity

    cond = latent((1, 3, 1, 4, 6), device=device)
    noise = latent((2, 3, 5, 4, 6), device=device, seed=1)
    mask = torch.rand(2, 1, 5, 1, 1).to(device)
    actual = torch.compile(both, fullgraph=True)(cond, noise, mask)
    assert_all_equal(
        actual,
        (
            prepare_latents_mask_reference(cond, noise, mask)[0],
            *prepare_latents_reference(cond, noise, (1,)),
        ),
    )


def test_compiled_mutation_of_an_argument_is_seen(device: str):
    cond = latent((1, 3, 1, 4, 6), device=device)
    noise = latent((2, 3, 5, 4, 6), device=device, seed=1)
    wanted, _ = prepare_latents_reference(cond, noise, (0,))
    torch.compile(ops.prepare_latents_, fullgraph=True)(cond, noise)
    assert torch.equal(noise, wanted)


def test_compiled_backward(device: str):
    def loss(cond, noise):
        latents, _ = ops.prepare_latents(cond, noise, (0, 2))
        return (latents * latents).sum()

    gradients = []
    for run in (loss, torch.compile(loss, fullgraph=True)):
        cond = latent((1, 3, 1, 4, 6), device=device).requires_grad_()
        noise = latent((2, 3, 5, 4, 6), device=device, seed=1).requires_grad_()
        run(cond, noise).backward()
        gradients.append((cond.grad, noise.grad))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


class Prepare(torch.nn.Module):
    def forward(self, cond: torch.Tensor, noise: torch.Tensor):
        return torch.ops.cosmos3.prepare_latents(cond, noise, [0, 2])


def test_export_save_load_run(tmp_path, device: str):
    cond = latent((1, 3, 1, 4, 6), device=device)
    noise = latent((2, 3, 5, 4, 6), device=device, seed=1)
    frames = torch.export.Dim("frames", min=3, max=64)
    program = torch.export.export(Prepare(), (cond, noise), dynamic_shapes=({}, {2: frames}))
    torch.export.save(program, tmp_path / "prepare.pt2")
    loaded = torch.export.load(tmp_path / "prepare.pt2").module()
    longer = latent((2, 3, 9, 4, 6), device=device, seed=2)
    for n in (noise, longer):
        assert_all_equal(loaded(cond, n), prepare_latents_reference(cond, n, (0, 2)))


@pytest.mark.parametrize("fake_device", ["cpu", "cuda"])
def test_fake_tensors(fake_device: str):
    with FakeTensorMode():
        cond = torch.empty(1, 48, 1, 30, 52, device=fake_device, dtype=torch.float32)
        noise = torch.empty(1, 48, 21, 30, 52, device=fake_device, dtype=torch.bfloat16)
        mask = torch.empty(1, 1, 21, 1, 1, device=fake_device)
        latents, velocity = ops.prepare_latents(cond, noise.transpose(3, 4).transpose(3, 4), (0,))
        blended, blend_velocity = ops.prepare_latents(cond, noise, condition_mask=mask)
        in_place = ops.prepare_latents_(cond, noise, (0, 1))
    for output in (latents, blended):
        assert output.shape == (1, 48, 21, 30, 52)
        assert output.dtype == torch.bfloat16
        assert output.device.type == fake_device
        assert output.is_contiguous()
    for output in (velocity, blend_velocity, in_place):
        assert output.shape == (1, 1, 21, 1, 1)
        assert output.dtype == torch.bfloat16


def test_fake_of_strided_noise_is_contiguous():
    with FakeTensorMode():
        noise = torch.empty(2, 5, 3, 4, 6).transpose(1, 2)
        latents, _ = ops.prepare_latents(torch.empty(1, 3, 1, 4, 6), noise, (0,))
    assert latents.is_contiguous()
