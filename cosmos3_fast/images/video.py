"""Frames, as they come, to a video file, an animation, a folder of pictures, or one picture."""

from __future__ import annotations

import contextlib
import math
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import PIL.Image
from torch import Tensor

from cosmos3_fast.arguments import quoted
from cosmos3_fast.files import check_new_folder, check_target, replacing, replacing_folder
from cosmos3_fast.images.clips import LEAST_PYAV

FOLDER = "folder"
PICTURE = ".png"
# By the kind of file: its container, its codec, and the largest crf.
_ENCODED = {
    ".mp4": ("mp4", "libx264", 51),
    ".webm": ("webm", "libvpx-vp9", 63),
    ".gif": ("gif", "gif", None),
}
CRF_KINDS = tuple(kind for kind, (_, _, largest) in _ENCODED.items() if largest is not None)

_CODEC_OPTIONS = {
    # Where the chroma samples are: the mean of four pixels lies between them, not at the left.
    ".mp4": {"x264-params": "chromaloc=1"},
    # VP9's own defaults take minutes where these take seconds, for a few percent of the size.
    ".webm": {"deadline": "good", "cpu-used": "4", "row-mt": "1", "b": "0"},
}
# Its delays are hundredths of a second, and browsers make 10 of what is below 2.
_GIF_RATE = 50
# Parts that wait for the thread that writes; another is being written, another being made.
_WAITING = 2
# As the standards number them (ITU-T H.273): BT.709 is 1 as matrix, primaries and transfer.
_BT709, _LIMITED, _FULL = 1, 1, 2


class Sink(Protocol):
    """Takes frames, uint8 [H, W, 3], in their order."""

    def write(self, frame: np.ndarray) -> None: ...

    def finish(self) -> None:
        """Write what is left: called after the last frame, where all went well."""

    def close(self) -> None:
        """Let go of what is open: called at the end in any case."""


def kind_of(path: str | os.PathLike[str], option: str = "path") -> str:
    """What a path asks for: ".mp4", ".webm", ".gif", ".png", or "folder" for pictures in one.

    A folder is what is one, ends in a slash, or has no suffix.

    Raises:
        ValueError: another suffix.
    """
    text = os.fspath(path)
    suffix = Path(text).suffix.lower()
    if text.endswith(os.sep) or not suffix or Path(text).is_dir():
        return FOLDER
    if suffix == PICTURE or suffix in _ENCODED:
        return suffix
    raise ValueError(
        f"{option} must end in {PICTURE}, {', '.join(_ENCODED)}, or name a folder, got {text!r}"
    )


def check_video(
    path: str | os.PathLike[str],
    fps: float | Fraction = 24,
    crf: float = 18,
    option: str = "path",
    inputs: Sequence[str] = (),
) -> Path:
    """The file or folder to write, after all that can be checked before there are frames.

    Args:
        path, fps, crf: as for `write_video`.
        option: how messages call the path.
        inputs: paths that must not be overwritten.

    Raises:
        ValueError: a suffix, rate or quality that is none; a path that must not be written to.
        ImportError: PyAV, or a codec in it, is missing.
    """
    kind, text = kind_of(path, option), os.fspath(path)
    target = (
        check_new_folder(text, option) if kind == FOLDER else check_target(text, option, inputs)
    )
    rate = frame_rate(fps)
    if kind == ".gif" and rate > _GIF_RATE:
        raise ValueError(f"fps of .gif must be at most {_GIF_RATE}, got {quoted(fps)}")
    if kind in _ENCODED:
        _check_crf(kind, crf)
        _codec(kind)
    return target


def frame_rate(fps: float | Fraction) -> Fraction:
    """Frames per second as a fraction: 23.976 is 24000/1001.

    Raises:
        ValueError: it is no number in [0.01, 1000].
    """
    try:
        rate = Fraction(fps)
    except (TypeError, ValueError, OverflowError):
        rate = Fraction(0)
    if isinstance(fps, (bool, str)) or not 0.01 <= rate <= 1000:
        raise ValueError(f"fps must be a number in [0.01, 1000], got {quoted(fps)}")
    return rate.limit_denominator(1001)


