"""Pictures to pixels: `resize_crop` and `load_frames` against Pillow and inexact resizes."""

from __future__ import annotations

import importlib
import io
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.cases import OURS, PHOTOGRAPH, sides
from benchmarks.harness import Row, Suite, gate_equal, say, timed_rows
from cosmos3_fast import ops
from cosmos3_fast.images.load import load_frames

PILLOW, TORCHVISION, OPENCV = "Pillow", "torchvision, bicubic", "OpenCV, area"
DECODE, DECODE_AND_RESIZE = "Pillow's decode alone", "Pillow, decode and resize"
ONE_THREAD = ", 1 thread"

Box = tuple[int, int, int, int]


def photograph(size: str) -> Image.Image:
    """The example picture, enlarged to "HEIGHTxWIDTH"."""
    height, width = sides(size)
    with Image.open(PHOTOGRAPH) as picture:
        return picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)


def with_grain(picture: Image.Image) -> Image.Image:
    """As a camera's pictures have: decoding takes as long as a file is large."""
    noise = np.random.default_rng(0).normal(0, 4, (picture.height, picture.width, 1))
    return Image.fromarray((np.asarray(picture) + noise).clip(0, 255).astype(np.uint8))


def covering(picture: Image.Image, wanted: str) -> tuple[tuple[int, int], Box]:
    """Height and width that cover `wanted`, and the center's top, left, height and width."""
    height, width = sides(wanted)
    scale = max(width / picture.width, height / picture.height)
    size = math.ceil(scale * picture.height), math.ceil(scale * picture.width)
    return size, ((size[0] - height) // 2, (size[1] - width) // 2, height, width)


def with_pillow(picture: Image.Image, size: tuple[int, int], crop: Box) -> Image.Image:
    top, left, height, width = crop
    whole = picture.resize(size[::-1], Image.Resampling.LANCZOS)
    return whole.crop((left, top, left + width, top + height))


def as_tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture))


def inexact(
    pixels: Tensor, size: tuple[int, int], crop: Box
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What users take who give up Pillow's bytes, where it can be imported."""
    top, left, height, width = crop
    planes, array = pixels.permute(2, 0, 1), pixels.numpy()
    if (functional := imported("torchvision.transforms.v2.functional", TORCHVISION)) is not None:
        bicubic = functional.InterpolationMode.BICUBIC
        yield (
            TORCHVISION,
            lambda: functional.crop(
                functional.resize(planes, list(size), bicubic, antialias=True), *crop
            ).permute(1, 2, 0),
        )
    if (cv2 := imported("cv2", OPENCV)) is not None:
        yield (
            OPENCV,
            lambda: torch.from_numpy(
                cv2.resize(array, size[::-1], interpolation=cv2.INTER_AREA)[
                    top : top + height, left : left + width
                ]
            ),
        )


def imported(module: str, path: str) -> Any | None:
    try:
        return importlib.import_module(module)
    except Exception as error:  # torchvision without its library raises what it likes
        say(f"pixels: {path} is left out ({type(error).__name__}: {error})")
        return None


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def pixels(sizes: tuple[str, ...], wanted: str, rounds: int) -> Iterator[Row]:
    for source in sizes:
        yield from _resizes(source, wanted, rounds)
    yield from _files(sizes[-1], wanted, rounds)


def _resizes(source: str, wanted: str, rounds: int) -> Iterator[Row]:
    picture = photograph(source)
    size, crop = covering(picture, wanted)
    given = as_tensor(picture)
    paths: dict[str, Callable[[], Any]] = {
        PILLOW: lambda: with_pillow(picture, size, crop),
        OURS: lambda: ops.resize_crop(given, size, crop),
    }
    case = f"{source} to {wanted}"
    reference = as_tensor(with_pillow(picture, size, crop))
    gate_equal(f"pixels {case}", ops.resize_crop(given, size, crop), reference)
    errors = {OURS: 0.0}
    for name, path in inexact(given, size, crop):
        paths[name] = path
        errors[name] = float((path().int() - reference.int()).abs().max()) / 255
    yield from timed_rows("pixels", case, "uint8", paths, PILLOW, rounds=rounds, errors=errors)
    with threads(1):
        yield from timed_rows(
            "pixels", case + ONE_THREAD, "uint8", paths, PILLOW, rounds=rounds, errors=errors
        )


def _files(source: str, wanted: str, rounds: int) -> Iterator[Row]:
    picture = with_grain(photograph(source))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    data, (height, width) = buffer.getvalue(), sides(wanted)

    def decode() -> Image.Image:
        with Image.open(io.BytesIO(data)) as opened:
            opened.load()
        return opened

    size, crop = covering(picture, wanted)
    paths: dict[str, Callable[[], Any]] = {
        DECODE: decode,
        DECODE_AND_RESIZE: lambda: as_tensor(with_pillow(decode(), size, crop)),
        OURS: lambda: load_frames(data, height, width),
    }
    case = f"JPEG of {source} to {wanted}"
    gate_equal(f"pixels {case}", paths[OURS]()[0], paths[DECODE_AND_RESIZE]())
    yield from timed_rows("pixels", case, "uint8", paths, DECODE, rounds=rounds, errors={OURS: 0.0})


SUITE = Suite(
    pixels,
    {
        "tiny": {"sizes": ("64x96", "128x200"), "wanted": "32x48", "rounds": 1},
        "short": {"sizes": ("1280x1920", "3024x4032"), "wanted": "480x832", "rounds": 15},
        "full": {"sizes": ("1280x1920", "3024x4032"), "wanted": "480x832", "rounds": 41},
    },
)
