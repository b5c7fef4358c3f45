"""`cosmos3::pack_pixels`: bytes and floats of an image as patches."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from op_inputs import DTYPES, IMAGE_LAYOUTS, image
from torch import Tensor

from cosmos3_fast import ops
from cosmos3_fast.ops import registry

OPS = torch.ops.cosmos3


@pytest.fixture(params=registry.BACKENDS)
def backend(request: pytest.FixtureRequest, device: str) -> str:
    error = registry.backend_error(request.param, device, "pack_pixels")
    if error:
        pytest.skip(error)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("patch_size", [1, 2, 3])
def test_bytes_are_packed_as_the_engines_normalise_them(
    patch_size: int, dtype: torch.dtype, backend: str, device: str, poison: None
):
    if (backend, device, dtype) == ("triton", "cpu", torch.bfloat16):
        pytest.skip("Triton's interpreter truncates where the kernel rounds")
    every_byte = torch.arange(256, dtype=torch.uint8, device=device).repeat(27).view(1, 48, 48, 3)
    for pixels in (every_byte, every_byte[:, 6:-6, ::2], every_byte.transpose(1, 2)):
        # On the CPU, as the engines do: on CUDA, torch multiplies by the reciprocal of 255.
        normalised = 2.0 * (pixels.cpu().permute(0, 3, 1, 2).to(torch.float32) / 255.0) - 1.0
        wanted = F.pixel_unshuffle(normalised.to(dtype), patch_size).to(device)
        got = ops.pack_pixels(pixels, patch_size, dtype, backend=backend)
        assert torch.equal(got, wanted)
        assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", IMAGE_LAYOUTS)
@pytest.mark.parametrize("source", DTYPES)
def test_floats_are_packed(
    layout: str, source: torch.dtype, backend: str, device: str, poison: None
):
    pixels = image(2, 3, 6, 12, dtype=source, layout=layout, device=device)
    for dtype in DTYPES:
        if (backend, device, dtype) == ("triton", "cpu", torch.bfloat16) and source != dtype:
            continue  # Triton's interpreter truncates where the kernel rounds
        wanted = F.pixel_unshuffle(pixels.to(dtype), 2)
        assert torch.equal(ops.pack_pixels(pixels, 2, dtype, backend=backend), wanted)


@pytest.mark.parametrize(("patch_size", "channels"), [(1, 3), (1, 8), (2, 16), (2, 13)])
def test_further_channels_are_zeros(
    patch_size: int, channels: int, backend: str, device: str, poison: None
):
    bytes_ = torch.full((2, 6, 12, 3), 255, dtype=torch.uint8, device=device)
    for pixels in (bytes_, image(2, 3, 6, 12, device=device)):
        alone = ops.pack_pixels(pixels, patch_size, torch.float32, backend=backend)
        got = ops.pack_pixels(pixels, patch_size, torch.float32, channels, backend=backend)
        assert got.shape[1] == channels
        assert got.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(got[:, : alone.shape[1]], alone)
        assert not got[:, alone.shape[1] :].any()


def test_pack_without_elements(backend: str, device: str):
    pixels = torch.empty(0, 3, 4, 4, device=device)
    packed = ops.pack_pixels(pixels, 2, torch.float32, backend=backend)
    assert packed.shape == OPS.pack_pixels(pixels, 2, torch.float32).shape == (0, 12, 2, 2)


def test_pack_gradients_and_opcheck(device: str):
    pixels = image(1, 3, 4, 6, dtype=torch.float64, device=device).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: OPS.pack_pixels(p, 2, torch.float64), (pixels,))
    assert torch.autograd.gradcheck(lambda p: OPS.pack_pixels(p, 2, torch.float64, 16), (pixels,))
    torch.library.opcheck(OPS.pack_pixels.default, (pixels, 2, torch.float64))
    torch.library.opcheck(OPS.pack_pixels.default, (pixels, 2, torch.float64, 16))
    bytes_ = torch.zeros(1, 4, 6, 3, dtype=torch.uint8, device=device)
    for dtype in DTYPES:
        floats = image(1, 3, 4, 6, dtype=dtype, device=device)
        torch.library.opcheck(OPS.pack_pixels.default, (bytes_, 2, dtype))
        torch.library.opcheck(OPS.pack_pixels.default, (floats, 2, torch.half))


def test_compiled_in_one_graph(device: str):
    def encode(pixels: Tensor, weight: Tensor) -> Tensor:
        packed = torch.ops.cosmos3.pack_pixels(pixels, 2, torch.float32)
        return torch.ops.cosmos3.rms_norm_silu(packed, weight) * 2

    weight = torch.rand(12, device=device)
    compiled = torch.compile(encode, fullgraph=True, dynamic=True)
    for height, width in ((4, 6), (8, 10), (12, 6)):
        pixels = torch.randint(0, 256, (1, height, width, 3), dtype=torch.uint8, device=device)
        torch.testing.assert_close(compiled(pixels, weight), encode(pixels, weight), rtol=0, atol=0)
