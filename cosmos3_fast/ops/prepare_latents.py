"""The ops `torch.ops.cosmos3.*`: per op its backends, typed wrapper, fake kernel and autograd.

Importing this module makes the ops exist, compiled or not (see `cosmos3_fast.backends`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks, reference
from .backends import (
    BackendUnavailableError,
    default_backend,
    register,
    register_autograd_kernel,
    select,
)

__all__ = [
    "BackendUnavailableError",
    "default_backend",
    "pack_pixels",
    "prepare_latents",
    "prepare_latents_",
    "rms_norm_silu",
    "winograd_conv3x3",
    "winograd_pack",
]

register(
    "prepare_latents",
    checks.check_frames,
    eager=reference.prepare_latents,
    triton="prepare_latents:prepare_latents",
)
register(
    "prepare_latents.mask",
    checks.check_mask,
    eager=reference.prepare_latents_mask,
    triton="prepare_latents:prepare_latents_mask",
)
register(
    "prepare_latents_",
    checks.check_frames_in_place,
    eager=reference.prepare_latents_,
    triton="prepare_latents:prepare_latents_",
)
register(
    "rms_norm_silu",
    checks.check_norm,
    eager=reference.rms_norm_silu,
    triton="rms_norm_silu:rms_norm_silu",
)
register(
    "pack_pixels",
    checks.check_pixels,
    eager=reference.pack_pixels,
    triton="pack_pixels:pack_pixels",
)
register("winograd_pack", checks.check_winograd_weight, eager=reference.winograd_pack)
register("winograd_conv3x3", checks.check_winograd, eager=reference.winograd_conv3x3)


def prepare_latents(
    cond_latent: Tensor,
    noise: Tensor,
    condition_frames: Sequence[int] = (0,),
    *,
    condition_mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Conditioned latents and their velocity mask, in one pass over the noise.

    With m = 1 at the conditioned frames, `latents = m * cond_latent + (1 - m) * noise` and
    `velocity_mask = 1 - m` (`cosmos3_fast.reference.prepare_latents_formula`).

    Args:
        cond_latent: [1 or B, C, Tc, H, W], float32, bfloat16, float16 or float64; rounded to the
            dtype of `noise` to nearest even. Tc = 1: that frame serves every conditioned frame;
            otherwise frame t takes `cond_latent[:, :, t]`, and Tc > max(condition_frames).
        noise: [B, C, T, H, W], any of those dtypes, any strides.
        condition_frames: latent frames in [0, T), none twice; may be empty.
        condition_mask: instead of frames, [1 or B, 1, T, 1, 1] in [0, 1]: a true blend, computed
            in float32 (float64 for float64 noise) and rounded once. Tc must be 1 or at least T.
        backend: None for `default_backend`, or "cpp", "triton", "eager" (no autograd unless it
            is the default one).

    Returns:
        latents: [B, C, T, H, W], contiguous, dtype of `noise`. With frames, each one is selected:
            a NaN in the operand that is not taken does not leak.
        velocity_mask: [1, 1, T, 1, 1] (with a mask: the mask's shape), dtype of `noise`; 0 at
            conditioned frames, 1 elsewhere (1 - mask).

    Raises:
        RuntimeError: arguments that do not fit; names the argument, what came and what is wanted.
        ValueError: an unknown backend, or frames and a mask together.
        BackendUnavailableError: the named backend cannot serve here.
    """
    if condition_mask is None:
        run = select("prepare_latents", backend, noise.device)
        return run(cond_latent, noise, list(condition_frames))
    if tuple(condition_frames) != (0,):
        raise ValueError("prepare_latents: give condition_frames or condition_mask, not both")
    return select("prepare_latents.mask", backend, noise.device)(cond_latent, noise, condition_mask)


def prepare_latents_(
    cond_latent: Tensor,
    noise: Tensor,
    condition_frames: Sequence[int] = (0,),
    *,
    backend: str | None = None,
) -> Tensor:
    """Writes the conditioned frames into `noise`; returns the velocity mask [1, 1, T, 1, 1].

    Touches B * C * len(condition_frames) * H * W elements. Arguments and errors are those of
    `prepare_latents`; `noise` must not be expanded, and nothing may require a gradient.
    """
    run = select("prepare_latents_", backend, noise.device)
    return run(cond_latent, noise, list(condition_frames))


@torch.library.register_fake("cosmos3::prepare_latents")
def _(
    cond_latent: Tensor, noise: Tensor, condition_frames: Sequence[int] = (0,)
) -> tuple[Tensor, Tensor]:
    checks.check_frames(cond_latent, noise, condition_frames)
    return noise.new_empty(noise.shape), noise.new_empty(1, 1, noise.shape[2], 1, 1)


