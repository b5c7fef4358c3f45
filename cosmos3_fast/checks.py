"""Argument checks of the ops, for the fake kernels and the Python backends.

The wording and the order are those of `csrc/checks.h`; `tests/test_op_errors.py` compares the two
fault by fault. Conditions on sizes go through `torch._check`, so that they also hold for symbolic
shapes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _check_latent(op: str, argument: str, tensor: Tensor) -> None:
    torch._check(
        tensor.dim() == 5,
        lambda: (
            f"{op}: {argument} must have 5 dimensions [B, C, T, H, W], "
            f"got shape {list(tensor.shape)}"
        ),
    )
    torch._check(
        tensor.dtype in SUPPORTED_DTYPES,
        lambda: (
            f"{op}: {argument} must be float32, bfloat16, float16 or float64, got {tensor.dtype}"
        ),
    )


def _check_device(op: str, argument: str, tensor: Tensor, noise: Tensor) -> None:
    torch._check(
        tensor.device == noise.device,
        lambda: (
            f"{op}: {argument} must be on the device of noise ({noise.device}), got {tensor.device}"
        ),
    )


def _check_pair(op: str, cond_latent: Tensor, noise: Tensor) -> None:
    _check_latent(op, "noise", noise)
    _check_latent(op, "cond_latent", cond_latent)
    _check_device(op, "cond_latent", cond_latent, noise)
    for dim in (1, 3, 4):
        torch._check(
            cond_latent.shape[dim] == noise.shape[dim],
            lambda: (
                f"{op}: cond_latent must agree with noise in C, H and W; got cond_latent "
                f"{list(cond_latent.shape)} for noise {list(noise.shape)}"
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
    _check_device(op, "condition_mask", condition_mask, noise)
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
    """As `check_frames`, and `noise` must not hold one element at two indices (expanded)."""
    op = "prepare_latents_"
    check_frames(cond_latent, noise, condition_frames, op)
    for dim, (size, stride) in enumerate(zip(noise.shape, noise.stride(), strict=True)):
        torch._check(
            noise.numel() == 0 or size <= 1 or stride != 0,
            lambda: (
                f"{op}: noise must not be expanded: dimension {dim} has size {size} and stride 0"  # noqa: B023
            ),
        )
