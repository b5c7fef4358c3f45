"""Videos as a player shows them: turned, mirrored, in the colors that their tags say."""

from __future__ import annotations

import io
import struct
import warnings
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cosmos3_fast.images.load import load_frames

av = pytest.importorskip("av", reason="PyAV is not installed (the extra [video])")

HEIGHT, WIDTH = 32, 48


def picture() -> np.ndarray:
    """Blocks of 8x8 pixels, which a codec hardly changes."""
    blocks = np.random.default_rng(0).integers(0, 256, (HEIGHT // 8, WIDTH // 8, 1), np.uint8)
    return np.kron(blocks, np.ones((8, 8, 3), np.uint8))


def mp4(**settings: Any) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=24, options={"qscale": "1"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for name, value in settings.items():
            setattr(stream.codec_context, name, value)
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture())))
        container.mux(stream.encode())
    return buffer.getvalue()


def with_matrix(content: bytes, a: int, b: int, c: int, d: int) -> bytes:
    """The same video with another display matrix in its track's header."""
    start = content.index(b"tkhd") + 4 + 40
    one = 1 << 16
    matrix = struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
    return content[:start] + matrix + content[start + 36 :]


@pytest.mark.parametrize(
    ("a", "b", "c", "d"),
    [
        *((1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)),
        *((-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0), (0, -1, -1, 0)),
    ],
)
def test_the_display_matrix_turns_and_mirrors(a: int, b: int, c: int, d: int):
    content = mp4()
    plain = load_frames(content, HEIGHT, WIDTH)[0, 0].numpy()
    assert np.abs(plain.astype(int) - picture()).mean() < 8
    # Each pixel (x, y) goes to (a·x + c·y, b·x + d·y), moved to begin at 0.
    size = (HEIGHT, WIDTH) if a or d else (WIDTH, HEIGHT)
    wanted = np.empty((*size, 3), np.uint8)
    for y in range(HEIGHT):
        for x in range(WIDTH):
            column, row = a * x + c * y - (a + c < 0), b * x + d * y - (b + d < 0)
            wanted[row % size[0], column % size[1]] = plain[y, x]
    shown = load_frames(with_matrix(content, a, b, c, d), *size)
    assert shown.shape == (1, 3, *size, 3)
    assert torch.equal(shown[0, 0], torch.from_numpy(wanted))


MATRICES = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 6: (0.299, 0.114), 9: (0.2627, 0.0593)}
"""Kr and Kb by the number of the color space: BT.709, BT.601 (twice), BT.2020; ITU-T H.273."""


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("space", [*MATRICES, 2])
@pytest.mark.parametrize("height", [32, 720])
def test_the_colors_are_those_of_the_tags(space: int, full: bool, height: int):
    """Without a tag BT.601, whatever the size, and limited range: as ffmpeg has it."""
    y, u, v = 120, 90, 160
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=24)
        stream.width, stream.height, stream.pix_fmt = 3 * height // 2, height, "yuv444p"
        stream.codec_context.colorspace = space
        stream.codec_context.color_range = 2 if full else 1
        frame = av.VideoFrame(stream.width, height, "yuv444p")
        for plane, value in zip(frame.planes, (y, u, v), strict=True):
            plane.update(bytes([value]) * plane.buffer_size)
        frame.colorspace, frame.color_range = space, 2 if full else 1
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    kr, kb = MATRICES.get(space, MATRICES[5])
    low, luma, chroma = (0, 255, 255) if full else (16, 219, 224)
    light, blue, red = (y - low) / luma, (u - 128) / chroma, (v - 128) / chroma
    r, b = light + 2 * (1 - kr) * red, light + 2 * (1 - kb) * blue
    g = (light - kr * r - kb * b) / (1 - kr - kb)
    wanted = 255 * np.array([r, g, b])
    got = load_frames(buffer.getvalue(), 32, 48)[0, 0, 8, 8].numpy()
    # swscale computes in fixed point.
    assert np.abs(got - wanted).max() <= 1.5


def test_pixels_that_are_no_squares_are_said():
    with pytest.warns(UserWarning, match="has pixels of the shape 4:3, which are taken as squares"):
        assert load_frames(mp4(sample_aspect_ratio=Fraction(4, 3)), HEIGHT, WIDTH).shape[1] == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_frames(mp4(), HEIGHT, WIDTH)


def test_a_file_without_video_is_named():
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=48000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 48000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(ValueError, match=r"image .* is a file without video: it holds only audio"):
        load_frames(buffer.getvalue(), HEIGHT, WIDTH)


def test_containers_are_known_by_how_they_begin(tmp_path: Path):
    """Whatever their name, and where bytes have none; a mov may begin with any of its boxes."""
    content = mp4()
    assert content[4:8] == b"ftyp"
    wanted = load_frames(content, HEIGHT, WIDTH)
    for box in (b"free", b"skip", b"wide"):
        assert torch.equal(load_frames(content[:4] + box + content[8:], HEIGHT, WIDTH), wanted)
    for kind in ("matroska", "mpegts", "flv", "asf", "avi", "mov"):
        path = tmp_path / kind
        codec = "flv" if kind == "flv" else "mpeg2video" if kind == "mpegts" else "mpeg4"
        with av.open(str(path), "w", format=kind) as container:
            stream = container.add_stream(codec, rate=24)
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
            for _ in range(40):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture())))
            container.mux(stream.encode())
        for given in (path, path.read_bytes()):
            frames = load_frames(given, HEIGHT, WIDTH, max_frames=3)
            assert frames.shape == (1, 3, HEIGHT, WIDTH, 3), kind


def test_an_old_pyav_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(av, "__version__", "13.1.0")
    with pytest.raises(ValueError, match=r"PyAV must be 17 or newer, got 13.1.0: pip install"):
        load_frames(mp4(), HEIGHT, WIDTH)