def write_video(
    parts: Iterable[Tensor],
    path: str | os.PathLike[str],
    size: tuple[int, int],
    frames: int,
    fps: float | Fraction = 24,
    crf: float = 18,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Write frames while they are made: a thread encodes beside the one that takes `parts`.

    No more than four parts are held. Under `path` nothing is there before all of it is; if a part
    cannot be made or written, nothing is left.

    `.mp4` is H.264 and `.webm` VP9, both with chroma at half the resolution (yuv420p) in limited
    range by BT.709's matrix, and tagged so. `.gif` has a palette for each frame, and delays in
    hundredths of a second. In a folder, pictures are `frame_00000.png` and so on.

    Args:
        parts: uint8 [n, H, W, 3], on the CPU.
        path: `.mp4`, `.webm`, `.gif`, a new or empty folder, or `.png` for one frame.
        size: H and W; even for `.mp4` and `.webm`, which have a chroma sample per 2x2 pixels.
        frames: how many there will be, at least 1.
        fps: frames per second, in [0.01, 1000]; of `.gif` at most 50.
        crf: quality of `.mp4` (0 to 51) and `.webm` (0 to 63); lower is better. 0 is lossless
            after the conversion for `.mp4`, in a profile that few players have.
        progress: called with the number of frames that were handed over.

    Returns:
        The path that was written, absolute.

    Raises:
        ValueError: a path, size, number, rate or quality that is none, or other frames came.
        ImportError: PyAV, or a codec in it, is missing.
    """
    target, kind = check_video(path, fps, crf), kind_of(path)
    height, width = size
    if kind == PICTURE and frames != 1:
        raise ValueError(f"{PICTURE} must be of 1 frame, got {frames}: name a folder, or a video")
    if kind in CRF_KINDS and (height % 2 or width % 2):
        raise ValueError(
            f"frames of {kind} must have even height and width, got {height}x{width}: "
            ".gif and folders take any"
        )
    partial = replacing_folder if kind == FOLDER else replacing
    with partial(target) as unfinished:
        sink: Sink
        if kind in _ENCODED:
            sink = _Encoder(unfinished, kind, size, frame_rate(fps), crf)
        else:
            sink = _Pictures(unfinished, kind == FOLDER)
        with _beside(sink) as hand_over:
            done = 0
            for part in parts:
                if part.shape[1:] != (height, width, 3):
                    raise ValueError(
                        f"frames must be [n, {height}, {width}, 3], got {list(part.shape)}"
                    )
                hand_over(part)
                done += part.shape[0]
                if progress is not None:
                    progress(done)
                del part
            if done != frames:
                raise ValueError(f"there must be {frames} frames, got {done}")
    return target


@contextlib.contextmanager
def _beside(sink: Sink) -> Iterator[Callable[[Tensor], None]]:
    """What takes parts for a thread that writes them; the block's end waits until it has.

    An error of the thread is raised by the next part, or at the end. If the block fails, what was
    not yet written is dropped.
    """
    waiting: queue.Queue[Tensor | None] = queue.Queue(_WAITING)
    stopped = threading.Event()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            while (part := waiting.get()) is not None:
                # After an error the rest is taken and dropped, so that nobody waits to hand over.
                if not stopped.is_set():
                    attempt(write, part)
                del part
            if not stopped.is_set():
                attempt(sink.finish)
        finally:
            attempt(sink.close)

    def write(part: Tensor) -> None:
        for frame in part.numpy():
            if stopped.is_set():
                return
            sink.write(frame)

    def attempt(action: Callable[..., None], *arguments: Tensor) -> None:
        try:
            action(*arguments)
        except BaseException as error:
            errors.append(error)
            stopped.set()

    def hand_over(part: Tensor) -> None:
        waiting.put(part)
        if errors:
            raise errors[0]

    # A daemon: a process that is told to end twice does not wait for it.
    thread = threading.Thread(target=work, name="cosmos3-video", daemon=True)
    thread.start()
    try:
        yield hand_over
    except BaseException:
        stopped.set()
        raise
    finally:
        waiting.put(None)
        thread.join()
    if errors:
        raise errors[0]


class _Pictures:
    """PNGs in a folder, or one PNG."""

    def __init__(self, path: Path, is_folder: bool) -> None:
        self._path, self._is_folder, self._done = path, is_folder, 0

    def write(self, frame: np.ndarray) -> None:
        name = self._path / f"frame_{self._done:05}.png" if self._is_folder else self._path
        PIL.Image.fromarray(frame).save(name, format="PNG")
        self._done += 1

    def finish(self) -> None:
        pass

    def close(self) -> None:
        pass


class _Encoder:
    """A video or an animation, by PyAV."""

    def __init__(
        self, path: Path, kind: str, size: tuple[int, int], fps: Fraction, crf: float
    ) -> None:
        av = _pyav(kind)
        container, codec, _ = _ENCODED[kind]
        height, width = size
        self._time_base, self._done = 1 / fps, 0
        self._palettes = _Palettes(av, size, self._time_base) if kind == ".gif" else None
        options = dict(_CODEC_OPTIONS.get(kind, {}))
        if kind in CRF_KINDS:
            options["crf"] = f"{crf:g}"
        # The index first, so that a browser can begin to play before it has all.
        muxer = {"movflags": "+faststart"} if kind == ".mp4" else {}
        self._container = av.open(str(path), "w", format=container, options=muxer)
        self._stream = self._container.add_stream(codec, rate=fps, options=options)
        self._stream.width, self._stream.height = width, height
        context = self._stream.codec_context
        context.time_base = self._time_base
        if kind == ".gif":
            self._stream.pix_fmt = "pal8"
        else:
            self._stream.pix_fmt = "yuv420p"
            context.color_range, context.colorspace = _LIMITED, _BT709
            context.color_primaries = context.color_trc = _BT709
        reformatter = av.video.reformatter
        # A chroma sample is the mean of its four pixels, and sums are rounded, not cut.
        flags = reformatter.Interpolation
        self._conversion = {
            "format": "yuv420p",
            "src_colorspace": _BT709,
            "dst_colorspace": _BT709,
            "src_color_range": _FULL,
            "dst_color_range": _LIMITED,
            "dst_color_primaries": _BT709,
            "dst_color_trc": _BT709,
            "interpolation": flags.AREA | flags.ACCURATE_RND | flags.FULL_CHR_H_INP,
        }
        self._frame = av.VideoFrame.from_ndarray

    def write(self, frame: np.ndarray) -> None:
        picture = self._frame(frame, format="rgb24")
        picture.pts, picture.time_base = self._done, self._time_base
        self._done += 1
        if self._palettes is not None:
            for each in self._palettes.push(picture):
                self._encode(each)
        else:
            # swscale's own default is BT.601, whatever the tags say.
            converted = picture.reformat(**self._conversion)
            converted.pts, converted.time_base = picture.pts, picture.time_base
            self._encode(converted)

    def finish(self) -> None:
        if self._palettes is not None:
            for each in self._palettes.push(None):
                self._encode(each)
        self._encode(None)

    def close(self) -> None:
        self._container.close()

    def _encode(self, frame: Any) -> None:
        self._container.mux(self._stream.encode(frame))


class _Palettes:
    """Frames in 256 colors of their own, dithered."""

    def __init__(self, av: Any, size: tuple[int, int], time_base: Fraction) -> None:
        self._graph = graph = av.filter.Graph()
        height, width = size
        source = graph.add_buffer(width=width, height=height, format="rgb24", time_base=time_base)
        split = graph.add("split")
        colors = graph.add("palettegen", "stats_mode=single:reserve_transparent=0")
        drawn = graph.add("paletteuse", "new=1")
        source.link_to(split)
        split.link_to(drawn, 0, 0)
        split.link_to(colors, 1, 0)
        colors.link_to(drawn, 0, 1)
        drawn.link_to(graph.add("buffersink"))
        graph.configure()
        self._nothing_yet = (av.error.BlockingIOError, av.error.EOFError)

    def push(self, frame: Any) -> Iterator[Any]:
        """Give the next frame, or None at the end; take what is ready."""
        self._graph.push(frame)
        while True:
            try:
                yield self._graph.pull()
            except self._nothing_yet:
                return


def _check_crf(kind: str, crf: float) -> None:
    largest = _ENCODED[kind][2]
    if largest is None:
        return
    is_number = isinstance(crf, (int, float)) and not isinstance(crf, bool) and math.isfinite(crf)
    if not is_number or not 0 <= crf <= largest:
        raise ValueError(f"crf of {kind} must be a number in [0, {largest}], got {quoted(crf)}")


def _codec(kind: str) -> None:
    """Raises ImportError where PyAV has none for it."""
    av, codec = _pyav(kind), _ENCODED[kind][1]
    if codec not in av.codecs_available:
        raise ImportError(
            f"{kind} needs PyAV with {codec}, got one without it: pip install 'cosmos3-fast[video]'"
        )


def _pyav(kind: str) -> Any:
    try:
        import av
    except ImportError as error:
        raise ImportError(
            f"{kind} needs PyAV, which cannot be imported ({error}): "
            "pip install 'cosmos3-fast[video]', or name a folder for pictures"
        ) from None
    if int(av.__version__.split(".")[0]) < LEAST_PYAV:
        raise ImportError(
            f"{kind} needs PyAV {LEAST_PYAV} or newer, got {av.__version__}: "
            "pip install 'cosmos3-fast[video]'"
        )
    return av
