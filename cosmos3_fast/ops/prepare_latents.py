"""`cosmos3::prepare_latents`: mask broadcast, blend and velocity mask in one pass over the noise.

The specification is the engines' expression, `prepare_latents_formula` (SGLang's
`Cosmos3LatentPreparationStage`, diffusers' `Cosmos3OmniPipeline.prepare_latents`). The
`…_reference` functions are the op's own contract in plain torch and serve as its eager backend; the
kernels are `csrc/cpu/prepare_latents.cpp`, `csrc/cuda/prepare_latents.cu` and
`ops/triton/prepare_latents.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cosmos3_fast.ops._torch import beneath_negation, has_address, redispatch
from cosmos3_fast.ops.checks import check_device, check_dtype
from cosmos3_fast.ops.registry import (
    REGISTERED,
    example_tensor,
    refuse_autograd,
    register,
    register_autograd,
    register_kernel,
    select,
)

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def prepare_latents(
    cond_latent: Tensor,
    noise: Tensor,
    condition_frames: Sequence[int] = (0,),
    *,
    condition_mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Gives conditioned latents and their velocity mask, in one pass over the noise.

    With m = 1 at the conditioned frames, `latents = m * cond_latent + (1 - m) * noise` and
    `velocity_mask = 1 - m` (`prepare_latents_formula`).

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
        TypeError: `condition_frames` is no list of frames, such as a mask that lacks its keyword.
        ValueError: an unknown backend, or frames and a mask together.
        BackendUnavailableError: the named backend cannot serve here.
    """
    frames = _frame_list("prepare_latents", condition_frames)
    if condition_mask is None:
        return select("prepare_latents", backend, noise.device)(cond_latent, noise, frames)
    if frames != [0]:
        raise ValueError(
            "prepare_latents: condition_frames must be left out beside condition_mask, "
            f"got {frames}"
        )
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
    `prepare_latents`; `noise` must not be expanded, nothing may require a gradient, and as for
    `Tensor.copy_` the two must not overlap in part (the same view twice changes nothing; where
    strided views of one buffer interleave, `cond_latent` is read before anything is written).
    """
    frames = _frame_list("prepare_latents_", condition_frames)
    return select("prepare_latents_", backend, noise.device)(cond_latent, noise, frames)


def _frame_list(op: str, condition_frames: Sequence[int]) -> list[int]:
    if isinstance(condition_frames, Tensor):
        if condition_frames.dim() != 1 or condition_frames.dtype not in INTEGERS:
            hint = "" if op.endswith("_") else "; give a mask as condition_mask="
            raise TypeError(
                f"{op}: condition_frames must be a list of frames, got a tensor of shape "
                f"{list(condition_frames.shape)} in {condition_frames.dtype}{hint}"
            )
        return condition_frames.tolist()
    try:
        return list(condition_frames)
    except TypeError:
        raise TypeError(
            f"{op}: condition_frames must be a list of frames, got {condition_frames!r}"
        ) from None


def prepare_latents_formula(
    cond_latent: Tensor, noise: Tensor, condition_frames: Sequence[int] = (0,)
) -> tuple[Tensor, Tensor]:
    """Evaluates the engines' expression.

    A NaN leaks from the operand that is multiplied by zero.
    """
    cond_latent = cond_latent.to(noise.dtype)
    num_frames = noise.shape[2]
    condition_mask = noise.new_zeros(1, 1, num_frames, 1, 1)
    condition_latents = torch.zeros_like(noise)
    for frame in condition_frames:
        source = frame if cond_latent.shape[2] > 1 else 0
        condition_latents[:, :, frame] = cond_latent[:, :, source]
        condition_mask[:, :, frame] = 1.0
    latents = condition_mask * condition_latents + (1.0 - condition_mask) * noise
    return latents, 1.0 - condition_mask


def _extent(x: Tensor) -> int:
    """Counts the elements from the first to the last of `x`."""
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))


def _fills_its_extent(x: Tensor) -> bool:
    return _extent(x) == x.numel()


def _begin(x: Tensor) -> int | torch.SymInt:
    return x.data_ptr() if has_address(x) else x.storage_offset() * x.element_size()


def may_overlap(cond_latent: Tensor, noise: Tensor) -> bool:
    """Tells whether the memory of the two is interleaved or shared."""
    # Without an address the storage is still one or another.
    if not has_address(noise) and cond_latent.untyped_storage() is not noise.untyped_storage():
        return False
    if cond_latent.numel() == 0 or noise.numel() == 0:
        return False
    ours, theirs = _begin(cond_latent), _begin(noise)
    return (
        ours < theirs + _extent(noise) * noise.element_size()
        and theirs < ours + _extent(cond_latent) * cond_latent.element_size()
    )


def _is_same_view(a: Tensor, b: Tensor) -> bool:
    return (
        _begin(a) == _begin(b)
        and a.dtype == b.dtype
        and a.shape == b.shape
        and a.stride() == b.stride()
    )


def apart(cond_latent: Tensor, noise: Tensor) -> Tensor:
    """Gives what is read while `noise` is written.

    Where views of one buffer interleave it is a copy, so that the result does not depend on the
    order of the writes.
    """
    return cond_latent.clone() if may_overlap(cond_latent, noise) else cond_latent


def prepare_latents_in_place_reference(
    cond_latent: Tensor, noise: Tensor, condition_frames: Sequence[int] = (0,)
) -> Tensor:
    """Writes the conditioned frames into `noise`; returns the velocity mask [1, 1, T, 1, 1]."""
    return _write_frames(apart(cond_latent, noise), noise, condition_frames)


def _write_frames(cond_latent: Tensor, noise: Tensor, condition_frames: Sequence[int]) -> Tensor:
    velocity_mask = noise.new_ones(1, 1, noise.shape[2], 1, 1)
    for frame in condition_frames:
        source = frame if cond_latent.shape[2] > 1 else 0
        noise[:, :, frame] = cond_latent[:, :, source]
        velocity_mask[:, :, frame] = 0.0
    return velocity_mask


def prepare_latents_reference(
    cond_latent: Tensor, noise: Tensor, condition_frames: Sequence[int] = (0,)
) -> tuple[Tensor, Tensor]:
    """Selects per frame: `latents[:, :, t]` is `cond_latent` for t in condition_frames, else noise.

    Equal (==) to `prepare_latents_formula` for finite inputs.
    """
    latents = noise.clone(memory_format=torch.contiguous_format)
    return latents, _write_frames(cond_latent, latents, condition_frames)


def prepare_latents_mask_reference(
    cond_latent: Tensor, noise: Tensor, condition_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Blends, `m * cond + (1 - m) * noise`, in float32 (float64 for float64 noise); rounds once."""
    compute = torch.float64 if noise.dtype == torch.float64 else torch.float32
    mask = condition_mask.to(compute)
    cond = cond_latent.to(compute)
    if cond.shape[2] > 1:
        cond = cond[:, :, : noise.shape[2]]
    latents = mask * cond + (1.0 - mask) * noise.to(compute)
    return latents.to(noise.dtype).contiguous(), (1.0 - mask).to(noise.dtype).contiguous()


