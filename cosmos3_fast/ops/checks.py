"""Argument checks that several ops share; an op's own stand in its file.

They serve the fake kernels and the Python backends. The wording and the order are those of the
compiled kernels (`csrc/checks.h` and each op's source); `tests/ops/test_errors.py` compares the two
fault by fault. Conditions on sizes go through `torch._check`, so that they also hold for symbolic
shapes.
"""

from __future__ import annotations

import torch
from torch import Tensor

# What models take latents in.
LATENT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What the ops, and so the networks, compute in.
FLOAT_DTYPES = (*LATENT_DTYPES, torch.float64)
FLOAT_NAMES = "float32, bfloat16, float16 or float64"


def check_device(
    op: str, argument: str, tensor: Tensor, other_argument: str, other: Tensor
) -> None:
    """Raises RuntimeError unless `tensor` is on the device of `other`."""
    torch._check(
        tensor.device == other.device,
        lambda: (
            f"{op}: {argument} must be on the device of {other_argument} ({other.device}), "
            f"got {tensor.device}"
        ),
    )


def check_rank(op: str, argument: str, tensor: Tensor, rank: int, shape: str) -> None:
    """Raises RuntimeError unless `tensor` has `rank` dimensions, which `shape` names."""
    torch._check(
        tensor.dim() == rank,
        lambda: f"{op}: {argument} must have shape {shape}, got {list(tensor.shape)}",
    )


def check_dtype(op: str, argument: str, dtype: torch.dtype) -> None:
    """Raises RuntimeError unless `dtype` is one of `FLOAT_DTYPES`."""
    torch._check(
        dtype in FLOAT_DTYPES,
        lambda: f"{op}: {argument} must be {FLOAT_NAMES}, got {dtype}",
    )


def check_patch_size(op: str, patch_size: int) -> None:
    """Raises RuntimeError unless `patch_size` is one that an image's patches may have."""
    # Above 2^15 the square would not fit every integer type; no image has such patches.
    torch._check(
        1 <= patch_size <= 1 << 15,
        lambda: f"{op}: patch_size must be in 1 … 32768, got {patch_size}",
    )


def check_float32(op: str, argument: str, tensor: Tensor) -> None:
    """Raises RuntimeError unless `tensor` is float32."""
    torch._check(
        tensor.dtype == torch.float32,
        lambda: f"{op}: {argument} must be float32, got {tensor.dtype}",
    )
