"""Triton kernel of `cosmos3::rms_norm_silu`: whole pixels of channels-last data per program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cosmos3_fast.ops.rms_norm_silu import NORM_EPS

# Elements one program holds: 4 to 32 pixels of 640 to 64 channels.
ELEMENTS = 4096


@triton.jit
def rms_norm_silu_kernel(
    out,  # [pixels, C]
    x,  # [pixels, C]
    weight,  # [C], or unused
    pixels,
    C,
    ROOT: tl.constexpr,  # sqrt(C); as arguments, it and EPS would be rounded to float32
    EPS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    SILU: tl.constexpr,
    COMPUTE: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,  # the power of two that holds C
):
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.arange(0, CHANNELS)
    at = pixel[:, None] * C + channel[None, :]
    inside = (pixel < pixels)[:, None] & (channel < C)[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(COMPUTE)
    norm = tl.sqrt(tl.sum(value * value, axis=1))
    # A bare constant would be rounded to float32 here.
    y = value / tl.maximum(norm, tl.full((), EPS, COMPUTE))[:, None]
    if HAS_WEIGHT:
        scale = tl.load(weight + channel, mask=channel < C, other=0.0).to(COMPUTE) * ROOT
        y = y * scale[None, :]
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


def rms_norm_silu(x: Tensor, weight: Tensor | None, silu: bool = True) -> Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(x, memory_format=torch.channels_last)
    channels = x.shape[1]
    pixels = x.numel() // max(channels, 1)
    if pixels == 0:
        return out
    width = triton.next_power_of_2(channels)
    rows = max(1, ELEMENTS // width)
    rms_norm_silu_kernel[(triton.cdiv(pixels, rows),)](
        out, x, x if weight is None else weight.contiguous(), pixels, channels,
        ROOT=channels**0.5, EPS=NORM_EPS,
        HAS_WEIGHT=weight is not None, SILU=silu, PIXELS=rows, CHANNELS=width,
        COMPUTE=tl.float64 if x.dtype == torch.float64 else tl.float32,
    )  # fmt: skip
    return out
