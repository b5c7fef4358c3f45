"""The frames of a picture or clip: a file, an animation, a multi-page TIFF, a video, a list."""

from __future__ import annotations

import io
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL.Image
import torch
from PIL.Image import Image

from cosmos3_fast.images.decode import (
    Color,
    Rgb,
    as_stream,
    as_tensor,
    head,
    is_heif,
    rgb_of_array,
    source_name,
    to_rgb,
)

Keep = Literal["first", "last"]

# Not MPO: the second picture of a camera's file is a preview or a depth map, no next frame.
_ANIMATED_FORMATS = ("GIF", "WEBP", "PNG", "TIFF", "AVIF")
VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2", ".f4v", ".mkv", ".webm", ".avi", ".mpg"),
    *(".mpeg", ".mpe", ".m1v", ".m2v", ".vob", ".ts", ".mts", ".m2ts", ".ogv", ".flv", ".wmv"),
    *(".asf", ".mxf", ".ivf", ".y4m"),
)
# How the containers begin that PyAV reads; those of QuickTime have the kind of a box first.
_VIDEO_STARTS = (
    b"\x1aE\xdf\xa3",  # Matroska, WebM
    b"OggS",
    b"FLV\x01",
    b"\x30\x26\xb2\x75\x8e\x66\xcf\x11",  # ASF, WMV
    b"\x00\x00\x01\xba",  # MPEG program stream
    b"\x00\x00\x01\xb3",  # MPEG video
    b"\x06\x0e\x2b\x34\x02\x05\x01\x01",  # MXF
    b"DKIF",
    b"YUV4MPEG2 ",
)
LEAST_PYAV = 17  # of the colors of BT.709 and the side data of frames
_QUICKTIME_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")


def read_frames(
    source: Any,
    name: str,
    *,
    max_frames: int | None = None,
    keep: Keep = "first",
    background: Color | None = None,
) -> tuple[Iterable[Rgb], bool]:
    """The frames of a picture or clip in any form but floats, upright and in RGB.

    Args:
        source: as for `read_file`, or a uint8 array or tensor, or a list or tuple of any of these
            that are pictures.
        name, max_frames, keep, background: see `read_file`.

    Returns:
        The frames, at least one, and whether they are a clip. Those of a list are read as they are
        taken.

    Raises:
        FileNotFoundError, TypeError, ValueError: see `read_file` and `decode.rgb_of_array`; of a
            list, when a frame is taken.
    """
    if isinstance(source, (list, tuple)):
        return _frames_of_list(source, max_frames, keep, background), True
    array = as_tensor(source)
    if array is None:
        return read_file(source, name, max_frames=max_frames, keep=keep, background=background)
    if array.dtype != torch.uint8:
        raise ValueError(f"{name} must be uint8 or floating point, got {array.dtype}")
    if array.ndim == 4:
        return _frames_of_list(list(array), max_frames, keep, background), True
    return [rgb_of_array(array, name, background)], False


def _frames_of_list(
    frames: Sequence[Any], max_frames: int | None, keep: Keep, background: Color | None
) -> Iterator[Rgb]:
    if not frames:
        raise ValueError("clip is empty: it needs at least one frame")
    kept = slice(max_frames) if keep == "first" else slice(-(max_frames or 0), None)
    return (
        _frame_of_list(frame, f"clip frame {i}", background) for i, frame in enumerate(frames[kept])
    )


def _frame_of_list(frame: Any, name: str, background: Color | None) -> Rgb:
    array = as_tensor(frame)
    if array is not None and array.dtype != torch.uint8:
        raise ValueError(
            f"{name} is a {array.dtype} array: frames in a list must be paths, PIL images or "
            "uint8 [H,W,3] arrays; give a float clip as one [B,3,T,H,W] tensor"
        )
    if array is not None:
        return rgb_of_array(array, name, background)
    # Pillow's iterators over an animation give the same object each time, showing its last frame.
    if not is_animation(frame):
        images, is_clip = read_file(frame, name, max_frames=1, background=background)
        if not is_clip:
            return images[0]
    raise ValueError(
        f"{source_name(frame, name)} is an animation: give it alone, or copies of its frames"
    )


def read_file(
    source: Any,
    name: str,
    *,
    max_frames: int | None = None,
    keep: Keep = "first",
    background: Color | None = None,
) -> tuple[list[Image], bool]:
    """The frames of a picture or clip, upright and in RGB.

    Args:
        source: a path, bytes, an open binary file, or a PIL image. A PIL image that was opened
            from an animation stands for the whole of it.
        name: what messages call it.
        max_frames: read no more than so many frames; None: all.
        keep: "first" or "last": which ones, of a longer clip.
        background: see `decode.to_rgb`.

    Returns:
        The frames, at least one, and whether they are a clip (of perhaps one frame).

    Raises:
        FileNotFoundError, TypeError, ValueError: see `decode.as_stream` and `decode.to_rgb`.
    """
    label = source_name(source, name)
    if isinstance(source, PIL.Image.Image):
        if not is_animation(source):
            return [to_rgb(source, label, background)], False
        position = source.tell()
        try:
            return _limited(_pages(source, label, background), max_frames, keep), True
        finally:
            source.seek(position)
    stream = as_stream(source, name)
    start = head(stream)
    try:
        opened = PIL.Image.open(stream)
    except Exception as error:
        if _is_video(start, stream):
            return _limited(_video_frames(stream, label), max_frames, keep), True
        hint = (
            "; it is HEIC: `pip install pillow-heif` and call `pillow_heif.register_heif_opener()`"
            if is_heif(start)
            else ""
        )
        raise ValueError(f"{label} cannot be read as an image: {error}{hint}") from error
    with opened:
        if not is_animation(opened):
            return [to_rgb(opened, label, background)], False
        if opened.format == "TIFF" and len(sizes := _page_sizes(opened, label)) > 1:
            warnings.warn(
                f"{label} has pages of different sizes ({', '.join(sizes)}): the first one is "
                "taken, as a picture",
                stacklevel=4,
            )
            opened.seek(0)
            return [to_rgb(opened, label, background)], False
        return _limited(_pages(opened, label, background), max_frames, keep), True


