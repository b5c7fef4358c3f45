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

__all__ = ["BackendUnavailableError", "default_backend", "prepare_latents", "prepare_latents_"]

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


def prepare_latents(
    cond_latent: Tensor,
    noise: Tensor,
    condition_frames: Sequence[int] = (0,),
    *,
    condition_mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Conditioned latents and their velocity mask, in one pass over the noise.

    Equivalent to `cosmos3_fast.reference.formula`: with m = 1 at the conditioned frames,
    `latents = m * cond_latent + (1 - m) * noise` and `velocity_mask = 1 - m`.

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
