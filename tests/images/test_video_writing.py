"""Frames to files: colors, rates, kinds; nothing half-written; no more frames held than needed."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cosmos3_fast.images import video
from cosmos3_fast.images.video import check_video, kind_of, write_video

ROOT = Path(__file__).parents[2]
HEIGHT, WIDTH, FRAMES = 32, 48, 9


@pytest.fixture
def av() -> Any:
    return pytest.importorskip("av", reason="PyAV is not installed (the extra [video])")


def noise(frames: int = FRAMES, height: int = HEIGHT, width: int = WIDTH) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (frames, height, width, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def parts_of(frames: torch.Tensor) -> list[torch.Tensor]:
    return [frames[:1], *frames[1:].split(4)]


def write(frames: torch.Tensor, path: Path, **options: Any) -> Path:
    return write_video(parts_of(frames), path, tuple(frames.shape[1:3]), len(frames), **options)


def rgb_of(frame: Any) -> np.ndarray:
    """A limited-range yuv420p frame by BT.709 in float64, a chroma sample for its four pixels."""
    y, u, v = (
        np.frombuffer(bytes(plane), np.uint8).reshape(plane.height, -1)[:, : plane.width]
        for plane in frame.planes
    )
    light = (y.astype(float) - 16) / 219
    blue, red = (np.kron(c.astype(float) - 128, np.ones((2, 2))) / 224 for c in (u, v))
    kr, kb = 0.2126, 0.0722
    r, b = light + 2 * (1 - kr) * red, light + 2 * (1 - kb) * blue
    g = (light - kr * r - kb * b) / (1 - kr - kb)
    return 255 * np.stack([r, g, b], -1)


def decoded(av: Any, path: Path) -> list[Any]:
    with av.open(str(path)) as container:
        return list(container.decode(video=0))


def blocks() -> torch.Tensor:
    """Noise of one color for the four pixels of a chroma sample."""
    return noise(FRAMES, HEIGHT // 2, WIDTH // 2).repeat_interleave(2, 1).repeat_interleave(2, 2)


def test_colors_are_within_two_levels_at_crf_0(av: Any, tmp_path: Path):
    """Where the four pixels of a chroma sample are equal: of others 4:2:0 holds the mean alone.

    Rounding to 8 bits of limited range is 0.5 · 255/219 of luma and at most 0.5 · 2(1 - kb) ·
    255/224 of chroma, 1.7 levels; swscale's fixed point is what is left to two.
    """
    path = write(blocks(), tmp_path / "clip.mp4", crf=0)
    frames = decoded(av, path)
    assert len(frames) == FRAMES
    for frame, wanted in zip(frames, blocks().numpy(), strict=True):
        assert frame.format.name == "yuv420p"
        assert np.abs(rgb_of(frame) - wanted).max() <= 2


def test_a_reader_s_own_conversion_is_within_two_levels(av: Any, tmp_path: Path):
    """Of frames that change by a level and a half a pixel, so that halved chroma loses little."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    slopes = np.array([[1.5, 0.5, -1.0], [0.5, -1.0, 1.5]])
    still = np.array([80, 120, 110]) + x[..., None] * slopes[0] + y[..., None] * slopes[1]
    clip = np.stack([still + 3 * t for t in range(FRAMES)]).round().astype(np.uint8)
    path = write(torch.from_numpy(clip), tmp_path / "clip.mp4", crf=0)
    flags = av.video.reformatter.Interpolation
    how = flags.BILINEAR | flags.ACCURATE_RND | flags.FULL_CHR_H_INT
    for frame, wanted in zip(decoded(av, path), clip, strict=True):
        # By the frame's own tags: without an argument, the matrix is the one that it names.
        got = frame.reformat(format="rgb24", interpolation=how).to_ndarray()
        inner = np.abs(got.astype(int) - wanted)[2:-2, 2:-2]
        assert inner.max() <= 2


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_tags_rate_and_size(av: Any, tmp_path: Path, suffix: str):
    path = write(noise(), tmp_path / f"clip{suffix}", fps=23.976)
    with av.open(str(path)) as container:
        (stream,) = container.streams
        context = stream.codec_context
        assert (context.width, context.height) == (WIDTH, HEIGHT)
        assert abs(stream.average_rate - Fraction(24000, 1001)) < Fraction(1, 20)
        frames = list(container.decode(video=0))
        assert len(frames) == FRAMES
        assert (frames[0].colorspace, frames[0].color_range) == (1, 1)
        assert (context.color_primaries, context.color_trc) == (1, 1)
        times = [float(frame.time) for frame in frames]
    # WebM counts in milliseconds.
    assert np.allclose(times, np.arange(FRAMES) * 1001 / 24000, atol=1e-3)


