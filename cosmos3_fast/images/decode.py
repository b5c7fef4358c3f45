"""One picture of any kind as an upright 8-bit RGB image, or a message that says why not.

The steps are those of SGLang's `load_image` and diffusers' (turned upright by EXIF, converted to
RGB), but for pictures of more than 8 bits, which the engines saturate: those are scaled.
"""

from __future__ import annotations

import io
import os
import re
import warnings
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import PIL.Image
import PIL.ImageColor
import PIL.ImageOps
import torch
from PIL.Image import Image
from torch import Tensor

from cosmos3_fast.arguments import quoted

Color: TypeAlias = str | tuple[int, int, int]
Rgb: TypeAlias = Image | Tensor
"""An upright picture of 8-bit RGB: of Pillow, or uint8 [H, W, 3]."""

WANTED = (
    "a path, a PIL image, the bytes of a file, an open binary file, a uint8 [H,W,3] array or "
    "tensor, a float tensor in [-1,1] of shape [3,H,W], [B,3,H,W] or [B,3,T,H,W], or a clip: a "
    "list of images or a uint8 [T,H,W,3] array"
)
_WIDE_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
_ORIENTATION = 0x0112
_TURNED = range(2, 9)
# With one slash too: `Path` makes "https:/host" of "https://host". Drive letters are no schemes.
_URL = re.compile(r"(?i)(data:|[a-z][a-z0-9+.-]+:/)")
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")


_LONGEST_SHOWN = 255


def source_name(source: Any, name: str) -> str:
    """How messages call a picture: `name`, and what it came from."""
    if isinstance(source, PIL.Image.Image):
        return f"{name} (PIL, mode {source.mode}, {source.width}x{source.height})"
    if isinstance(source, (str, os.PathLike)):
        path = os.fspath(source)
        # Whole, as far as it can be a path: its end tells most.
        return f"{name} {repr(path) if len(path) <= _LONGEST_SHOWN else quoted(path)}"
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"{name} ({len(source)} bytes)"
    return f"{name} ({type(source).__name__})"


def as_stream(source: Any, name: str) -> Any:
    """What a decoder can open: a path that is a file, or a binary stream.

    Raises:
        FileNotFoundError: the path does not exist.
        TypeError: `source` is no path, bytes or open file.
        ValueError: a URL, a folder, a file opened as text.
    """
    label = source_name(source, name)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return io.BytesIO(source)
    if isinstance(source, (str, os.PathLike)):
        text = os.fsdecode(source)
        if _URL.match(text):
            raise ValueError(f"{label} is a URL: download or decode it first and give its path")
        path = Path(text)
        try:
            exists = path.exists()
        except OSError as error:  # a name longer than the system allows
            raise ValueError(f"{label} is no path: {error.strerror}") from None
        if not exists:
            raise FileNotFoundError(f"{label} does not exist")
        if not path.is_file():
            raise ValueError(f"{label} is not a file")
        return path
    if callable(getattr(source, "read", None)):
        if isinstance(source, io.TextIOBase):
            raise ValueError(f"{label} is opened as text: open it with mode 'rb'")
        return source
    raise TypeError(f"{name} must be {WANTED}; got {type(source).__name__}")


def as_tensor(value: Any) -> Tensor | None:
    """The tensor behind a tensor or numpy array, None for anything else."""
    if isinstance(value, Tensor):
        return value
    if not isinstance(value, np.ndarray):
        return None
    native = value.dtype.newbyteorder("=")
    if native not in (np.uint8, np.float16, np.float32, np.float64):
        raise ValueError(f"image must be uint8 or floating point, got an array of {value.dtype}")
    if native == np.uint8 and value.flags.writeable and min(value.strides, default=0) >= 0:
        return torch.from_numpy(value)  # bytes are only read
    # A copy, because torch takes no read-only or byte-swapped memory and no negative strides.
    return torch.from_numpy(np.array(value, dtype=native, order="C", copy=True))


def rgb_of_array(array: Tensor, name: str, background: Color | None) -> Rgb:
    """The picture that a uint8 array is: itself where it is RGB already.

    Raises:
        ValueError: its shape is none of a picture.
    """
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
    return to_rgb(PIL.Image.fromarray(array.detach().cpu().contiguous().numpy()), name, background)


def head(stream: Any) -> bytes:
    """The first 256 bytes, as far as they can be read; a stream is rewound."""
    try:
        if isinstance(stream, Path):
            with stream.open("rb") as file:
                return file.read(256)
        stream.seek(0)
        start = bytes(stream.read(256))
        stream.seek(0)
        return start
    except Exception:
        return b""


