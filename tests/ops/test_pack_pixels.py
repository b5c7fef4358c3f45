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


def backends_of(op: str) -> list[str]:
    return [b for b in registry.BACKENDS if registry.backend_error(b, "cpu", op) is None]


@pytest.mark.parametrize("backend", registry.BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("patch_size", [1, 2, 3])
def test_bytes_are_packed_as_the_engines_normalise_them(
    patch_size: int, dtype: torch.dtype, backend: str, poison: None
):
    if (error := registry.backend_error(backend, "cpu", "pack_pixels")) is not None:
        pytest.skip(error)
    if backend == "triton" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter truncates where the kernel rounds")
    every_byte = torch.arange(256, dtype=torch.uint8).repeat(27).view(1, 48, 48, 3)
    for pixels in (every_byte, every_byte[:, 6:-6, ::2], every_byte.transpose(1, 2)):
        normalised = 2.0 * (pixels.permute(0, 3, 1, 2).to(torch.float32) / 255.0) - 1.0
        wanted = F.pixel_unshuffle(normalised.to(dtype), patch_size)
        got = ops.pack_pixels(pixels, patch_size, dtype, backend=backend)
        assert torch.equal(got, wanted)
        assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", registry.BACKENDS)
@pytest.mark.parametrize("layout", IMAGE_LAYOUTS)
@pytest.mark.parametrize("source", DTYPES)
def test_floats_are_packed(layout: str, source: torch.dtype, backend: str, poison: None):
    if (error := registry.backend_error(backend, "cpu", "pack_pixels")) is not None:
        pytest.skip(error)
    pixels = image(2, 3, 6, 12, dtype=source, layout=layout)
    for dtype in DTYPES:
        if backend == "triton" and dtype == torch.bfloat16 and source != torch.bfloat16:
            continue  # Triton's interpreter truncates where the kernel rounds
        wanted = F.pixel_unshuffle(pixels.to(dtype), 2)
        assert torch.equal(ops.pack_pixels(pixels, 2, dtype, backend=backend), wanted)


def test_pack_without_elements():
    for backend in (None, *backends_of("pack_pixels")):
        packed = ops.pack_pixels(torch.empty(0, 3, 4, 4), 2, torch.float32, backend=backend)
        assert packed.shape == (0, 12, 2, 2)


def test_pack_gradients_and_opcheck():
    pixels = image(1, 3, 4, 6, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: OPS.pack_pixels(p, 2, torch.float64), (pixels,))
    torch.library.opcheck(OPS.pack_pixels.default, (pixels, 2, torch.float64))
    for dtype in DTYPES:
        torch.library.opcheck(
            OPS.pack_pixels.default, (torch.zeros(1, 4, 6, 3, dtype=torch.uint8), 2, dtype)
        )
        torch.library.opcheck(OPS.pack_pixels.default, (image(1, 3, 4, 6).to(dtype), 2, torch.half))


def test_compiled_in_one_graph():
    def encode(pixels: Tensor, weight: Tensor) -> Tensor:
        packed = torch.ops.cosmos3.pack_pixels(pixels, 2, torch.float32)
        return torch.ops.cosmos3.rms_norm_silu(packed, weight) * 2

    weight = torch.rand(12)
    compiled = torch.compile(encode, fullgraph=True, dynamic=True)
    for height, width in ((4, 6), (8, 10), (12, 6)):
        pixels = torch.randint(0, 256, (1, height, width, 3), dtype=torch.uint8)
        torch.testing.assert_close(compiled(pixels, weight), encode(pixels, weight), rtol=0, atol=0)