def test_a_lower_crf_is_nearer(av: Any, tmp_path: Path):
    frames = blocks()
    for suffix in (".mp4", ".webm"):
        errors = []
        for crf in (0, 40):
            path = write(frames, tmp_path / f"{crf}{suffix}", crf=crf)
            got = np.stack([rgb_of(frame) for frame in decoded(av, path)])
            errors.append(np.abs(got - frames.numpy()).mean())
        assert errors[0] < 0.9 * errors[1], suffix


def test_an_animation(av: Any, tmp_path: Path):
    """At most 256 colors a frame are kept as they are; delays add up to the whole time."""
    few = (noise(5, 8, 12) // 4 * 4).repeat_interleave(4, 1).repeat_interleave(4, 2)
    path = write(few, tmp_path / "clip.gif", fps=24)
    with Image.open(path) as image:
        assert image.n_frames == 5
        assert image.info["loop"] == 0  # for ever
        delays = []
        for i in range(5):
            image.seek(i)
            delays.append(image.info["duration"])
            shown = np.asarray(image.convert("RGB"))
            assert np.abs(shown.astype(int) - few[i].numpy()).max() <= 4, i
    assert abs(sum(delays) - 5000 / 24) <= 10
    with pytest.raises(ValueError, match=r"fps of .gif must be at most 50, got 60"):
        write(few, path, fps=60)


def test_pictures(tmp_path: Path):
    frames = noise()
    path = write(frames, tmp_path / "frames")
    assert path == tmp_path / "frames"
    names = sorted(each.name for each in path.iterdir())
    assert names == [f"frame_{i:05}.png" for i in range(FRAMES)]
    for name, wanted in zip(names, frames, strict=True):
        assert np.array_equal(np.asarray(Image.open(path / name)), wanted)
    picture = write(frames[:1], tmp_path / "one.png")
    assert np.array_equal(np.asarray(Image.open(picture)), frames[0])
    (tmp_path / "empty.d").mkdir()
    assert len(list(write(frames, tmp_path / "empty.d").iterdir())) == FRAMES


def test_kinds():
    kinds = {"a.MP4": ".mp4", "a.webm": ".webm", "b/": "folder", "a.b/": "folder", "a": "folder"}
    assert {path: kind_of(path) for path in kinds} == kinds
    with pytest.raises(ValueError, match=r"path must end in \.png, \.mp4, .* got 'a\.avi'"):
        kind_of("a.avi")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("a.mp4", {"crf": 52}, r"crf of .mp4 must be a number in \[0, 51\], got 52"),
        ("a.webm", {"crf": float("nan")}, r"crf of .webm must be a number in \[0, 63\], got nan"),
        ("a.mp4", {"fps": 0}, r"fps must be a number in \[0.01, 1000\], got 0"),
        ("a.mp4", {"fps": "24"}, r"fps must be a number in \[0.01, 1000\], got '24'"),
        ("full", {}, r"path '.*full' must be a new or empty folder, got a folder that holds"),
        ("file", {}, r"path '.*file' must be a new or empty folder, got a file"),
        ("none/a.mp4", {}, r"the folder '.*none' does not exist"),
        ("none/a", {}, r"the folder '.*none' does not exist"),
        ("a.png", {}, r".png must be of 1 frame, got 9"),
    ],
)
def test_refusals(tmp_path: Path, name: str, options: dict[str, Any], message: str):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message):
        write(noise(), tmp_path / name, **options)
    assert sorted(tmp_path.rglob("*")) == before


def test_odd_sizes(av: Any, tmp_path: Path):
    odd = noise(2, 33, 47)
    for suffix in (".mp4", ".webm"):
        with pytest.raises(ValueError, match=rf"frames of {suffix} must have even .* got 33x47"):
            write(odd, tmp_path / f"a{suffix}")
    assert not list(tmp_path.iterdir())
    assert Image.open(write(odd, tmp_path / "a.gif")).size == (47, 33)
    write(odd, tmp_path / "a")