@torch.library.register_fake("cosmos3::prepare_latents.mask")
def _(cond_latent: Tensor, noise: Tensor, condition_mask: Tensor) -> tuple[Tensor, Tensor]:
    checks.check_mask(cond_latent, noise, condition_mask)
    return noise.new_empty(noise.shape), noise.new_empty(condition_mask.shape)


@torch.library.register_fake("cosmos3::prepare_latents_")
def _(cond_latent: Tensor, noise: Tensor, condition_frames: Sequence[int] = (0,)) -> Tensor:
    checks.check_frames_in_place(cond_latent, noise, condition_frames)
    return noise.new_empty(1, 1, noise.shape[2], 1, 1)


def _sum_to(gradient: Tensor, batch: int) -> Tensor:
    return gradient.sum(0, keepdim=True) if batch == 1 != gradient.shape[0] else gradient


def _frames_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    cond_latent, _, condition_frames = inputs
    ctx.cond_shape, ctx.cond_dtype = cond_latent.shape, cond_latent.dtype
    ctx.condition_frames = list(condition_frames)
    ctx.set_materialize_grads(False)


def _frames_backward(
    ctx: Any, gradient: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, Tensor | None, None]:
    # The velocity mask does not depend on the tensors.
    if gradient is None:
        return None, None, None
    batch, channels, cond_frames, height, width = ctx.cond_shape
    frames = ctx.condition_frames
    grad_cond = grad_noise = None
    if ctx.needs_input_grad[0]:
        grad_cond = gradient.new_zeros(ctx.cond_shape)
        for frame in frames:
            target = grad_cond.select(2, frame if cond_frames > 1 else 0)
            target.add_(_sum_to(gradient.select(2, frame), batch))
        grad_cond = grad_cond.to(ctx.cond_dtype)
    if ctx.needs_input_grad[1]:
        # Zero at the conditioned frames: the op itself, with zeros for the latent.
        zeros = gradient.new_zeros(1, channels, 1, height, width)
        grad_noise, _mask = torch.ops.cosmos3.prepare_latents(zeros, gradient, frames)
    return grad_cond, grad_noise, None


torch.library.register_autograd(
    "cosmos3::prepare_latents", _frames_backward, setup_context=_frames_setup
)