def is_animation(image: Image) -> bool:
    """Whether a PIL image is the open file of a clip."""
    try:
        several = getattr(image, "is_animated", False)
    except Exception:  # a broken file: reading its picture says what is wrong
        return False
    return bool(several) and getattr(image, "format", None) in _ANIMATED_FORMATS


def _page_sizes(image: Image, label: str) -> list[str]:
    sizes: dict[str, None] = {}
    try:
        for page in range(getattr(image, "n_frames", 1)):
            image.seek(page)
            sizes[f"{image.width}x{image.height}"] = None
        image.seek(0)
    except Exception as error:
        raise ValueError(f"{label} cannot be read as an image: {error}") from error
    return list(sizes)


def _pages(image: Image, label: str, background: Color | None) -> Iterator[Image]:
    page = 0
    while True:
        try:
            image.seek(page)
            # A copy: the open file is the same object at every page, and keeps its own mode.
            shown = image.copy()
        except EOFError:
            return
        except Exception as error:
            raise ValueError(f"frame {page} of {label} cannot be read: {error}") from error
        yield to_rgb(shown, f"frame {page} of {label}" if page else label, background)
        page += 1


def _limited(frames: Iterator[Image], max_frames: int | None, keep: Keep) -> list[Image]:
    if max_frames is not None and keep == "last":
        return list(deque(frames, maxlen=max_frames))
    found = []
    for frame in frames:
        found.append(frame)
        if len(found) == max_frames:
            break
    return found


def is_media(source: Path | bytes) -> bool:
    """Whether a file is a picture or clip by its content, whatever it is called."""
    stream: Any = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            PIL.Image.open(stream).close()
        return True
    except Exception:
        start = head(stream)
        return is_heif(start) or _begins_as_video(start)


def _is_video(start: bytes, stream: Any) -> bool:
    """Whether PyAV may read what Pillow does not: by its first bytes, or its name."""
    if _begins_as_video(start):
        return True
    return isinstance(stream, Path) and stream.suffix.lower() in VIDEO_SUFFIXES


def _begins_as_video(start: bytes) -> bool:
    if start.startswith(_VIDEO_STARTS) or start[8:12] == b"AVI ":
        return True
    # A packet of an MPEG transport stream is 188 bytes long, in a camera's 192.
    if any(
        start[first : first + 1] == b"G" == start[first + length :][:1]
        for first, length in ((0, 188), (4, 192))
    ):
        return True
    return start[4:8] in _QUICKTIME_BOXES and not is_heif(start)


def _video_frames(stream: Any, label: str) -> Iterator[Image]:
    try:
        import av
    except ImportError as error:
        raise ValueError(
            f"{label} looks like a video, and PyAV cannot be imported ({error}): "
            "pip install 'cosmos3-fast[video]'"
        ) from None
    if int(av.__version__.split(".")[0]) < LEAST_PYAV:
        raise ValueError(
            f"{label} looks like a video, for which PyAV must be {LEAST_PYAV} or newer, got "
            f"{av.__version__}: pip install 'cosmos3-fast[video]'"
        )
    found = False
    try:
        if not isinstance(stream, Path):
            stream.seek(0)
        with av.open(str(stream) if isinstance(stream, Path) else stream) as container:
            if not container.streams.video:
                raise _NoVideo(
                    f"{label} is a file without video: it holds only {_kinds(container)}"
                )
            for frame in container.decode(video=0):
                if not found:
                    _say_aspect(container.streams.video[0], label)
                found = True
                yield _as_shown(frame)
    except (_NoVideo, Warning):
        raise
    except Exception as error:
        raise ValueError(f"{label} cannot be read as a video: {error}") from error
    if not found:
        raise ValueError(f"{label} is a video without frames")


class _NoVideo(ValueError):
    """A container of other streams."""


def _kinds(container: Any) -> str:
    return ", ".join(dict.fromkeys(each.type for each in container.streams)) or "nothing"


def _say_aspect(stream: Any, label: str) -> None:
    aspect = stream.sample_aspect_ratio
    if aspect and aspect != 1:
        warnings.warn(
            f"{label} has pixels of the shape {aspect.numerator}:{aspect.denominator}, which are "
            "taken as squares, as in the engines",
            stacklevel=2,
        )


def _as_shown(frame: Any) -> Image:
    """A frame in the colors that ffmpeg gives it, turned and mirrored as its display matrix says.

    The matrix maps the frame's (x, y) to (a·x + c·y, b·x + d·y) on the screen.
    """
    picture: Image = frame.to_image()
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return picture
    a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5]
    if abs(int(a)) + abs(int(d)) < abs(int(b)) + abs(int(c)):  # rows become columns
        picture = picture.transpose(PIL.Image.Transpose.TRANSPOSE)
        a, d = c, b
    if a < 0:
        picture = picture.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
    if d < 0:
        picture = picture.transpose(PIL.Image.Transpose.FLIP_TOP_BOTTOM)
    return picture