def test_other_frames_than_promised(tmp_path: Path):
    frames = noise()
    for parts, message in (
        ([frames, frames], "there must be 9 frames, got 18"),
        ([frames[:, 1:]], r"frames must be \[n, 32, 48, 3\], got \[9, 31, 48, 3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            write_video(parts, tmp_path / "a", (HEIGHT, WIDTH), FRAMES)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", [None, "16.0.0"])
def test_without_pyav_the_extra_is_named_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str | None
):
    old = None if module is None else type("av", (), {"__version__": module})
    monkeypatch.setitem(sys.modules, "av", old)
    message = r"\.mp4 needs PyAV.*pip install 'cosmos3-fast\[video\]'"
    with pytest.raises(ImportError, match=message):
        check_video(tmp_path / "a.mp4")
    with pytest.raises(ImportError, match=message):
        write_video(iter(()), tmp_path / "a.mp4", (HEIGHT, WIDTH), 1)
    assert check_video(tmp_path / "a") == tmp_path / "a"


def test_a_codec_that_is_missing_is_named(av: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(av, "codecs_available", {"gif"})
    with pytest.raises(ImportError, match=r"\.webm needs PyAV with libvpx-vp9, got one without"):
        check_video(tmp_path / "a.webm")


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a"])
@pytest.mark.parametrize("error", [RuntimeError("no more"), KeyboardInterrupt()])
def test_parts_that_fail_leave_nothing(
    request: pytest.FixtureRequest, tmp_path: Path, name: str, error: BaseException
):
    if "." in name:
        request.getfixturevalue("av")

    def parts() -> Iterator[torch.Tensor]:
        yield noise(5)
        raise error

    if name == "a.mp4":
        (tmp_path / name).write_text("before")
    with pytest.raises(type(error)):
        write_video(parts(), tmp_path / name, (HEIGHT, WIDTH), FRAMES)
    left = [path.name for path in tmp_path.iterdir()]
    assert left == (["a.mp4"] if name == "a.mp4" else [])
    if left:
        assert (tmp_path / name).read_text() == "before"
    assert not [each for each in threading.enumerate() if each.name == "cosmos3-video"]


@pytest.mark.parametrize("at", ["write", "finish"])
def test_an_error_of_the_thread_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str):
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(video._Pictures, at, fail)
    made = []

    def parts() -> Iterator[torch.Tensor]:
        for i in range(1000):
            made.append(i)
            yield noise(1)

    with pytest.raises(OSError, match="No space left on device"):
        write_video(parts(), tmp_path / "a", (HEIGHT, WIDTH), 1000)
    assert not list(tmp_path.iterdir())
    # It is not found out at the end.
    assert len(made) == (1000 if at == "finish" else pytest.approx(5, abs=5))


def test_no_more_than_four_parts_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    alive: set[int] = set()
    most = 0
    monkeypatch.setattr(video._Pictures, "write", lambda self, frame: time.sleep(2e-4))

    def parts() -> Iterator[torch.Tensor]:
        nonlocal most
        for i in range(100):
            part = noise(2, 8, 8)
            alive.add(i)
            weakref.finalize(part, alive.discard, i)
            most = max(most, len(alive))
            yield part
            del part

    shown: list[int] = []
    size = (8, 8)
    write_video(parts(), tmp_path / "a", size, 200, progress=shown.append)
    assert 2 <= most <= 4
    assert shown == list(range(2, 201, 2))


def slow_write(path: str) -> Callable[[], int]:
    """What a command runs that is told to end: a clip that takes a minute."""

    def parts() -> Iterator[torch.Tensor]:
        for i in range(600):
            yield noise(1)
            if i == 3:
                print("ready", flush=True)
            time.sleep(0.1)

    def run() -> int:
        write_video(parts(), path, (HEIGHT, WIDTH), 600)
        return 0

    return run


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("name", ["a.mp4", "a"])
def test_signals_leave_nothing_behind(
    request: pytest.FixtureRequest, tmp_path: Path, name: str, number: signal.Signals
):
    if "." in name:
        request.getfixturevalue("av")
    script = f"""
import signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
signal.signal(signal.SIGINT, signal.default_int_handler)
from cosmos3_fast.cli import main as cli
from test_video_writing import slow_write
run = slow_write(sys.argv[1])
cli._Parser.parse_args = lambda self, argv: type("Args", (), {{"run": lambda self, args: run()}})()
sys.exit(cli.main([]))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path / name],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    said = "interrupted" if number == signal.SIGINT else f"stopped by {number.name}"
    assert error == f"error: {said}\n"
    assert list(tmp_path.iterdir()) == []
