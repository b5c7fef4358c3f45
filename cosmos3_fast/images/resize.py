"""RGB pictures to bytes of one size: resized until they cover it, and cropped at the centre."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from cosmos3_fast import ops
from cosmos3_fast.images.decode import Rgb
from cosmos3_fast.images.pillow import pixels_of
from cosmos3_fast.ops.resize_crop import LARGEST_SIZE, vertical_first_in_pillow

# Bytes of a picture that leave Pillow at a time: memory for so few is not mapped anew each time,
# and is in a cache when it is read.
_BAND = 1 << 22


def resize_frames(
    frames: Iterable[Rgb],
    height: int,
    width: int,
    device: torch.device | str | None = None,
) -> Tensor:
    """Frames of any sizes as uint8 [T, height, width, 3], each as by `resize_to_cover`."""
    resized = [resize_to_cover(frame, height, width, device) for frame in frames]
    return resized[0][None] if len(resized) == 1 else torch.stack(resized)


def covering(
    rows: int, columns: int, height: int, width: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """How a picture of `rows` x `columns` comes to cover `height` x `width`.

    Returns:
        Its resized height and width, and the top and left of the crop at its centre.
    """
    scale = max(width / columns, height / rows)
    size = math.ceil(scale * rows), math.ceil(scale * columns)
    return size, ((size[0] - height) // 2, (size[1] - width) // 2)


def resize_to_cover(
    image: Rgb,
    height: int,
    width: int,
    device: torch.device | str | None = None,
) -> Tensor:
    """An RGB image, resized with Lanczos to cover `width` x `height` and cropped at its centre.

    Each side of the resized image is rounded up, as in SGLang's `Cosmos3ImagePreprocessStage`.

    Args:
        image: a PIL image, or uint8 [H,W,3].
        device: where it is resized if it can be there; None: on the CPU.

    Returns:
        uint8 [height,width,3], on `device`.

    Raises:
        ValueError: Pillow, which counts in 32 bits, knows no image of the size to crop from.
    """
    device = torch.device("cpu" if device is None else device)
    if isinstance(image, Tensor):
        rows, columns, _ = image.shape
    else:
        columns, rows = image.size
    size, (top, left) = covering(rows, columns, height, width)
    if max(size) > LARGEST_SIZE:
        raise ValueError(
            f"image must be less elongated to cover {width}x{height}, got {columns}x{rows}"
        )
    crop = (top, left, height, width)
    there = device.type == "cpu" or ops.default_backend(device, "resize_crop") == "cpp"
    where = device if there else torch.device("cpu")
    if isinstance(image, Tensor) and image.shape == (height, width, 3):
        return image.to(device, copy=True).contiguous()
    if isinstance(image, Tensor):
        return ops.resize_crop(image.to(where), size, crop).to(device)
    if where.type == "cpu" and (whole := pixels_of(image)) is not None:
        return ops.resize_crop(whole, size, crop).to(device)
    if where.type == "cpu" and not vertical_first_in_pillow((rows, columns), size):
        return _resized_in_bands(image, size, crop).to(device)
    pixels = torch.empty(rows, columns, 3, dtype=torch.uint8, device=where)
    for y, band in _bands(image, 0, rows):
        pixels[y : y + band.shape[0]] = band
    return ops.resize_crop(pixels, size, crop).to(device)


def _resized_in_bands(
    image: Image, size: tuple[int, int], crop: tuple[int, int, int, int]
) -> Tensor:
    """`resize_crop` of a picture: its horizontal pass, a band at a time, and its vertical."""
    top, left, height, width = crop
    scale = image.height / size[0]
    # Lanczos reaches 3 rows, or 3 of the result's where those are larger; and one for rounding.
    reach = 3 * max(scale, 1.0) + 1
    first = max(math.floor((top + 0.5) * scale - reach), 0)
    last = min(math.ceil((top + height - 0.5) * scale + reach), image.height)
    # Rows before the first and after the last are never touched, nor is their memory.
    narrow = torch.empty(image.height, width, 3, dtype=torch.uint8, device="cpu")
    for y, band in _bands(image, first, last):
        count = band.shape[0]
        narrow[y : y + count] = ops.resize_crop(band, (count, size[1]), (0, left, count, width))
    return ops.resize_crop(narrow, (size[0], width), (top, 0, height, width))


def _bands(image: Image, first: int, last: int) -> Iterator[tuple[int, Tensor]]:
    """Rows first … last - 1 of a picture: the first of some, and their pixels, uint8 [n,W,3]."""
    rows = _BAND // (4 * image.width) + 1
    for y in range(first, last, rows):
        band = image.crop((0, y, image.width, min(y + rows, last)))
        pixels = pixels_of(band)
        yield y, torch.from_numpy(np.array(band)) if pixels is None else pixels
