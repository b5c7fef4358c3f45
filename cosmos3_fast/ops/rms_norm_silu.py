"""`cosmos3::rms_norm_silu`: the VAEs' RMS norm over channels and SiLU, in one pass.

Kernels: `csrc/cpu/rms_norm_silu.cpp` and `ops/triton/rms_norm_silu.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cosmos3_fast.ops.checks import check_device, check_dtype, check_rank
from cosmos3_fast.ops.registry import register, register_autograd, select

NORM_EPS = 1e-12  # the default of torch.nn.functional.normalize, which the VAEs call


def rms_norm_silu(
    x: Tensor, weight: Tensor | None, silu: bool = True, *, backend: str | None = None
) -> Tensor:
    """`act(x / max(‖x‖₂, 1e-12) * (√C * weight))` over the channels, in one pass.

    The RMS norm of the Wan VAEs (`weight` is its gamma), followed by SiLU.

    Args:
        x: [B, C, H, W] float32, bfloat16, float16 or float64; read fastest in channels-last memory.
        weight: [C], any of those dtypes, or None: just `x / max(‖x‖₂, 1e-12)`.
        silu: apply SiLU.
        backend: as in `prepare_latents`.

    Returns:
        `x`'s shape and dtype, channels-last; computed in float32 (float64 for float64) and
        rounded once.

    Raises:
        RuntimeError, ValueError, BackendUnavailableError: as `prepare_latents`.
    """
    return select("rms_norm_silu", backend, x.device)(x, weight, silu)


def rms_norm_silu_reference(x: Tensor, weight: Tensor | None, silu: bool = True) -> Tensor:
    """`act(x / max(‖x‖₂, 1e-12) * (√C * weight))`, the norm taken over dim 1 of [B, C, H, W].

    The VAE's RMS norm with `weight` its gamma. Everything is computed in float32 (float64 for
    float64) and rounded once; √C stays out of the stored weight because rounding their product to
    bfloat16 would cost as much accuracy as rounding the result. Without `weight`, no √C either.
    """
    statistics = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=statistics)
    y = x / norm.clamp_min(NORM_EPS)
    if weight is not None:
        y = y * (weight.to(statistics) * x.shape[1] ** 0.5).view(-1, 1, 1)
    y = (torch.nn.functional.silu(y) if silu else y).to(x.dtype)
    return y.contiguous(memory_format=torch.channels_last)


def check_norm(x: Tensor, weight: Tensor | None, silu: bool = True) -> None:
    """Raises RuntimeError unless the arguments of `rms_norm_silu` fit each other."""
    op = "rms_norm_silu"
    check_rank(op, "x", x, 4, "[B, C, H, W]")
    check_dtype(op, "x", x.dtype)
    if weight is not None:
        check_rank(op, "weight", weight, 1, "[C]")
        check_dtype(op, "weight", weight.dtype)
        check_device(op, "weight", weight, "x", x)
        torch._check(
            weight.shape[0] == x.shape[1],
            lambda: (
                f"{op}: weight must have the C = {x.shape[1]} elements of x, got {weight.shape[0]}"
            ),
        )


register(
    "rms_norm_silu(Tensor x, Tensor? weight, bool silu=True) -> Tensor",
    check_norm,
    eager=rms_norm_silu_reference,
    triton="rms_norm_silu:rms_norm_silu",
)


@torch.library.register_fake("cosmos3::rms_norm_silu")
def _(x: Tensor, weight: Tensor | None, silu: bool = True) -> Tensor:
    check_norm(x, weight, silu)
    return torch.empty_like(x, memory_format=torch.channels_last)


def _norm_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.silu = inputs
    ctx.save_for_backward(*((x,) if weight is None else (x, weight)))


def _norm_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    # With n = x/‖x‖, y = s n, z = y sigmoid(y): dz/dy = sigmoid(y) (1 + y (1 - sigmoid(y))) and,
    # for g = s dz/dy dz, dx = (g - n Σ g n) / ‖x‖ (no second term where the norm is clamped).
    x, *rest = ctx.saved_tensors
    weight = rest[0] if rest else None
    statistics = torch.promote_types(x.dtype, torch.float32)
    value, slope = x.to(statistics), gradient.to(statistics)
    norm = torch.linalg.vector_norm(value, dim=1, keepdim=True)
    divisor = norm.clamp_min(NORM_EPS)
    unit = value / divisor
    scale = None
    if weight is not None:
        scale = (weight.to(statistics) * x.shape[1] ** 0.5).view(-1, 1, 1)
    if ctx.silu:
        y = unit if scale is None else unit * scale
        gate = torch.sigmoid(y)
        slope = slope * gate * (1 + y * (1 - gate))
    grad_x = grad_weight = None
    if ctx.needs_input_grad[0]:
        inner = slope if scale is None else slope * scale
        along = unit * (inner * unit).sum(1, keepdim=True)
        grad_x = ((inner - torch.where(norm > NORM_EPS, along, 0)) / divisor).to(x.dtype)
    if ctx.needs_input_grad[1] and weight is not None:
        grad_weight = ((slope * unit).sum((0, 2, 3)) * x.shape[1] ** 0.5).to(weight.dtype)
    return grad_x, grad_weight, None


register_autograd("rms_norm_silu", _norm_backward, _norm_setup, rms_norm_silu_reference)
