"""`cosmos3::pack_pixels`: bytes or floats to the patches that the first convolution reads.

Kernels: `csrc/cpu/pack_pixels.cpp`, `csrc/cuda/pack_pixels.cu` and `ops/triton/pack_pixels.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cosmos3_fast.ops.checks import (
    FLOAT_DTYPES,
    FLOAT_NAMES,
    check_dtype,
    check_patch_size,
    check_rank,
)
from cosmos3_fast.ops.registry import call, example_tensor, register, register_autograd, select


def pack_pixels(
    pixels: Tensor,
    patch_size: int,
    dtype: torch.dtype,
    channels: int = 0,
    *,
    backend: str | None = None,
) -> Tensor:
    """Packs pixels into the patches that the first convolution reads, in one pass.

    Args:
        pixels: uint8 [B, H, W, 3], normalised here to [-1, 1] as the engines do
            (`2 (x / 255) - 1` in float32), or floating [B, 3, H, W], normalised already; any
            strides.
        patch_size: 1 … 32768; divides H and W.
        dtype: of the result.
        channels: of the result, where more than 3·p²: the others are zeros, which make whole
            16-byte vectors of a pixel.
        backend: as in `prepare_latents`.

    Returns:
        [B, 3·p² or `channels`, H/p, W/p] channels-last, ordered as `pixel_unshuffle` orders them.

    Raises:
        RuntimeError, ValueError, BackendUnavailableError: as `prepare_latents`.
    """
    if backend is None:
        return call("pack_pixels", pixels, patch_size, dtype, channels)
    return select("pack_pixels", backend, pixels.device)(pixels, patch_size, dtype, channels)


def pack_pixels_reference(
    pixels: Tensor, patch_size: int, dtype: torch.dtype, channels: int = 0
) -> Tensor:
    """Gives normalised pixels in the order of `pixel_unshuffle`, [B, 3·p², H/p, W/p], and zeros.

    Bytes [B, H, W, 3] are normalised as SGLang's `preprocess_image` does: `2 (x / 255) - 1` in
    float32. Floats [B, 3, H, W] are taken to be normalised already.
    """
    if pixels.dtype == torch.uint8:
        # Of a number as divisor, torch on CUDA multiplies by the reciprocal: other bits.
        scale = torch.full((), 255.0, device=pixels.device)
        pixels = 2.0 * (pixels.permute(0, 3, 1, 2).to(torch.float32) / scale) - 1.0
    # As pixel_unshuffle, which leaves tensors without elements as they are.
    batch, _, height, width = pixels.shape
    p, rows, columns = patch_size, height // patch_size, width // patch_size
    cells = pixels.to(dtype).reshape(batch, 3, rows, p, columns, p).permute(0, 1, 3, 5, 2, 4)
    packed = cells.reshape(batch, 3 * p * p, rows, columns)
    if channels:
        packed = torch.nn.functional.pad(packed, (0, 0, 0, 0, 0, channels - 3 * p * p))
    return packed.contiguous(memory_format=torch.channels_last)


def check_pixels(pixels: Tensor, patch_size: int, dtype: torch.dtype, channels: int = 0) -> None:
    """Raises RuntimeError unless the arguments of `pack_pixels` fit each other."""
    op = "pack_pixels"
    is_bytes = pixels.dtype == torch.uint8
    check_rank(op, "pixels", pixels, 4, "[B, 3, H, W], or [B, H, W, 3] in uint8")
    torch._check(
        is_bytes or pixels.dtype in FLOAT_DTYPES,
        lambda: f"{op}: pixels must be uint8, {FLOAT_NAMES}, got {pixels.dtype}",
    )
    torch._check(
        pixels.shape[3 if is_bytes else 1] == 3,
        lambda: (
            f"{op}: pixels must have 3 colors in shape [B, 3, H, W], or [B, H, W, 3] in uint8, "
            f"got {list(pixels.shape)}"
        ),
    )
    check_dtype(op, "dtype", dtype)
    check_patch_size(op, patch_size)
    for dim in (1, 2) if is_bytes else (2, 3):
        torch._check(
            pixels.shape[dim] % patch_size == 0,
            lambda: (
                f"{op}: pixels must have height and width divisible by patch_size = {patch_size}, "
                f"got {list(pixels.shape)}"
            ),
        )
    torch._check(
        channels == 0 or channels >= 3 * patch_size**2,
        lambda: (
            f"{op}: channels must be 0 or at least 3·patch_size² = {3 * patch_size**2}, "
            f"got {channels}"
        ),
    )


register(
    "pack_pixels(Tensor pixels, int patch_size, ScalarType dtype, int channels=0) -> Tensor",
    check_pixels,
    eager=pack_pixels_reference,
    triton="pack_pixels:pack_pixels",
    example=lambda device: (example_tensor(device, 1, 3, 4, 6), 2, torch.float64, 16),
)


@torch.library.register_fake("cosmos3::pack_pixels")
def _(pixels: Tensor, patch_size: int, dtype: torch.dtype, channels: int = 0) -> Tensor:
    check_pixels(pixels, patch_size, dtype, channels)
    batch, *sizes = pixels.shape
    height, width = sizes[:2] if pixels.dtype == torch.uint8 else sizes[1:]
    channels = channels or 3 * patch_size**2
    shape = (batch, channels, height // patch_size, width // patch_size)
    return torch.empty(shape, dtype=dtype, device=pixels.device, memory_format=torch.channels_last)


def _pack_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pixels, ctx.patch_size, _, _ = inputs
    ctx.dtype = pixels.dtype


def _pack_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    # Bytes have no gradient, so the pixels were floating.
    p = ctx.patch_size
    pixels = torch.nn.functional.pixel_shuffle(gradient[:, : 3 * p * p], p)
    return pixels.to(ctx.dtype), None, None, None


register_autograd("pack_pixels", _pack_backward, _pack_setup, pack_pixels_reference)
