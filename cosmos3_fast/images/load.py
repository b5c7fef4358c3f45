"""Images and clips to pixel tensors, by the convention of SGLang's Cosmos3 stages.

Resize and crop follow ``Cosmos3ImagePreprocessStage``. It writes the normalisation of images as
``2 * (x / 255) - 1`` and that of clips as ``x / 127.5 - 1``; halving the divisor doubles the
quotient exactly, so the two agree in every bit.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, TypeAlias

import torch

from cosmos3_fast import ops
from cosmos3_fast.arguments import positive_int, quoted
from cosmos3_fast.images.clips import is_animation, read_file
from cosmos3_fast.images.decode import Color, parse_color, source_name, to_rgb
from cosmos3_fast.images.pillow import pixels_of
from cosmos3_fast.ops.resize_crop import LARGEST_SIZE, vertical_first_in_pillow

if TYPE_CHECKING:
    import os

    import numpy as np
    from PIL.Image import Image

ImageLike: TypeAlias = (
    "str | os.PathLike[str] | bytes | BinaryIO | Image | np.ndarray | torch.Tensor"
)
ClipLike: TypeAlias = "Sequence[ImageLike] | np.ndarray | torch.Tensor"
Keep = Literal["first", "last"]

# How far rounding and interpolation may carry a float picture out of [-1, 1]; clipped.
_OVERSHOOT = 1e-3
# Bytes of a picture that leave Pillow at a time: memory for so few is not mapped anew each time,
# and is in a cache when it is read.
_BAND = 1 << 22


def load_pixels(
    image_or_clip: ImageLike | ClipLike,
    height: int,
    width: int,
    *,
    max_frames: int | None = None,
    keep: Keep = "first",
    background: Color | None = None,
) -> torch.Tensor:
    """Load an image or a clip as pixels in [-1, 1].

    Args:
        image_or_clip: One of

            - a path to an image file, its bytes or an open binary file, or a PIL image of any mode:
              turned upright by its EXIF orientation and converted to RGB as SGLang and diffusers
              do. 16-bit pictures and float pictures in [0, 1], which the engines saturate, are
              scaled to 8 bits, with a warning;
            - a file with several frames (animated GIF, WebP, APNG or AVIF, a TIFF whose pages are
              of one size, or with PyAV installed a video): a clip;
            - a uint8 array or tensor [H,W], [H,W,1], [H,W,3] or [H,W,4];
            - a clip: a list or tuple of images as above, or a uint8 array or tensor [T,H,W,3];
            - a float tensor or array in [-1, 1], [3,H,W], [B,3,H,W] or [B,3,T,H,W], already of the
              size asked for; it is cast to float32, and values up to 1e-3 outside are clipped.
        height, width: Size of the result. Everything but float tensors is resized with Lanczos,
            keeping its aspect ratio, until it covers the size, and cropped at the centre.
        max_frames: Of a clip, load so many frames only; the others are not read where the kind of
            file allows.
        keep: Which of them: the "first" or the "last".
        background: The color to paint behind transparent pixels: a name, "#rrggbb" or three
            integers in [0, 255]. None: alpha is dropped, as in the engines, with a warning where
            pixels are transparent.

    Returns:
        float32, contiguous: [B,3,height,width] for an image, [B,3,T,height,width] for a clip, with
        B = 1 unless a float tensor brought its own. On the device of a tensor that was given (and
        perhaps its memory), on the CPU otherwise.

    Raises:
        FileNotFoundError: The path does not exist.
        TypeError: Not an image or clip of one of the kinds above.
        ValueError: A file that is no image or is truncated, a URL, a shape, size or dtype not
            listed above, values that are not finite or out of range.
    """
    frames = load_frames(
        image_or_clip, height, width, max_frames=max_frames, keep=keep, background=background
    )
    return normalize_frames(frames) if frames.dtype == torch.uint8 else frames


def load_frames(
    image_or_clip: ImageLike | ClipLike,
    height: int,
    width: int,
    *,
    max_frames: int | None = None,
    keep: Keep = "first",
    background: Color | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """As `load_pixels`, but bytes stay bytes: a quarter of the size on the way to a device.

    Args:
        device: Where the bytes are resized, where it has a kernel for that, and returned. None: on
            the device of a tensor that was given, on the CPU otherwise. Float tensors stay where
            they are.

    Returns:
        uint8, contiguous: [1,height,width,3] for an image, [1,T,height,width,3] for a clip. Float
        tensors as from `load_pixels`.
    """
    height, width = positive_int("height", height), positive_int("width", width)
    if max_frames is not None:
        max_frames = positive_int("max_frames", max_frames)
    if keep not in ("first", "last"):
        raise ValueError(f"keep must be 'first' or 'last', got {quoted(keep)}")
    if background is not None:
        background = parse_color(background)
    kept = slice(max_frames) if keep == "first" else slice(-(max_frames or 0), None)

    if isinstance(image_or_clip, (list, tuple)):
        return _clip_frames(image_or_clip[kept], height, width, background, device)
    array = _as_tensor(image_or_clip)
    if array is None:
        images, is_clip = read_file(
            image_or_clip, "image", max_frames=max_frames, keep=keep, background=background
        )
        if is_clip:
            return _clip_frames(images, height, width, background, device)
        return resize_to_cover(images[0], height, width, device)[None]
    if array.is_floating_point():
        return _float_pixels(array, height, width, kept)
    if array.dtype != torch.uint8:
        raise ValueError(f"image must be uint8 or floating point, got {array.dtype}")
    device = array.device if device is None else device
    if array.ndim == 4:
        return _clip_frames(list(array[kept]), height, width, background, device)
    return resize_to_cover(_from_uint8(array, "image", background), height, width, device)[None]


def normalize_frames(frames: torch.Tensor) -> torch.Tensor:
    """Bytes as from `load_frames` to what `load_pixels` makes of them: ``x / 127.5 - 1``."""
    # By a tensor on the device: torch multiplies by the reciprocal of a plain number there.
    divisor = torch.tensor(127.5, dtype=torch.float32, device=frames.device)
    return (frames.to(torch.float32).movedim(-1, 1).contiguous() / divisor).sub_(1.0)


def _as_tensor(value: Any) -> torch.Tensor | None:
    """The tensor behind a tensor or numpy array, None for anything else."""
    if isinstance(value, torch.Tensor):
        return value
    import numpy as np

    if not isinstance(value, np.ndarray):
        return None
    native = value.dtype.newbyteorder("=")
    if native not in (np.uint8, np.float16, np.float32, np.float64):
        raise ValueError(f"image must be uint8 or floating point, got an array of {value.dtype}")
    if native == np.uint8 and value.flags.writeable and min(value.strides, default=0) >= 0:
        return torch.from_numpy(value)  # bytes are only read
    # A copy, because torch takes no read-only or byte-swapped memory and no negative strides.
    return torch.from_numpy(np.array(value, dtype=native, order="C", copy=True))


def _from_uint8(array: torch.Tensor, name: str, background: Color | None) -> Image | torch.Tensor:
    """The array where it is RGB already, else a picture made of it."""
    from PIL.Image import fromarray

    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise ValueError(
            f"{name} of dtype uint8 must have shape [H,W], [H,W,1], [H,W,3] or [H,W,4] "
            f"(a clip [T,H,W,3]), got {list(array.shape)}"
        )
    if 0 in array.shape:
        raise ValueError(f"{name} is empty: shape {list(array.shape)}")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim == 3 and array.shape[2] == 3:
        return array.detach()
    return to_rgb(fromarray(array.detach().cpu().contiguous().numpy()), name, background)


def _clip_frames(
    frames: Sequence[Any],
    height: int,
    width: int,
    background: Color | None,
    device: torch.device | str | None,
) -> torch.Tensor:
    if not frames:
        raise ValueError("clip is empty: it needs at least one frame")
    size = (1, len(frames), height, width, 3)
    clip = torch.empty(size, dtype=torch.uint8, device="cpu" if device is None else device)
    for i, frame in enumerate(frames):
        array = _as_tensor(frame)
        if array is not None and array.dtype != torch.uint8:
            raise ValueError(
                f"clip frame {i} is a {array.dtype} array: frames in a list must be paths, PIL "
                "images or uint8 [H,W,3] arrays; give a float clip as one [B,3,T,H,W] tensor"
            )
        name = f"clip frame {i}"
        image = (
            _one_image(frame, name, background)
            if array is None
            else _from_uint8(array, name, background)
        )
        clip[0, i] = resize_to_cover(image, height, width, clip.device)
    return clip


def _one_image(frame: Any, name: str, background: Color | None) -> Image:
    # Pillow's iterators over an animation give the same object each time, showing its last frame.
    images, is_clip = (
        (None, True)
        if is_animation(frame)
        else read_file(frame, name, max_frames=1, background=background)
    )
    if is_clip or images is None:
        raise ValueError(
            f"{source_name(frame, name)} is an animation: give it alone, or copies of its frames"
        )
    return images[0]


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
    image: Image | torch.Tensor,
    height: int,
    width: int,
    device: torch.device | str | None = None,
) -> torch.Tensor:
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
    if isinstance(image, torch.Tensor):
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
    if isinstance(image, torch.Tensor):
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
) -> torch.Tensor:
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


def _bands(image: Image, first: int, last: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Rows first … last - 1 of a picture: the first of some, and their pixels, uint8 [n,W,3]."""
    import numpy as np

    rows = _BAND // (4 * image.width) + 1
    for y in range(first, last, rows):
        band = image.crop((0, y, image.width, min(y + rows, last)))
        pixels = pixels_of(band)
        yield y, torch.from_numpy(np.array(band)) if pixels is None else pixels