def is_heif(start: bytes) -> bool:
    """Whether a file that begins so is a HEIC or HEIF picture."""
    return start[4:8] == b"ftyp" and start[8:12] in _HEIF_BRANDS


def to_rgb(image: Image, label: str, background: Color | None) -> Image:
    """The frame that a PIL image shows, upright, as 8-bit RGB.

    Args:
        image: of any mode. Values of 16 bits are divided by 257 and those of floats in [0, 1]
            multiplied by 255, with a warning; alpha is dropped, as in the engines, unless
            `background` is given.
        label: what messages call it.
        background: the color that shows through transparent pixels. None: their own color does,
            with a warning where there are any.

    Raises:
        ValueError: it cannot be decoded, is empty, or holds values that are not finite, negative
            or beyond 16 bits.
    """
    try:
        image.load()
        if image.mode in _WIDE_MODES:
            image = _narrowed(image, label)
        # Asked first, because an upright image would be copied.
        if image.getexif().get(_ORIENTATION, 1) in _TURNED:
            image = PIL.ImageOps.exif_transpose(image)
        rgb = _without_alpha(image, label, background)
    except (_Refused, Warning):
        raise
    # Decoders raise whatever their parser met in a broken file: OSError, SyntaxError, struct.error.
    except Exception as error:
        raise ValueError(f"{label} cannot be read as an image: {error}") from error
    if rgb.width < 1 or rgb.height < 1:
        raise ValueError(f"{label} is empty")
    return rgb


class _Refused(ValueError):
    """A picture that was read, and whose values make none."""


def _narrowed(image: Image, label: str) -> Image:
    """A picture of more than 8 bits per value as one of 8, turned as the original is."""
    values = np.asarray(image)
    if values.size and image.mode == "F" and not np.isfinite(values).all():
        raise _Refused(f"{label} must hold finite values, got NaN or infinity")
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    if low < 0 or high > 65535:
        raise _Refused(
            f"{label} must hold values in [0, 255], of 16 bits or, of floats, in [0, 1]; "
            f"got values in [{low:g}, {high:g}]"
        )
    eight: Any
    if high > 255:
        eight, how = (values.astype(np.float64) / 257).round(), "divided by 257 (from 16 bits)"
    elif image.mode == "F" and 0 < high <= 1:
        eight, how = (values.astype(np.float64) * 255).round(), "multiplied by 255 (from [0, 1])"
    elif image.mode.startswith("I;16") and high:
        eight, how = values, f"taken as 8-bit: the largest is {high:g}"
    else:
        eight, how = values, ""
    if how:
        warnings.warn(f"{label} has mode {image.mode!r}: its values are {how}", stacklevel=6)
    narrow = PIL.Image.fromarray(eight.astype(np.uint8))
    if orientation := image.getexif().get(_ORIENTATION):
        narrow.getexif()[_ORIENTATION] = orientation
    return narrow


def _without_alpha(image: Image, label: str, background: Color | None) -> Image:
    transparent = image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info
    if not transparent or 0 in image.size:
        return image if image.mode == "RGB" else image.convert("RGB")
    rgba = image.convert("RGBA")
    if background is not None:
        canvas = PIL.Image.new("RGBA", rgba.size, (*parse_color(background), 255))
        return PIL.Image.alpha_composite(canvas, rgba).convert("RGB")
    least = rgba.getchannel("A").getextrema()[0]
    if least < 255:  # type: ignore[operator]
        warnings.warn(
            f"{label} has transparent pixels, and the colors under them show, as in the engines: "
            "give background= to paint them over",
            stacklevel=6,
        )
    return image.convert("RGB")


def parse_color(color: Any) -> tuple[int, int, int]:
    """Red, green and blue in [0, 255] of a color.

    Args:
        color: a name or code that Pillow's `ImageColor` knows, or three integers.

    Raises:
        ValueError: it is none.
    """
    try:
        red, green, blue = (PIL.ImageColor.getrgb(color) if isinstance(color, str) else color)[:3]
        rgb = int(red), int(green), int(blue)
        if all(0 <= value <= 255 for value in rgb):
            return rgb
    except (TypeError, ValueError):
        pass
    raise ValueError(
        "background must be a color such as 'white', '#ff8000' or (255, 128, 0), "
        f"got {quoted(color)}"
    )
