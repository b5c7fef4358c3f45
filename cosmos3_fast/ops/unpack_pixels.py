"""`cosmos3::unpack_pixels`: what the last convolution writes to an image in floats or bytes.

Kernels: `csrc/cpu/unpack_pixels.cpp`, `csrc/cuda/unpack_pixels.cu` and
`ops/triton/unpack_pixels.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cosmos3_fast.ops.checks import check_dtype, check_patch_size, check_rank
from cosmos3_fast.ops.registry import call, example_tensor, register, register_autograd, select


def unpack_pixels(
    x: Tensor, patch_size: int, as_bytes: bool = False, *, backend: str | None = None
) -> Tensor:
    """Puts patches together to an image that is clamped to [-1, 1], in one pass.

    Args:
        x: [B, 3·p², h, w] float32, bfloat16, float16 or float64, channels ordered as
            `pixel_shuffle` takes them; any strides, read fastest in channels-last memory.
        patch_size: p, in 1 … 32768.
        as_bytes: give bytes instead of `x`'s dtype. They have no gradient.
        backend: as in `prepare_latents`.

    Returns:
        [B, 3, h·p, w·p] in `x`'s dtype, contiguous, where NaN stays NaN; or uint8
        [B, h·p, w·p, 3]: `round(255 (x / 2 + 1/2))` computed in float32 with halves rounded to
        even, 0 for NaN.

    Raises:
        RuntimeError, ValueError, BackendUnavailableError: as `prepare_latents`.
    """
    if backend is None:
        return call("unpack_pixels", x, patch_size, as_bytes)
    return select("unpack_pixels", backend, x.device)(x, patch_size, as_bytes)


def unpack_pixels_reference(x: Tensor, patch_size: int, as_bytes: bool = False) -> Tensor:
    """Does `pixel_shuffle`, a clamp to [-1, 1] and, for bytes, `round(255 (x / 2 + 1/2))`."""
    # As pixel_shuffle, which leaves tensors without elements as they are.
    batch, _, rows, columns = x.shape
    p = patch_size
    cells = x.reshape(batch, 3, p, p, rows, columns).permute(0, 1, 4, 2, 5, 3)
    pixels = cells.reshape(batch, 3, rows * p, columns * p).clamp(-1, 1)
    if not as_bytes:
        return pixels.contiguous()
    pixels = pixels.to(torch.float32).nan_to_num(nan=-1.0)
    return (255.0 * (pixels * 0.5 + 0.5)).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def check_patches(x: Tensor, patch_size: int, as_bytes: bool = False) -> None:
    """Raises RuntimeError unless the arguments of `unpack_pixels` fit each other."""
    op = "unpack_pixels"
    check_rank(op, "x", x, 4, "[B, 3·p², h, w]")
    check_dtype(op, "x", x.dtype)
    check_patch_size(op, patch_size)
    torch._check(
        x.shape[1] == 3 * patch_size**2,
        lambda: (
            f"{op}: x must have 3·patch_size² = {3 * patch_size**2} channels, got {list(x.shape)}"
        ),
    )


register(
    "unpack_pixels(Tensor x, int patch_size, bool as_bytes=False) -> Tensor",
    check_patches,
    eager=unpack_pixels_reference,
    triton="unpack_pixels:unpack_pixels",
    example=lambda device: (2 * example_tensor(device, 1, 12, 2, 3), 2),
)


@torch.library.register_fake("cosmos3::unpack_pixels")
def _(x: Tensor, patch_size: int, as_bytes: bool = False) -> Tensor:
    check_patches(x, patch_size, as_bytes)
    batch, _, rows, columns = x.shape
    height, width = rows * patch_size, columns * patch_size
    if as_bytes:
        return x.new_empty(batch, height, width, 3, dtype=torch.uint8)
    return x.new_empty(batch, 3, height, width)


def _unpack_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.patch_size, as_bytes = inputs
    if as_bytes:
        ctx.mark_non_differentiable(output)
    else:
        ctx.save_for_backward(x)


def _unpack_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    # As torch.clamp: the gradient passes at the limits and not beyond them.
    (x,) = ctx.saved_tensors
    gradient = torch.nn.functional.pixel_unshuffle(gradient, ctx.patch_size)
    return gradient * ((x >= -1) & (x <= 1)), None, None


register_autograd("unpack_pixels", _unpack_backward, _unpack_setup, unpack_pixels_reference)
