"""Triton kernel of `cosmos3::unpack_pixels`: one program per run of output elements."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Four warps then store 16 bytes a thread in each dtype.
BLOCK_BYTES = 2048


@triton.jit
def unpack_pixels_kernel(
    out,  # [B, 3, H, W], or bytes [B, H, W, 3]
    x,  # [B, 3·p², H/p, W/p]
    elements,
    H,
    W,
    stride_b, stride_c, stride_h, stride_w,
    BYTES: tl.constexpr,
    PATCH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < elements
    if BYTES:
        color = i % 3
        column = i // 3 % W
        row = i // 3 // W % H
        b = i // 3 // W // H
    else:
        column = i % W
        row = i // W % H
        color = i // W // H % 3
        b = i // W // H // 3
    # Channels in the order of torch.nn.functional.pixel_shuffle: color, row, column.
    channel = (color * PATCH + row % PATCH) * PATCH + column % PATCH
    at = b * stride_b + channel * stride_c + row // PATCH * stride_h + column // PATCH * stride_w
    value = tl.load(x + at, mask=inside, other=0)
    if BYTES:
        level = value.to(tl.float32)
        # The first comparison is false for a NaN, which so becomes 0.
        level = tl.where(level >= -1.0, level, -1.0)
        level = tl.where(level <= 1.0, level, 1.0)
        level = 255.0 * (level * 0.5 + 0.5)
        # Adding 1.5 · 2^23 rounds to an integer, halves to even.
        level = (level + 12582912.0) - 12582912.0
        tl.store(out + i, level.to(tl.uint8), mask=inside)
    else:
        if out.dtype.element_ty.primitive_bitwidth == 16:
            value = value.to(tl.float32)
        # Both comparisons are false for a NaN, which stays one.
        value = tl.where(value < -1.0, -1.0, value)
        value = tl.where(value > 1.0, 1.0, value)
        tl.store(out + i, value.to(out.dtype.element_ty), mask=inside)


def unpack_pixels(x: Tensor, patch_size: int, as_bytes: bool = False) -> Tensor:
    batch, _, rows, columns = x.shape
    height, width = rows * patch_size, columns * patch_size
    if as_bytes:
        out = x.new_empty(batch, height, width, 3, dtype=torch.uint8)
    else:
        out = x.new_empty(batch, 3, height, width)
    block = BLOCK_BYTES // out.element_size()
    if out.numel():
        unpack_pixels_kernel[(triton.cdiv(out.numel(), block),)](
            out, x, out.numel(), height, width, *x.stride(),
            BYTES=as_bytes, PATCH=patch_size, BLOCK=block, enable_fp_fusion=False,
        )  # fmt: skip
    return out