def _mask_setup(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    cond_latent, noise, condition_mask = inputs
    ctx.cond_shape, ctx.cond_dtype = cond_latent.shape, cond_latent.dtype
    ctx.set_materialize_grads(False)
    if condition_mask.requires_grad:
        ctx.save_for_backward(condition_mask, cond_latent, noise)
    else:
        ctx.save_for_backward(condition_mask)


def _mask_backward(
    ctx: Any, gradient: Tensor | None, grad_velocity: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    condition_mask, *operands = ctx.saved_tensors
    grad_cond = grad_noise = grad_mask = None
    if gradient is not None:
        mask = condition_mask.to(gradient.dtype)
        if ctx.needs_input_grad[0]:
            batch, _, cond_frames, _, _ = ctx.cond_shape
            grad_cond = _sum_to(mask * gradient, batch)
            if cond_frames == 1:
                grad_cond = grad_cond.sum(2, keepdim=True)
            elif cond_frames > gradient.shape[2]:
                unused = cond_frames - gradient.shape[2]
                grad_cond = torch.nn.functional.pad(grad_cond, (0, 0, 0, 0, 0, unused))
            grad_cond = grad_cond.to(ctx.cond_dtype)
        if ctx.needs_input_grad[1]:
            grad_noise = (1 - mask) * gradient
    if ctx.needs_input_grad[2]:
        cond_latent, noise = operands
        grad_mask = torch.zeros_like(condition_mask)
        if gradient is not None:
            if cond_latent.shape[2] > 1:
                cond_latent = cond_latent[:, :, : noise.shape[2]]
            difference = cond_latent.to(noise.dtype) - noise
            per_frame = (gradient * difference).sum((1, 3, 4), keepdim=True)
            grad_mask = grad_mask + _sum_to(per_frame, condition_mask.shape[0])
        if grad_velocity is not None:
            grad_mask = grad_mask - grad_velocity
        grad_mask = grad_mask.to(condition_mask.dtype)
    return grad_cond, grad_noise, grad_mask


torch.library.register_autograd(
    "cosmos3::prepare_latents.mask", _mask_backward, setup_context=_mask_setup
)


def _refuse_gradients(
    cond_latent: Tensor, noise: Tensor, condition_frames: Sequence[int] = (0,)
) -> Tensor:
    if torch.is_grad_enabled() and (cond_latent.requires_grad or noise.requires_grad):
        raise RuntimeError(
            "prepare_latents_: cond_latent and noise must not require a gradient; "
            "use prepare_latents, which is differentiable"
        )
    with torch._C._AutoDispatchBelowAutograd():
        velocity_mask = torch.ops.cosmos3.prepare_latents_(cond_latent, noise, condition_frames)
    torch.autograd.graph.increment_version(noise)
    return velocity_mask


register_autograd_kernel("prepare_latents_", _refuse_gradients)


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


@torch.library.register_fake("cosmos3::rms_norm_silu")
def _(x: Tensor, weight: Tensor | None, silu: bool = True) -> Tensor:
    checks.check_norm(x, weight, silu)
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
    divisor = norm.clamp_min(reference.NORM_EPS)
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
        grad_x = ((inner - torch.where(norm > reference.NORM_EPS, along, 0)) / divisor).to(x.dtype)
    if ctx.needs_input_grad[1] and weight is not None:
        grad_weight = ((slope * unit).sum((0, 2, 3)) * x.shape[1] ** 0.5).to(weight.dtype)
    return grad_x, grad_weight, None


torch.library.register_autograd("cosmos3::rms_norm_silu", _norm_backward, setup_context=_norm_setup)


def pack_pixels(
    pixels: Tensor, patch_size: int, dtype: torch.dtype, *, backend: str | None = None
) -> Tensor:
    """What the first convolution reads, from pixels, in one pass.

    Args:
        pixels: uint8 [B, H, W, 3], normalised here to [-1, 1] as the engines do
            (`2 (x / 255) - 1` in float32), or floating [B, 3, H, W], normalised already; any
            strides.
        patch_size: divides H and W.
        dtype: of the result.
        backend: as in `prepare_latents`.

    Returns:
        [B, 3·p², H/p, W/p] channels-last, channels ordered as `pixel_unshuffle` orders them.

    Raises:
        RuntimeError, ValueError, BackendUnavailableError: as `prepare_latents`.
    """
    return select("pack_pixels", backend, pixels.device)(pixels, patch_size, dtype)


@torch.library.register_fake("cosmos3::pack_pixels")
def _(pixels: Tensor, patch_size: int, dtype: torch.dtype) -> Tensor:
    checks.check_pixels(pixels, patch_size, dtype)
    batch, *sizes = pixels.shape
    height, width = sizes[:2] if pixels.dtype == torch.uint8 else sizes[1:]
    shape = (batch, 3 * patch_size**2, height // patch_size, width // patch_size)
    return torch.empty(shape, dtype=dtype, device=pixels.device, memory_format=torch.channels_last)


def _pack_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pixels, ctx.patch_size, _ = inputs
    ctx.dtype = pixels.dtype


def _pack_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    # Bytes have no gradient, so the pixels were floating.
    return torch.nn.functional.pixel_shuffle(gradient, ctx.patch_size).to(ctx.dtype), None, None


torch.library.register_autograd("cosmos3::pack_pixels", _pack_backward, setup_context=_pack_setup)


def winograd_pack(weight: Tensor, *, backend: str | None = None) -> Tensor:
    """Transform float32 [Cout, Cin, 3, 3] kernels, once, for `winograd_conv3x3`.

    Cout must be a multiple of 32 and Cin of 16. Returns [36, Cout/32, Cin, 32], four times the
    size of `weight`. Not differentiable.
    """
    return select("winograd_pack", backend, weight.device)(weight)


@torch.library.register_fake("cosmos3::winograd_pack")
def _(weight: Tensor) -> Tensor:
    checks.check_winograd_weight(weight)
    return weight.new_empty(36, weight.shape[0] // 32, weight.shape[1], 32)


def winograd_conv3x3(
    x: Tensor,
    packed_weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """`conv2d(x, weight, bias, padding=1) + residual` in float32 with a quarter of the products.

    Winograd's F(4x4, 3x3). Its rounding error is a few times that of direct convolution (the tests
    state it). Not differentiable.

    Args:
        x: [B, Cin, H, W] float32; read fastest in channels-last memory.
        packed_weight: `winograd_pack(weight)`.
        bias: [Cout] float32.
        residual: [B, Cout, H, W] float32, added to the result.
        backend: as in `prepare_latents`.

    Returns:
        [B, Cout, H, W] float32, channels-last.

    Raises:
        RuntimeError, ValueError, BackendUnavailableError: as `prepare_latents`.
    """
    return select("winograd_conv3x3", backend, x.device)(x, packed_weight, bias, residual)


@torch.library.register_fake("cosmos3::winograd_conv3x3")
def _(
    x: Tensor, packed_weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    checks.check_winograd(x, packed_weight, bias, residual)
    batch, _, height, width = x.shape
    return torch.empty(
        (batch, packed_weight.shape[1] * 32, height, width),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )


def _refuse_winograd_gradients(op: str) -> Any:
    def kernel(*args: Tensor | None) -> Tensor:
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in args):
            raise RuntimeError(f"{op}: no argument may require a gradient; use conv2d")
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(torch.ops.cosmos3, op)(*args)

    return kernel


for _op in ("winograd_pack", "winograd_conv3x3"):
    register_autograd_kernel(_op, _refuse_winograd_gradients(_op))