def _float_pixels(array: torch.Tensor, height: int, width: int, kept: slice) -> torch.Tensor:
    shape = list(array.shape)
    if array.ndim not in (3, 4, 5) or array.shape[-3 if array.ndim == 3 else 1] != 3:
        raise ValueError(
            f"image of dtype {array.dtype} must have shape [3,H,W], [B,3,H,W] or [B,3,T,H,W], "
            f"got {shape}"
        )
    if 0 in shape:
        raise ValueError(f"image is empty: shape {shape}")
    if shape[-2:] != [height, width]:
        raise ValueError(
            f"image of dtype {array.dtype} is not resized: its height and width must be "
            f"{height}x{width}, got {shape[-2]}x{shape[-1]}"
        )
    pixels = array[None] if array.ndim == 3 else array
    if pixels.ndim == 5:
        pixels = pixels[:, :, kept]
    pixels = pixels.detach().to(torch.float32).contiguous()
    low, high = (float(value) for value in pixels.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"image of dtype {array.dtype} holds NaN or infinite values")
    if low < -1.0 - _OVERSHOOT or high > 1.0 + _OVERSHOOT:
        hint = "; [0,255] must be given as uint8" if low >= 0.0 and high > 2.0 else ""
        raise ValueError(
            f"image of dtype {array.dtype} must be in [-1,1], "
            f"got values in [{low:g}, {high:g}]{hint}"
        )
    if low >= 0.0:
        warnings.warn(
            f"image of dtype {array.dtype} has no negative value, and [-1,1] is expected: scale "
            "[0,1] by 2x - 1",
            stacklevel=4,
        )
    return pixels.clamp(-1.0, 1.0) if low < -1.0 or high > 1.0 else pixels