def _check_latent(op: str, argument: str, tensor: Tensor) -> None:
    torch._check(
        tensor.dim() == 5,
        lambda: (
            f"{op}: {argument} must have 5 dimensions [B, C, T, H, W], "
            f"got shape {list(tensor.shape)}"
        ),
    )
    check_dtype(op, argument, tensor.dtype)


def _check_pair(op: str, cond_latent: Tensor, noise: Tensor) -> None:
    _check_latent(op, "noise", noise)
    _check_latent(op, "cond_latent", cond_latent)
    check_device(op, "cond_latent", cond_latent, "noise", noise)
    for dim in (1, 3, 4):
        torch._check(
            cond_latent.shape[dim] == noise.shape[dim],
            lambda: (
                f"{op}: cond_latent must have C, H and W of noise {list(noise.shape)}, "
                f"got {list(cond_latent.shape)}"
            ),
        )
    if cond_latent.shape[0] != 1:
        torch._check(
            cond_latent.shape[0] == noise.shape[0],
            lambda: (
                f"{op}: cond_latent must have batch size 1 or that of noise ({noise.shape[0]}), "
                f"got {cond_latent.shape[0]}"
            ),
        )


def check_frames(
    cond_latent: Tensor,
    noise: Tensor,
    condition_frames: Sequence[int] = (0,),
    op: str = "prepare_latents",
) -> None:
    """Raises RuntimeError unless the arguments of a frame-list form fit each other."""
    _check_pair(op, cond_latent, noise)
    frames = list(condition_frames)
    for index, frame in enumerate(frames):
        torch._check(
            0 <= frame < noise.shape[2],
            lambda: (
                f"{op}: condition_frames must lie in [0, {noise.shape[2]}), "
                f"got {list(condition_frames)}"
            ),
        )
        torch._check(
            frame not in frames[:index],
            lambda: f"{op}: condition_frames must not repeat a frame, got {list(condition_frames)}",
        )
    last = max(frames, default=-1)
    if cond_latent.shape[2] != 1:
        torch._check(
            cond_latent.shape[2] > last,
            lambda: (
                f"{op}: cond_latent must have 1 frame or more than max(condition_frames) = {last}, "
                f"got {cond_latent.shape[2]}"
            ),
        )


