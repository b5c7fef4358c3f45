"""`prepare_latents_` counts its write as `Tensor.copy_` does, in and outside inference mode."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from op_inputs import latent
from torch import Tensor

from cosmos3_fast import ops

CALLS = {"wrapper": ops.prepare_latents_, "op": torch.ops.cosmos3.prepare_latents_}


@pytest.fixture(params=CALLS)
def write(request: pytest.FixtureRequest) -> Callable[[Tensor, Tensor], Tensor]:
    return CALLS[request.param]


def pair(device: str) -> tuple[Tensor, Tensor]:
    return latent((1, 2, 1, 3, 4), device=device), latent((1, 2, 4, 3, 4), device=device, seed=1)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_every_write_is_counted(mode, write, device: str):
    cond, noise = pair(device)
    with mode():
        before = noise._version
        write(cond, noise)
        assert noise._version > before
    assert torch.equal(noise[:, :, :1], cond)


def test_a_saved_tensor_written_in_inference_mode_is_noticed(write, device: str):
    weight = torch.ones((), device=device, requires_grad=True)
    cond, noise = pair(device)
    product = (weight * noise).sum()
    with torch.inference_mode():
        write(cond, noise)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_inference_tensors(write, device: str):
    with torch.inference_mode():
        cond, noise = pair(device)
        write(cond, noise)
        assert torch.equal(noise[:, :, :1], cond)
    outside, _ = pair(device)
    with pytest.raises(RuntimeError):
        noise[:, :, :1].copy_(outside)
    with torch.inference_mode():
        noise.zero_()
    with pytest.raises(RuntimeError, match="noise must not be an inference tensor outside"):
        write(outside, noise)
    with torch.no_grad(), pytest.raises(RuntimeError, match="noise must not be an inference"):
        write(outside, noise)
    assert not noise.any(), "nothing may have been written"
    normal = latent((1, 2, 4, 3, 4), device=device)
    write(cond, normal)  # read, not written
    assert torch.equal(normal[:, :, :1], cond)
