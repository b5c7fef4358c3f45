"""The VAEs' RMS norm over channels and SiLU, and the sums in front of them, in one pass.

`cosmos3::rms_norm_silu`, `cosmos3::add_rms_norm_silu` and `cosmos3::add_pad` share what they add
up, `x + bias + residual`, so that a convolution needs no bias and its result is read once. Kernels:
`csrc/cpu/rms_norm_silu.cpp`, `csrc/cuda/rms_norm_silu.cu` and `ops/triton/rms_norm_silu.py`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cosmos3_fast.ops.checks import check_device, check_dtype, check_rank
from cosmos3_fast.ops.registry import call, example_tensor, register, register_autograd, select

NORM_EPS = 1e-12  # the default of torch.nn.functional.normalize, which the VAEs call


def rms_norm_silu(
    x: Tensor,
    weight: Tensor | None,
    silu: bool = True,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Computes `act(y / max(‖y‖₂, 1e-12) * (√C * weight))` over the channels of a sum, y.

    It is the RMS norm of the Wan VAEs (`weight` is its gamma) of `y = x + bias + residual`,
    followed by SiLU, in one pass.

    Args:
        x: [B, C, H, W] float32, bfloat16, float16 or float64; read fastest in channels-last memory.
        weight: [C], any of those dtypes, or None: just `y / max(‖y‖₂, 1e-12)`.
        silu: apply SiLU.
        bias: [C], any of those dtypes.
        residual: [B, C, H, W] in `x`'s dtype; or [B, C/t, s·H, s·W], whose cells of s x s are
            averaged and added to the last of each t channels (the VAE's `AvgDown3D` of one frame).
        backend: as in `prepare_latents`.

    Returns:
        `x`'s shape and dtype, channels-last; computed in float32 (float64 for float64) and
        rounded once.

    Raises:
        RuntimeError, ValueError, BackendUnavailableError: as `prepare_latents`.
    """
    if backend is None:
        return call("rms_norm_silu", x, weight, silu, bias, residual)
    return select("rms_norm_silu", backend, x.device)(x, weight, silu, bias, residual)


def add_rms_norm_silu(
    x: Tensor,
    weight: Tensor | None,
    silu: bool = True,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Gives `x + bias + residual`, and `rms_norm_silu` of it before it is rounded.

    Arguments and errors are those of `rms_norm_silu`; both results have its dtype and layout.
    """
    if backend is None:
        return call("add_rms_norm_silu", x, weight, silu, bias, residual)
    return select("add_rms_norm_silu", backend, x.device)(x, weight, silu, bias, residual)


def add_pad(
    x: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    pad: bool = True,
    *,
    backend: str | None = None,
) -> Tensor:
    """Adds up `x + bias + residual`; with `pad`, a row of zeros is below and a column to the right.

    Arguments and errors are those of `rms_norm_silu`.

    Returns:
        [B, C, H + pad, W + pad] in `x`'s dtype, channels-last; summed in float32 (float64 for
        float64) and rounded once.
    """
    if backend is None:
        return call("add_pad", x, bias, residual, pad)
    return select("add_pad", backend, x.device)(x, bias, residual, pad)


def factors(x: Tensor, residual: Tensor) -> tuple[int, int]:
    """t and s of `rms_norm_silu`'s residual; 1 where nothing tells."""
    (_, channels, height, width), (_, few, tall, wide) = x.shape, residual.shape
    factor_t = channels // few if few > 0 else 1
    factor_s = tall // height if height > 0 else wide // width if width > 0 else 1
    return factor_t, factor_s


