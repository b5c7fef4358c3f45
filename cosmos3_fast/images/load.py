"""Images and clips to pixel tensors, by the convention of SGLang's Cosmos3 stages.

Resize and crop follow `Cosmos3ImagePreprocessStage`. It writes the normalisation of images as
`2 * (x / 255) - 1` and that of clips as `x / 127.5 - 1`; halving the divisor doubles the
quotient exactly, so the two agree in every bit.

From here the way leads downwards: frames of any form (`clips`), each as a picture of 8-bit RGB
(`decode`), all of one size (`resize`), read where Pillow keeps them (`pillow`).
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from typing import BinaryIO, TypeAlias

import numpy as np
import torch
from PIL.Image import Image

from cosmos3_fast.arguments import positive_int, quoted
from cosmos3_fast.images.clips import Keep, read_frames
from cosmos3_fast.images.decode import Color, as_tensor, parse_color
from cosmos3_fast.images.resize import resize_frames

ImageLike: TypeAlias = str | os.PathLike[str] | bytes | BinaryIO | Image | np.ndarray | torch.Tensor
ClipLike: TypeAlias = Sequence[ImageLike] | np.ndarray | torch.Tensor

# How far rounding and interpolation may carry a float picture out of [-1, 1]; clipped.
_OVERSHOOT = 1e-3


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
    array = as_tensor(image_or_clip)
    if array is not None and array.is_floating_point():
        return _float_pixels(array, height, width, max_frames, keep)
    frames, is_clip = read_frames(
        image_or_clip if array is None else array,
        "image",
        max_frames=max_frames,
        keep=keep,
        background=background,
    )
    if device is None and array is not None:
        device = array.device
    pixels = resize_frames(frames, height, width, device)
    return pixels[None] if is_clip else pixels


def normalize_frames(frames: torch.Tensor) -> torch.Tensor:
    """Bytes as from `load_frames` to what `load_pixels` makes of them: `x / 127.5 - 1`."""
    # By a tensor on the device: torch multiplies by the reciprocal of a plain number there.
    divisor = torch.tensor(127.5, dtype=torch.float32, device=frames.device)
    return (frames.to(torch.float32).movedim(-1, 1).contiguous() / divisor).sub_(1.0)


def _float_pixels(
    array: torch.Tensor, height: int, width: int, max_frames: int | None, keep: Keep
) -> torch.Tensor:
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
        kept = slice(max_frames) if keep == "first" else slice(-(max_frames or 0), None)
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
