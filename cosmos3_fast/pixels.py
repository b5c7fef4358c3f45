"""Images and clips to pixel tensors, by the convention of SGLang's Cosmos3 stages.

Resize and crop follow ``Cosmos3ImagePreprocessStage``. It writes the normalisation of images as
``2 * (x / 255) - 1`` and that of clips as ``x / 127.5 - 1``; halving the divisor doubles the
quotient exactly, so the two agree in every bit.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

ImageLike: TypeAlias = "str | os.PathLike[str] | Image | np.ndarray | torch.Tensor"
ClipLike: TypeAlias = "Sequence[ImageLike] | np.ndarray | torch.Tensor"

_WANTED = (
    "a path, a PIL image, a uint8 [H,W,3] array or tensor, a float tensor in [-1,1] of shape "
    "[3,H,W], [B,3,H,W] or [B,3,T,H,W], or a clip: a list of images or a uint8 [T,H,W,3] array"
)
_MAX_RESIZED_PIXELS = 1 << 28
_WIDE_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")


def load_pixels(
    image_or_clip: ImageLike | ClipLike,
    height: int,
    width: int,
    *,
    max_frames: int | None = None,
) -> torch.Tensor:
    """Load an image or a clip as pixels in [-1, 1].

    Args:
        image_or_clip: One of

            - a path to an image file, or a PIL image of any mode: turned upright by its EXIF
              orientation and converted to RGB as SGLang and diffusers do (alpha is dropped, and
              16-bit and float modes saturate at 255, with a warning);
            - a uint8 array or tensor [H,W], [H,W,1], [H,W,3] or [H,W,4];
            - a clip: a list or tuple of the above, or a uint8 array or tensor [T,H,W,3];
            - a float tensor or array in [-1, 1], [3,H,W], [B,3,H,W] or [B,3,T,H,W], already of the
              size asked for; it is only cast to float32.
        height, width: Size of the result. Everything but float tensors is resized with Lanczos,
            keeping its aspect ratio, until it covers the size, and cropped at the centre.
        max_frames: Of a clip, load the first ``max_frames`` frames only; the others are not read.

    Returns:
        float32, contiguous: [B,3,height,width] for an image, [B,3,T,height,width] for a clip, with
        B = 1 unless a float tensor brought its own. On the device of a tensor that was given (and
        perhaps its memory), on the CPU otherwise.

    Raises:
        FileNotFoundError: The path does not exist.
        TypeError: Not an image or clip of one of the kinds above.
        ValueError: A file that is no image or is truncated, a shape, size or dtype not listed
            above, float values that are not finite or outside [-1, 1].
    """
    frames = load_frames(image_or_clip, height, width, max_frames=max_frames)
    return normalize_frames(frames) if frames.dtype == torch.uint8 else frames


def load_frames(
    image_or_clip: ImageLike | ClipLike,
    height: int,
    width: int,
    *,
    max_frames: int | None = None,
) -> torch.Tensor:
    """As `load_pixels`, but bytes stay bytes: a quarter of the size on the way to a device.

    Returns:
        uint8, contiguous: [1,height,width,3] for an image, [1,T,height,width,3] for a clip. Float
        tensors as from `load_pixels`.
    """
    for name, size in (("height", height), ("width", width)):
        if not _is_int(size) or size < 1:
            raise ValueError(f"{name} must be a positive integer, got {size!r}")
    if max_frames is not None and (not _is_int(max_frames) or max_frames < 1):
        raise ValueError(f"max_frames must be a positive integer, got {max_frames!r}")

    if isinstance(image_or_clip, (list, tuple)):
        return _clip_frames(image_or_clip[:max_frames], height, width)
    array = _as_tensor(image_or_clip)
    if array is None:
        return _resized(_open(image_or_clip, "image"), height, width)[None]
    if array.is_floating_point():
        return _float_pixels(array, height, width, max_frames)
    if array.dtype != torch.uint8:
        raise ValueError(f"image must be uint8 or floating point, got {array.dtype}")
    if array.ndim == 4:
        frames = [
            _from_uint8(frame, f"clip frame {i}") for i, frame in enumerate(array[:max_frames])
        ]
        return _clip_frames(frames, height, width).to(array.device)
    return _resized(_from_uint8(array, "image"), height, width)[None].to(array.device)


def normalize_frames(frames: torch.Tensor) -> torch.Tensor:
    """Bytes as from `load_frames` to what `load_pixels` makes of them: ``x / 127.5 - 1``."""
    # By a tensor on the device: torch multiplies by the reciprocal of a plain number there.
    divisor = torch.tensor(127.5, device=frames.device)
    return (frames.to(torch.float32).movedim(-1, 1).contiguous() / divisor).sub_(1.0)


def resize_crop(image: Image, height: int, width: int) -> Image:
    """Resize a PIL image with Lanczos to cover ``width`` x ``height`` and crop its centre.

    Each side of the resized image is rounded up, as in SGLang's ``Cosmos3ImagePreprocessStage``.
    """
    from PIL.Image import Resampling

    scale = max(width / image.width, height / image.height)
    resized_width, resized_height = math.ceil(scale * image.width), math.ceil(scale * image.height)
    if resized_width * resized_height > _MAX_RESIZED_PIXELS:
        raise ValueError(
            f"image of {image.width}x{image.height} (width x height) is too narrow for "
            f"{width}x{height}: it would be resized to {resized_width}x{resized_height}"
        )
    image = image.resize((resized_width, resized_height), Resampling.LANCZOS)
    left, top = (resized_width - width) // 2, (resized_height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


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
    # A copy, because torch takes no read-only or byte-swapped memory and no negative strides.
    return torch.from_numpy(np.array(value, dtype=native, order="C", copy=True))


def _open(image: Any, name: str) -> Image:
    """A path or PIL image as an upright RGB image, by the steps of SGLang's ``load_image``."""
    import PIL.Image
    import PIL.ImageOps

    if isinstance(image, PIL.Image.Image):
        source = f"{name} (PIL, mode {image.mode}, {image.width}x{image.height})"
    elif isinstance(image, (str, os.PathLike)):
        path = Path(image)
        source = f"{name} {str(path)!r}"
        if str(image).startswith(("http://", "https://")):
            raise ValueError(f"{source} is a URL: download it first and give its path")
        if not path.exists():
            raise FileNotFoundError(f"{source} does not exist")
        if not path.is_file():
            raise ValueError(f"{source} is not a file")
    else:
        raise TypeError(f"{name} must be {_WANTED}; got {type(image).__name__}")

    # Decoders raise whatever their parser met in a broken file: OSError, SyntaxError, struct.error.
    try:
        if isinstance(image, PIL.Image.Image):
            image.load()
            upright = PIL.ImageOps.exif_transpose(image)
        else:
            with PIL.Image.open(path) as opened:
                opened.load()
                upright = PIL.ImageOps.exif_transpose(opened)
    except Exception as error:
        raise ValueError(f"{source} cannot be read as an image: {error}") from error
    if upright.width < 1 or upright.height < 1:
        raise ValueError(f"{source} is empty")
    if upright.mode in _WIDE_MODES and max(cast("tuple[float, float]", upright.getextrema())) > 255:
        warnings.warn(
            f"{source} has mode {upright.mode!r} and values above 255: they saturate, as in the "
            "engines. Scale it to 8 bits first if that is not what you want.",
            stacklevel=4,
        )
    return upright.convert("RGB")


