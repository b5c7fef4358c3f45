"""Triton kernel of `cosmos3::pack_pixels`: one program per run of output elements."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def pack_pixels_kernel(
    out,  # [B, H/p, W/p, CHANNELS]
    pixels,
    elements,
    rows,  # H/p
    columns,  # W/p
    stride_b, stride_c, stride_h, stride_w,
    BYTES: tl.constexpr,
    PATCH: tl.constexpr,
    CHANNELS: tl.constexpr,  # those after 3·p² are zeros
    BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < elements
    channel = i % CHANNELS
    cell = i // CHANNELS
    # Channels in the order of torch.nn.functional.pixel_unshuffle: color, row, column.
    dx = channel % PATCH
    dy = channel // PATCH % PATCH
    color = channel // (PATCH * PATCH)
    x = cell % columns * PATCH + dx
    y = cell // columns % rows * PATCH + dy
    b = cell // columns // rows
    at = pixels + b * stride_b + color * stride_c + y * stride_h + x * stride_w
    value = tl.load(at, mask=inside & (color < 3), other=0)
    if BYTES:
        # A true division: the reciprocal's product would round differently.
        value = tl.where(color < 3, 2.0 * tl.div_rn(value.to(tl.float32), 255.0) - 1.0, 0.0)
    if out.dtype.element_ty.primitive_bitwidth == 16:
        value = value.to(tl.float32)
    tl.store(out + i, value.to(out.dtype.element_ty), mask=inside)


def pack_pixels(pixels: Tensor, patch_size: int, dtype: torch.dtype, channels: int = 0) -> Tensor:
    is_bytes = pixels.dtype == torch.uint8
    if is_bytes:
        pixels = pixels.permute(0, 3, 1, 2)
    batch, _, height, width = pixels.shape
    out = torch.empty(
        (batch, channels or 3 * patch_size**2, height // patch_size, width // patch_size),
        dtype=dtype,
        device=pixels.device,
        memory_format=torch.channels_last,
    )
    if out.numel():
        pack_pixels_kernel[(triton.cdiv(out.numel(), BLOCK),)](
            out, pixels, out.numel(), height // patch_size, width // patch_size,
            *pixels.stride(), BYTES=is_bytes, PATCH=patch_size, CHANNELS=out.shape[1],
            BLOCK=BLOCK,
            enable_fp_fusion=False,
        )  # fmt: skip
    return out
