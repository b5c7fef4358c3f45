"""Triton kernel of `cosmos3::rms_norm_silu`, `add_rms_norm_silu` and `add_pad`: whole pixels of
channels-last data per program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cosmos3_fast.ops.rms_norm_silu import NORM_EPS, factors

# Elements one program holds: 4 to 32 pixels of 640 to 64 channels.
ELEMENTS = 4096


# In float32, Triton's own `/`, `tl.sqrt` and `tl.exp` are the device's quick ones.
@triton.jit
def _divide(a, b):
    if a.dtype == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def _root(x):
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@triton.jit
def _exp(x):
    if x.dtype == tl.float32:
        # 2^(x log2(e)): what rounding that product loses would be |x| units of the result's last
        # place. 1.925963e-8 is log2(e) less its float32, 0.6931472 is log(2).
        product = x * 1.4426950216293335
        lost = tl.fma(x, tl.full(x.shape, 1.4426950216293335, tl.float32), -product)
        lost += x * 1.925963033500011e-08
        return tl.exp2(product) * (1.0 + 0.6931472 * tl.where(tl.abs(lost) < 1.0, lost, 0.0))
    else:
        return tl.exp(x)


@triton.jit
def rms_norm_silu_kernel(
    activated,  # [B, H, W, C], or unused
    sum,  # [B, H + PAD, W + PAD, C], or unused
    x,  # [B, H, W, C]
    weight,  # [C], or unused
    bias,  # [C], or unused
    residual,  # [B, S·H, S·W, C/T], or unused
    pixels,  # of the results
    C,
    H,
    W,
    ROOT: tl.constexpr,  # sqrt(C); as arguments, it and EPS would be rounded to float32
    EPS: tl.constexpr,
    NORM: tl.constexpr,
    SUM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    SILU: tl.constexpr,
    PAD: tl.constexpr,
    T: tl.constexpr,
    S: tl.constexpr,
    COMPUTE: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,  # the power of two that holds C
):
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.arange(0, CHANNELS)
    to = pixel[:, None] * C + channel[None, :]
    exists = (pixel < pixels)[:, None] & (channel < C)[None, :]
    column = pixel % (W + PAD)
    row = pixel // (W + PAD) % (H + PAD)
    b = pixel // (W + PAD) // (H + PAD)
    if PAD:
        at = ((b * H + row) * W + column)[:, None] * C + channel[None, :]
        inside = exists & ((row < H) & (column < W))[:, None]
    else:
        at = to
        inside = exists
    value = tl.load(x + at, mask=inside, other=0.0).to(COMPUTE)
    if HAS_BIAS:
        term = tl.load(bias + channel, mask=channel < C, other=0.0).to(COMPUTE)
        value = value + tl.where(inside, term[None, :], 0.0)
    if HAS_RESIDUAL:
        if T * S == 1:
            value = value + tl.load(residual + at, mask=inside, other=0.0).to(COMPUTE)
        else:
            takes = inside & (channel % T == T - 1)[None, :]
            average = tl.zeros((PIXELS, CHANNELS), COMPUTE)
            for dy in tl.static_range(S):
                for dx in tl.static_range(S):
                    cell = ((b * H + row) * S + dy) * W * S + column * S + dx
                    of = cell[:, None] * (C // T) + (channel // T)[None, :]
                    average = average + tl.load(residual + of, mask=takes, other=0.0).to(COMPUTE)
            value = value + _divide(average, tl.full(average.shape, S * S, COMPUTE))
    if SUM:
        tl.store(sum + to, value.to(sum.dtype.element_ty), mask=exists)
    if NORM:
        norm = _root(tl.sum(value * value, axis=1))
        # A bare constant would be rounded to float32 here.
        norm = tl.maximum(norm, tl.full((), EPS, COMPUTE))
        y = _divide(value, tl.broadcast_to(norm[:, None], value.shape))
        if HAS_WEIGHT:
            scale = tl.load(weight + channel, mask=channel < C, other=0.0).to(COMPUTE) * ROOT
            y = y * scale[None, :]
        if SILU:
            y = _divide(y, 1.0 + _exp(-y))
        tl.store(activated + to, y.to(activated.dtype.element_ty), mask=exists)


def _launch(
    activated: Tensor | None,
    sum: Tensor | None,
    x: Tensor,
    weight: Tensor | None = None,
    silu: bool = False,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    pad: bool = False,
) -> None:
    t, s = (1, 1) if residual is None else factors(x, residual)
    x = x.contiguous(memory_format=torch.channels_last)
    batch, channels, height, width = x.shape
    pixels = batch * (height + pad) * (width + pad) if channels else 0
    if pixels == 0:
        return
    columns = triton.next_power_of_2(channels)
    rows = max(1, ELEMENTS // columns)
    added = None if residual is None else residual.contiguous(memory_format=torch.channels_last)
    weight, bias = (None if each is None else each.contiguous() for each in (weight, bias))
    rms_norm_silu_kernel[(triton.cdiv(pixels, rows),)](
        *(x if each is None else each for each in (activated, sum, x, weight, bias, added)),
        pixels, channels, height, width, ROOT=channels**0.5, EPS=NORM_EPS,
        NORM=activated is not None, SUM=sum is not None, HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, SILU=silu, PAD=int(pad),
        T=t, S=s, COMPUTE=tl.float64 if x.dtype == torch.float64 else tl.float32,
        PIXELS=rows, CHANNELS=columns,
        # With fused multiply-adds, the norm beside a sum has other bits than the norm alone.
        enable_fp_fusion=False,
    )  # fmt: skip


def rms_norm_silu(
    x: Tensor,
    weight: Tensor | None,
    silu: bool = True,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.channels_last)
    _launch(out, None, x, weight, silu, bias, residual)
    return out


def add_rms_norm_silu(
    x: Tensor,
    weight: Tensor | None,
    silu: bool = True,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    sum, out = (torch.empty_like(x, memory_format=torch.channels_last) for _ in range(2))
    _launch(out, sum, x, weight, silu, bias, residual)
    return sum, out


def add_pad(
    x: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, pad: bool = True
) -> Tensor:
    batch, channels, height, width = x.shape
    sum = torch.empty(
        (batch, channels, height + pad, width + pad),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )
    _launch(None, sum, x, bias=bias, residual=residual, pad=pad)
    return sum