def check_mask(cond_latent: Tensor, noise: Tensor, condition_mask: Tensor) -> None:
    """Raises RuntimeError unless the arguments of the mask form fit each other."""
    op = "prepare_latents"
    _check_pair(op, cond_latent, noise)
    _check_latent(op, "condition_mask", condition_mask)
    check_device(op, "condition_mask", condition_mask, "noise", noise)
    batch, *rest = condition_mask.shape
    wanted = [batch if batch == 1 else noise.shape[0], 1, noise.shape[2], 1, 1]
    for got, want in zip([batch, *rest], wanted, strict=True):
        torch._check(
            got == want,
            lambda: (
                f"{op}: condition_mask must have shape [1 or B, 1, T, 1, 1] for noise "
                f"{list(noise.shape)}, got {list(condition_mask.shape)}"
            ),
        )
    if cond_latent.shape[2] != 1:
        torch._check(
            cond_latent.shape[2] >= noise.shape[2],
            lambda: (
                f"{op}: cond_latent must have 1 frame or at least those of noise "
                f"({noise.shape[2]}), got {cond_latent.shape[2]}"
            ),
        )


def check_frames_in_place(
    cond_latent: Tensor, noise: Tensor, condition_frames: Sequence[int] = (0,)
) -> None:
    """Raises RuntimeError as `check_frames` does, and where torch's own `copy_` would.

    `noise` must not hold one element at two indices (expanded) nor overlap `cond_latent` in part.
    """
    op = "prepare_latents_"
    check_frames(cond_latent, noise, condition_frames, op)
    for dim, (size, stride) in enumerate(zip(noise.shape, noise.stride(), strict=True)):
        torch._check(
            noise.numel() == 0 or size <= 1 or stride != 0,
            lambda: (
                f"{op}: noise must not be expanded, got stride 0 in dimension {dim} of size {size}"  # noqa: B023
            ),
        )
    if may_overlap(cond_latent, noise) and not _is_same_view(cond_latent, noise):
        torch._check(
            not (_fills_its_extent(cond_latent) and _fills_its_extent(noise)),
            lambda: f"{op}: cond_latent must not overlap noise in memory; clone it",
        )


def _example(device: str) -> tuple[Tensor, Tensor, list[int]]:
    cond_latent = example_tensor(device, 1, 2, 1, 2, 3)
    return cond_latent, example_tensor(device, 2, 2, 4, 2, 3), [0, 2]


def _mask_example(device: str) -> tuple[Tensor, Tensor, Tensor]:
    cond_latent, noise, _ = _example(device)
    return cond_latent, noise, example_tensor(device, 2, 1, 4, 1, 1).square()


