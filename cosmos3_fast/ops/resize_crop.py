"""`cosmos3::resize_crop`: the crop of a resized picture, every byte as Pillow has it.

Kernels: `csrc/cpu/resize_crop.cpp` and `csrc/cuda/resize_crop.cu`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from cosmos3_fast.ops.registry import register, select

FILTERS = ("lanczos", "bicubic", "bilinear")
# Pillow keeps an image's extent in float32, which holds integers up to this.
LARGEST_SIDE = 1 << 24
LARGEST_SIZE = (1 << 31) - 1


def resize_crop(
    image: Tensor,
    size: Sequence[int],
    crop: Sequence[int],
    filter: str = "lanczos",
    vertical_first: bool | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Resizes an image as far as a part of the result takes it, at the cost of that part.

    The bytes are those of Pillow's `Image.resize((width, height), filter).crop(box)`: weights of 22
    fractional bits, two passes, rounded and clamped to bytes after each.

    Args:
        image: uint8 [H, W, 3] or [B, H, W, 3], H and W in 1 … 2^24; any strides, read fastest
            where pixels follow each other.
        size: height and width of the whole resized image, in 1 … 2^31 - 1.
        crop: top, left, height and width of the part wanted, inside `size`, not empty.
        filter: "lanczos", "bicubic" or "bilinear", widened where the image shrinks.
        vertical_first: whether columns are resized before rows are, which rounds differently. None:
            as the installed Pillow does (`vertical_first_in_pillow`).
        backend: as in `prepare_latents`.

    Returns:
        uint8 [height, width, 3] or [B, height, width, 3] of `crop`, contiguous, on the image's
        device.

    Raises:
        RuntimeError, ValueError, BackendUnavailableError: as `prepare_latents`.
    """
    if vertical_first is None:
        vertical_first = vertical_first_in_pillow(image.shape[-3:-1], size)
    return select("resize_crop", backend, image.device)(image, size, crop, filter, vertical_first)


def vertical_first_in_pillow(image_size: Sequence[int], size: Sequence[int]) -> bool:
    """Tells whether the installed Pillow makes the vertical pass of a resize first.

    Args:
        image_size, size: height and width before and after.
    """
    if len(image_size) != 2 or len(size) != 2:
        return False  # the op says what is wrong
    (rows, columns), (height, width) = image_size, size
    if _pillow_release() >= (13, 0):
        return rows > height and rows - height > 2 * (columns - width)
    if _pillow_release() >= (12, 2):
        return rows > height and rows > 100 * columns
    return False


@functools.cache
def _pillow_release() -> tuple[int, int]:
    import PIL

    major, minor = PIL.__version__.split(".")[:2]
    return int(major), int(minor)


def resize_crop_reference(
    image: Tensor,
    size: Sequence[int],
    crop: Sequence[int],
    filter: str,
    vertical_first: bool = False,
) -> Tensor:
    """Runs Pillow's `resize` of one direction after the other, then its `crop`."""
    import numpy as np
    from PIL import Image

    (height, width), (top, left, rows, columns) = size, crop
    resampling = Image.Resampling[filter.upper()]
    batch = image.shape[:-3]
    result = torch.empty((*batch, rows, columns, 3), dtype=torch.uint8)
    pictures = image.cpu().reshape(-1, *image.shape[-3:])
    for picture, out in zip(pictures, result.view(-1, rows, columns, 3), strict=True):
        whole = Image.fromarray(picture.contiguous().numpy())
        # One direction at a time: in which order Pillow takes both depends on its release.
        between = (whole.width, height) if vertical_first else (width, whole.height)
        resized = whole.resize(between, resampling).resize((width, height), resampling)
        out.copy_(torch.from_numpy(np.array(resized.crop((left, top, left + columns, top + rows)))))
    return result.to(image.device)


def check_resize_crop(
    image: Tensor,
    size: Sequence[int],
    crop: Sequence[int],
    filter: str,
    vertical_first: bool = False,
) -> None:
    """Raises RuntimeError unless the arguments of `resize_crop` fit each other."""
    op = "resize_crop"
    torch._check(
        image.dtype == torch.uint8, lambda: f"{op}: image must be uint8, got {image.dtype}"
    )
    torch._check(
        image.dim() in (3, 4) and image.shape[-1] == 3,
        lambda: f"{op}: image must have shape [H, W, 3] or [B, H, W, 3], got {list(image.shape)}",
    )
    for dim in (-3, -2):
        torch._check(
            1 <= image.shape[dim] <= LARGEST_SIDE,
            lambda: (
                f"{op}: image must have height and width in 1 … {LARGEST_SIDE}, "
                f"got {list(image.shape)}"
            ),
        )
    torch._check(
        len(size) == 2 and all(1 <= each <= LARGEST_SIZE for each in size),
        lambda: f"{op}: size must be [height, width] in 1 … {LARGEST_SIZE}, got {list(size)}",
    )
    torch._check(
        len(crop) == 4
        and all(crop[i] >= 0 and 1 <= crop[i + 2] <= size[i] - crop[i] for i in (0, 1)),
        lambda: (
            f"{op}: crop must be [top, left, height, width] inside size {list(size)}, "
            f"got {list(crop)}"
        ),
    )
    torch._check(
        filter in FILTERS,
        lambda: f"{op}: filter must be 'lanczos', 'bicubic' or 'bilinear', got {filter!r}",
    )


register(
    "resize_crop(Tensor image, int[2] size, int[4] crop, str filter, bool vertical_first=False) "
    "-> Tensor",
    check_resize_crop,
    eager=resize_crop_reference,
    example=lambda device: (
        torch.arange(5 * 6 * 3, dtype=torch.uint8, device=device).reshape(5, 6, 3),
        (4, 8),
        (1, 2, 3, 5),
        "lanczos",
    ),
)


@torch.library.register_fake("cosmos3::resize_crop")
def _(
    image: Tensor,
    size: Sequence[int],
    crop: Sequence[int],
    filter: str,
    vertical_first: bool = False,
) -> Tensor:
    check_resize_crop(image, size, crop, filter, vertical_first)
    return image.new_empty(*image.shape[:-3], crop[2], crop[3], 3)