def add_up(x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """Adds up `x + bias + residual` (see `rms_norm_silu`) in float32, or float64 for float64.

    It is `x` itself where there is nothing to add.
    """
    if bias is None and residual is None:
        return x
    statistics = torch.promote_types(x.dtype, torch.float32)
    total = x.to(statistics)
    if bias is not None:
        total = total + bias.to(statistics).view(-1, 1, 1)
    if residual is not None:
        t, s = factors(x, residual)
        value = residual.to(statistics)
        if s > 1 and value.numel():
            value = F.avg_pool2d(value, s)
        elif s > 1:
            value = value.new_empty(value.shape[0], value.shape[1], *x.shape[2:])
        if t > 1:
            value = F.pad(value.unsqueeze(2), (0, 0, 0, 0, t - 1, 0)).flatten(1, 2)
        total = total + value
    return total


def normalized(y: Tensor, weight: Tensor | None, silu: bool) -> Tensor:
    """`act(y / max(‖y‖₂, 1e-12) * (√C * weight))` over dim 1 of `y`, in its own dtype."""
    statistics = torch.promote_types(y.dtype, torch.float32)
    norm = torch.linalg.vector_norm(y, dim=1, keepdim=True, dtype=statistics)
    y = y / norm.clamp_min(NORM_EPS)
    if weight is not None:
        y = y * (weight.to(y.dtype) * y.shape[1] ** 0.5).view(-1, 1, 1)
    return F.silu(y) if silu else y


def _rounded(y: Tensor, x: Tensor) -> Tensor:
    # A copy where there was nothing to do: an op's result is no view of its argument.
    y = y.clone() if y is x else y.to(x.dtype)
    return y.contiguous(memory_format=torch.channels_last)


def rms_norm_silu_reference(
    x: Tensor,
    weight: Tensor | None,
    silu: bool = True,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Computes `act(y / max(‖y‖₂, 1e-12) * (√C * weight))`, normed over dim 1 of [B, C, H, W].

    It is the VAE's RMS norm with `weight` its gamma. Everything is computed in float32 (float64 for
    float64) and rounded once; √C stays out of the stored weight because rounding their product to
    bfloat16 would cost as much accuracy as rounding the result. Without `weight`, no √C either.
    """
    return _rounded(normalized(add_up(x, bias, residual), weight, silu), x)


def add_rms_norm_silu_reference(
    x: Tensor,
    weight: Tensor | None,
    silu: bool = True,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gives the sum, rounded once, and `rms_norm_silu_reference`."""
    total = add_up(x, bias, residual)
    return _rounded(total, x), _rounded(normalized(total, weight, silu), x)


def add_pad_reference(
    x: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, pad: bool = True
) -> Tensor:
    """Gives the sum, rounded once, with zeros below and to the right."""
    total = add_up(x, bias, residual)
    return _rounded(F.pad(total, (0, 1, 0, 1)) if pad else total, x)


def check_channels(
    op: str, argument: str, parameter: Tensor | None, x: Tensor, name: str = "x"
) -> None:
    """Raises RuntimeError unless `parameter` is None or has an element for each channel of `x`,
    which the op calls `name`."""
    if parameter is None:
        return
    check_rank(op, argument, parameter, 1, "[C]")
    check_dtype(op, argument, parameter.dtype)
    check_device(op, argument, parameter, name, x)
    torch._check(
        parameter.shape[0] == x.shape[1],
        lambda: (
            f"{op}: {argument} must have the C = {x.shape[1]} elements of {name}, "
            f"got {parameter.shape[0]}"
        ),
    )


def _check(
    op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> None:
    check_rank(op, "x", x, 4, "[B, C, H, W]")
    check_dtype(op, "x", x.dtype)
    check_channels(op, "weight", weight, x)
    check_channels(op, "bias", bias, x)
    if residual is None:
        return
    check_rank(op, "residual", residual, 4, "[B, C/t, s·H, s·W]")
    torch._check(
        residual.dtype == x.dtype,
        lambda: f"{op}: residual must have the dtype of x, {x.dtype}, got {residual.dtype}",
    )
    check_device(op, "residual", residual, "x", x)
    t, s = factors(x, residual)
    wanted = [x.shape[0], residual.shape[1] * t, x.shape[2] * s, x.shape[3] * s]
    got = [residual.shape[0], x.shape[1], residual.shape[2], residual.shape[3]]
    # One by one: sizes may be symbols.
    for fits in (*(a == b for a, b in zip(got, wanted, strict=True)), t >= 1 and s >= 1):
        torch._check(
            fits,
            lambda: (
                f"{op}: residual must have shape [B, C/t, s·H, s·W] for x {list(x.shape)}, "
                f"got {list(residual.shape)}"
            ),
        )


def check_norm(
    x: Tensor,
    weight: Tensor | None,
    silu: bool = True,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> None:
    """Raises RuntimeError unless the arguments of `rms_norm_silu` fit each other."""
    _check("rms_norm_silu", x, weight, bias, residual)


def check_add_norm(
    x: Tensor,
    weight: Tensor | None,
    silu: bool = True,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> None:
    """Raises RuntimeError unless the arguments of `add_rms_norm_silu` fit each other."""
    _check("add_rms_norm_silu", x, weight, bias, residual)


def check_add_pad(
    x: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, pad: bool = True
) -> None:
    """Raises RuntimeError unless the arguments of `add_pad` fit each other."""
    _check("add_pad", x, None, bias, residual)


def _example(device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias and residual."""
    x, residual = example_tensor(device, 1, 4, 2, 3), example_tensor(device, 1, 2, 4, 6)
    weight, bias = 1 + example_tensor(device, 4), example_tensor(device, 4)
    return x, weight, bias, residual


def _norm_example(device: str) -> tuple[Any, ...]:
    x, weight, bias, residual = _example(device)
    return x, weight, True, bias, residual


def _pad_example(device: str) -> tuple[Any, ...]:
    x, _, bias, residual = _example(device)
    return x, bias, residual


register(
    "rms_norm_silu(Tensor x, Tensor? weight, bool silu=True, Tensor? bias=None, "
    "Tensor? residual=None) -> Tensor",
    check_norm,
    eager=rms_norm_silu_reference,
    triton="rms_norm_silu:rms_norm_silu",
    example=_norm_example,
)
register(
    "add_rms_norm_silu(Tensor x, Tensor? weight, bool silu=True, Tensor? bias=None, "
    "Tensor? residual=None) -> (Tensor sum, Tensor activated)",
    check_add_norm,
    eager=add_rms_norm_silu_reference,
    triton="rms_norm_silu:add_rms_norm_silu",
    example=_norm_example,
)
register(
    "add_pad(Tensor x, Tensor? bias=None, Tensor? residual=None, bool pad=True) -> Tensor",
    check_add_pad,
    eager=add_pad_reference,
    triton="rms_norm_silu:add_pad",
    example=_pad_example,
)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


@torch.library.register_fake("cosmos3::rms_norm_silu")
def _(
    x: Tensor,
    weight: Tensor | None,
    silu: bool = True,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    check_norm(x, weight, silu, bias, residual)
    return _like(x)


@torch.library.register_fake("cosmos3::add_rms_norm_silu")
def _(
    x: Tensor,
    weight: Tensor | None,
    silu: bool = True,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    check_add_norm(x, weight, silu, bias, residual)
    return _like(x), _like(x)


@torch.library.register_fake("cosmos3::add_pad")
def _(
    x: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, pad: bool = True
) -> Tensor:
    check_add_pad(x, bias, residual, pad)
    batch, channels, height, width = x.shape
    more = int(pad)  # a symbolic size takes no bool up to torch 2.11
    return torch.empty(
        (batch, channels, height + more, width + more),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )


def _norm_gradients(
    gradient: Tensor, total: Tensor, weight: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor | None]:
    """Differentiates the normalised value with respect to the sum and to the weight.

    The first gradient is in float32, or float64 for float64.
    """
    # With n = y/‖y‖, z = s n, out = z sigmoid(z): dout/dz = sigmoid(z) (1 + z (1 - sigmoid(z)))
    # and, for g = s dout/dz dout, dy = (g - n Σ g n) / ‖y‖ (no second term where the norm is
    # clamped).
    total = total.to(torch.promote_types(total.dtype, torch.float32))
    slope = gradient.to(total.dtype)
    norm = torch.linalg.vector_norm(total, dim=1, keepdim=True)
    divisor = norm.clamp_min(NORM_EPS)
    unit = total / divisor
    root = total.shape[1] ** 0.5
    scale = None if weight is None else (weight.to(total.dtype) * root).view(-1, 1, 1)
    if silu:
        z = unit if scale is None else unit * scale
        gate = torch.sigmoid(z)
        slope = slope * gate * (1 + z * (1 - gate))
    inner = slope if scale is None else slope * scale
    along = unit * (inner * unit).sum(1, keepdim=True)
    grad_total = (inner - torch.where(norm > NORM_EPS, along, 0)) / divisor
    if weight is None:
        return grad_total, None
    return grad_total, ((slope * unit).sum((0, 2, 3)) * root).to(weight.dtype)


def _sum_gradients(
    gradient: Tensor, x: Tensor, bias: Tensor | None, residual: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Differentiates with respect to x, bias and residual, given the gradient of their sum."""
    grad_bias = None if bias is None else gradient.sum((0, 2, 3)).to(bias.dtype)
    grad_residual = None
    if residual is not None:
        t, s = factors(x, residual)
        grad_residual = gradient[:, t - 1 :: t]
        if s > 1:
            spread = grad_residual.repeat_interleave(s, 2).repeat_interleave(s, 3)
            grad_residual = spread / s**2
        grad_residual = grad_residual.to(residual.dtype)
    return gradient.to(x.dtype), grad_bias, grad_residual


def _norm_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, ctx.silu, bias, residual = inputs
    ctx.save_for_backward(x, weight, bias, residual)


def _norm_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, residual = ctx.saved_tensors
    total = add_up(x, bias, residual)
    grad_total, grad_weight = _norm_gradients(gradient, total, weight, ctx.silu)
    grad_x, grad_bias, grad_residual = _sum_gradients(grad_total, x, bias, residual)
    return grad_x, grad_weight, None, grad_bias, grad_residual


def _add_norm_backward(
    ctx: Any, grad_sum: Tensor, grad_activated: Tensor
) -> tuple[Tensor | None, ...]:
    x, weight, bias, residual = ctx.saved_tensors
    total = add_up(x, bias, residual)
    grad_total, grad_weight = _norm_gradients(grad_activated, total, weight, ctx.silu)
    grad_total = grad_total + grad_sum.to(grad_total.dtype)
    grad_x, grad_bias, grad_residual = _sum_gradients(grad_total, x, bias, residual)
    return grad_x, grad_weight, None, grad_bias, grad_residual


def _pad_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, residual, _ = inputs
    ctx.save_for_backward(x, bias, residual)


def _pad_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, bias, residual = ctx.saved_tensors
    inside = gradient[:, :, : x.shape[2], : x.shape[3]]
    inside = inside.to(torch.promote_types(x.dtype, torch.float32))
    return *_sum_gradients(inside, x, bias, residual), None


register_autograd("rms_norm_silu", _norm_backward, _norm_setup, rms_norm_silu_reference)
register_autograd("add_rms_norm_silu", _add_norm_backward, _norm_setup, add_rms_norm_silu_reference)
register_autograd("add_pad", _pad_backward, _pad_setup, add_pad_reference)
