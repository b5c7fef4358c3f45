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
    _check_dtype(op, argument, tensor.dtype)


def _check_device(
    op: str, argument: str, tensor: Tensor, other: Tensor, other_argument: str = "noise"
) -> None:
    torch._check(
        tensor.device == other.device,
        lambda: (
            f"{op}: {argument} must be on the device of {other_argument} ({other.device}), "
            f"got {tensor.device}"
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


def _check_rank(op: str, argument: str, tensor: Tensor, rank: int, shape: str) -> None:
    torch._check(
        tensor.dim() == rank,
        lambda: f"{op}: {argument} must have shape {shape}, got {list(tensor.shape)}",
    )


def _check_dtype(op: str, argument: str, dtype: torch.dtype) -> None:
    torch._check(
        dtype in SUPPORTED_DTYPES,
        lambda: f"{op}: {argument} must be float32, bfloat16, float16 or float64, got {dtype}",
    )


def _check_float32(op: str, argument: str, tensor: Tensor) -> None:
    torch._check(
        tensor.dtype == torch.float32,
        lambda: f"{op}: {argument} must be float32, got {tensor.dtype}",
    )


def check_norm(x: Tensor, weight: Tensor | None, silu: bool = True) -> None:
    """Raises RuntimeError unless the arguments of `rms_norm_silu` fit each other."""
    op = "rms_norm_silu"
    _check_rank(op, "x", x, 4, "[B, C, H, W]")
    _check_dtype(op, "x", x.dtype)
    if weight is not None:
        _check_rank(op, "weight", weight, 1, "[C]")
        _check_dtype(op, "weight", weight.dtype)
        _check_device(op, "weight", weight, x, "x")
        torch._check(
            weight.shape[0] == x.shape[1],
            lambda: (
                f"{op}: weight must have the C = {x.shape[1]} elements of x, got {weight.shape[0]}"
            ),
        )


def check_pixels(pixels: Tensor, patch_size: int, dtype: torch.dtype) -> None:
    """Raises RuntimeError unless the arguments of `pack_pixels` fit each other."""
    op = "pack_pixels"
    is_bytes = pixels.dtype == torch.uint8
    _check_rank(op, "pixels", pixels, 4, "[B, 3, H, W], or [B, H, W, 3] in uint8")
    torch._check(
        is_bytes or pixels.dtype in SUPPORTED_DTYPES,
        lambda: (
            f"{op}: pixels must be uint8, float32, bfloat16, float16 or float64, got {pixels.dtype}"
        ),
    )
    torch._check(
        pixels.shape[3 if is_bytes else 1] == 3,
        lambda: (
            f"{op}: pixels must have 3 colours in shape [B, 3, H, W], or [B, H, W, 3] in uint8, "
            f"got {list(pixels.shape)}"
        ),
    )
    _check_dtype(op, "dtype", dtype)
    torch._check(patch_size >= 1, lambda: f"{op}: patch_size must be at least 1, got {patch_size}")
    for dim in (1, 2) if is_bytes else (2, 3):
        torch._check(
            pixels.shape[dim] % patch_size == 0,
            lambda: (
                f"{op}: pixels must have height and width divisible by patch_size = {patch_size}, "
                f"got {list(pixels.shape)}"
            ),
        )


def check_winograd_weight(weight: Tensor) -> None:
    """Raises RuntimeError unless `weight` can be packed for `winograd_conv3x3`."""
    op = "winograd_pack"
    _check_rank(op, "weight", weight, 4, "[Cout, Cin, 3, 3]")
    _check_float32(op, "weight", weight)
    out_channels, in_channels, height, width = weight.shape
    torch._check(
        out_channels % 32 == 0 and in_channels % 16 == 0 and height == 3 and width == 3,
        lambda: (
            f"{op}: weight must have shape [Cout, Cin, 3, 3] with Cout a multiple of 32 and Cin of "
            f"16, got {list(weight.shape)}"
        ),
    )


def check_winograd(
    x: Tensor, packed_weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> None:
    """Raises RuntimeError unless the arguments of `winograd_conv3x3` fit each other."""
    op = "winograd_conv3x3"
    _check_rank(op, "x", x, 4, "[B, Cin, H, W]")
    _check_float32(op, "x", x)
    _check_rank(op, "packed_weight", packed_weight, 4, "[36, Cout/32, Cin, 32]")
    _check_float32(op, "packed_weight", packed_weight)
    _check_device(op, "packed_weight", packed_weight, x, "x")
    points, panels, in_channels, lanes = packed_weight.shape
    torch._check(
        points == 36 and lanes == 32,
        lambda: _packed_message(op, x, packed_weight),
    )
    torch._check(in_channels == x.shape[1], lambda: _packed_message(op, x, packed_weight))
    wanted = [x.shape[0], panels * 32, x.shape[2], x.shape[3]]
    for argument, tensor, shape in (("bias", bias, wanted[1:2]), ("residual", residual, wanted)):
        if tensor is not None:
            _check_float32(op, argument, tensor)
            _check_device(op, argument, tensor, x, "x")
            torch._check(
                list(tensor.shape) == shape,
                lambda: f"{op}: {argument} must have shape {shape}, got {list(tensor.shape)}",  # noqa: B023
            )


def _packed_message(op: str, x: Tensor, packed_weight: Tensor) -> str:
    return (
        f"{op}: packed_weight must have shape [36, Cout/32, Cin, 32] for x {list(x.shape)}, "
        f"got {list(packed_weight.shape)}"
    )