register(
    "prepare_latents(Tensor cond_latent, Tensor noise, int[] condition_frames=[0]) -> "
    "(Tensor latents, Tensor velocity_mask)",
    check_frames,
    eager=prepare_latents_reference,
    triton="prepare_latents:prepare_latents",
    example=_example,
)
register(
    "prepare_latents.mask(Tensor cond_latent, Tensor noise, Tensor condition_mask) -> "
    "(Tensor latents, Tensor velocity_mask)",
    check_mask,
    eager=prepare_latents_mask_reference,
    triton="prepare_latents:prepare_latents_mask",
    example=_mask_example,
)
register(
    "prepare_latents_(Tensor cond_latent, Tensor(a!) noise, int[] condition_frames=[0]) -> "
    "Tensor velocity_mask",
    check_frames_in_place,
    eager=prepare_latents_in_place_reference,
    triton="prepare_latents:prepare_latents_",
    example=_example,
)


@torch.library.register_fake("cosmos3::prepare_latents")
def _(
    cond_latent: Tensor, noise: Tensor, condition_frames: Sequence[int] = (0,)
) -> tuple[Tensor, Tensor]:
    check_frames(cond_latent, noise, condition_frames)
    return noise.new_empty(noise.shape), noise.new_empty(1, 1, noise.shape[2], 1, 1)


@torch.library.register_fake("cosmos3::prepare_latents.mask")
def _(cond_latent: Tensor, noise: Tensor, condition_mask: Tensor) -> tuple[Tensor, Tensor]:
    check_mask(cond_latent, noise, condition_mask)
    return noise.new_empty(noise.shape), noise.new_empty(condition_mask.shape)


@torch.library.register_fake("cosmos3::prepare_latents_")
def _(cond_latent: Tensor, noise: Tensor, condition_frames: Sequence[int] = (0,)) -> Tensor:
    check_frames_in_place(cond_latent, noise, condition_frames)
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


register_autograd("prepare_latents", _frames_backward, _frames_setup, prepare_latents_reference)


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


register_autograd(
    "prepare_latents.mask", _mask_backward, _mask_setup, prepare_latents_mask_reference
)


def _count_the_write(
    keyset: Any, cond_latent: Tensor, noise: Tensor, condition_frames: Sequence[int] = (0,)
) -> Tensor:
    """Counts as every in-place op does, also in inference mode, where no Autograd kernel runs."""
    if noise.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            "prepare_latents_: noise must not be an inference tensor outside torch.inference_mode; "
            "clone it"
        )
    arguments = cond_latent, noise, condition_frames
    velocity_mask = redispatch(REGISTERED["prepare_latents_"], keyset, *arguments)
    if not noise.is_inference():
        torch.autograd.graph.increment_version(noise)
    return velocity_mask


def _write_negated(
    _: Any, cond_latent: Tensor, noise: Tensor, condition_frames: Sequence[int] = (0,)
) -> Tensor:
    """Serves views that torch negates when they are read, such as `z.conj().imag`."""
    cond_latent = cond_latent.resolve_neg()
    if not noise.is_neg():
        return torch.ops.cosmos3.prepare_latents_(cond_latent, noise, condition_frames)
    beneath = beneath_negation(noise)
    if beneath is not None:
        # Writing -x into the memory beneath the view.
        return torch.ops.cosmos3.prepare_latents_(-cond_latent, beneath, condition_frames)
    written = noise.resolve_neg()
    velocity_mask = torch.ops.cosmos3.prepare_latents_(cond_latent, written, condition_frames)
    noise.copy_(written)
    return velocity_mask


def _resolve_conjugates(
    _: Any, cond_latent: Tensor, noise: Tensor, condition_frames: Sequence[int] = (0,)
) -> Tensor:
    # Only complex tensors get here, which the op then refuses.
    arguments = cond_latent.resolve_conj(), noise.resolve_conj(), condition_frames
    return torch.ops.cosmos3.prepare_latents_(*arguments)


refuse_autograd(
    "prepare_latents_",
    "cond_latent and noise must not require a gradient; "
    "use prepare_latents, which is differentiable",
)
register_kernel("prepare_latents_", _count_the_write, "ADInplaceOrView")
register_kernel("prepare_latents_", _write_negated, "Negative")
register_kernel("prepare_latents_", _resolve_conjugates, "Conjugate")