def _from_uint8(array: torch.Tensor, name: str) -> Image:
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
    return fromarray(array.detach().cpu().contiguous().numpy()).convert("RGB")


def _clip_frames(frames: Sequence[Any], height: int, width: int) -> torch.Tensor:
    if not frames:
        raise ValueError("clip is empty: it needs at least one frame")
    clip = torch.empty(1, len(frames), height, width, 3, dtype=torch.uint8)
    for i, frame in enumerate(frames):
        array = _as_tensor(frame)
        if array is not None and array.dtype != torch.uint8:
            raise ValueError(
                f"clip frame {i} is a {array.dtype} array: frames in a list must be paths, PIL "
                "images or uint8 [H,W,3] arrays; give a float clip as one [B,3,T,H,W] tensor"
            )
        name = f"clip frame {i}"
        image = _open(frame, name) if array is None else _from_uint8(array, name)
        clip[0, i] = _resized(image, height, width)
    return clip


def _resized(image: Image, height: int, width: int) -> torch.Tensor:
    """An RGB image as uint8 [height, width, 3]."""
    import numpy as np

    return torch.from_numpy(np.array(resize_crop(image, height, width)))


def _float_pixels(
    array: torch.Tensor, height: int, width: int, max_frames: int | None
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
        pixels = pixels[:, :, :max_frames]
    pixels = pixels.detach().to(torch.float32).contiguous()
    low, high = (float(value) for value in pixels.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"image of dtype {array.dtype} holds NaN or infinite values")
    if low < -1.0 or high > 1.0:
        hint = "; [0,255] must be given as uint8" if low >= 0.0 and high > 2.0 else ""
        raise ValueError(
            f"image of dtype {array.dtype} must be in [-1,1], "
            f"got values in [{low:g}, {high:g}]{hint}"
        )
    return pixels
