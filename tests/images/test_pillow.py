"""Pictures read where Pillow keeps them."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from PIL import Image

from cosmos3_fast.images.load import load_frames
from cosmos3_fast.images.pillow import pixels_of

pytestmark = pytest.mark.skipif(
    not hasattr(Image.Image, "__arrow_c_array__"), reason="Pillow exports no memory"
)

LARGE = (2000, 2500)  # pixels of 4 bytes, where Pillow's pieces are of 16 MB


def noise(height: int, width: int, mode: str = "RGB") -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(height + width).integers(
        0, 256, (height, width, channels), dtype=np.uint8
    )
    return Image.fromarray(values.squeeze(2) if channels == 1 else values)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 1), (33, 65), (480, 832)])
def test_the_pixels_are_the_pictures(size: tuple[int, int]) -> None:
    image = noise(*size)
    pixels = pixels_of(image)
    assert pixels is not None
    assert pixels.stride() == (4 * size[1], 4, 1)
    assert torch.equal(pixels, torch.from_numpy(np.array(image)))
    again = pixels_of(image)
    assert again is not None
    assert again.data_ptr() == pixels.data_ptr()


def test_they_outlive_the_picture() -> None:
    image = noise(300, 400)
    wanted = torch.from_numpy(np.array(image))
    pixels = pixels_of(image)
    del image
    gc.collect()
    others = [noise(300, 400 + i) for i in range(5)]  # would reuse the memory
    assert pixels is not None
    assert torch.equal(pixels, wanted)
    assert len(others) == 5


@pytest.mark.parametrize("mode", ["L", "1"])
def test_pictures_of_one_byte_a_pixel_have_no_such_memory(mode: str) -> None:
    assert pixels_of(Image.new(mode, (3, 4))) is None


@pytest.mark.parametrize("target", [(48, 80), (80, 30), (1500, 2400)])
def test_a_picture_in_pieces_is_read_all_the_same(target: tuple[int, int]) -> None:
    pieces = noise(*LARGE)
    assert pixels_of(pieces) is None
    array = torch.from_numpy(np.array(pieces))
    assert torch.equal(load_frames(pieces, *target), load_frames(array, *target))


def test_without_the_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in Pillow before 11.2."""
    images = [noise(90, 130), noise(*LARGE), noise(1500, 9)]
    wanted = [load_frames(image, 48, 80) for image in images]
    monkeypatch.delattr(Image.Image, "__arrow_c_array__")
    for image, frames in zip(images, wanted, strict=True):
        assert pixels_of(image) is None
        assert torch.equal(load_frames(image, 48, 80), frames)
