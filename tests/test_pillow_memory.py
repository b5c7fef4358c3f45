"""Pictures read where Pillow keeps them."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from cosmos3_fast.pillow_memory import in_one_piece, pixels_of
from cosmos3_fast.pixels import load_frames

pytestmark = pytest.mark.skipif(
    not hasattr(Image.Image, "__arrow_c_array__"), reason="Pillow exports no memory"
)

LARGE = 5_000_000  # pixels of 4 bytes, where Pillow's pieces are of 16 MB


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


def test_a_picture_in_pieces_is_read_all_the_same() -> None:
    height, width = 2000, LARGE // 2000
    pieces = noise(height, width)
    assert pixels_of(pieces) is None
    with in_one_piece():
        whole = pieces.copy()
    assert pixels_of(whole) is not None
    assert torch.equal(load_frames(whole, 48, 80), load_frames(pieces, 48, 80))


def test_pillows_setting_is_as_before() -> None:
    def setting() -> int:
        return Image.core.get_use_block_allocator()

    assert setting() == 0
    with in_one_piece():
        with pytest.raises(ZeroDivisionError), in_one_piece():
            raise ZeroDivisionError
        assert setting() == 1
    assert setting() == 0
    # Two threads, of which the first to enter is the first to leave.
    entered, left = threading.Event(), threading.Event()

    def first() -> None:
        with in_one_piece():
            entered.set()
            assert second_entered.wait(10)
        left.set()

    second_entered = threading.Event()
    thread = threading.Thread(target=first)
    thread.start()
    assert entered.wait(10)
    with in_one_piece():
        second_entered.set()
        assert left.wait(10)
        assert setting() == 1
    thread.join()
    assert setting() == 0
    Image.core.set_use_block_allocator(1)
    try:
        with in_one_piece():
            pass
        assert setting() == 1
    finally:
        Image.core.set_use_block_allocator(0)


def test_without_the_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in Pillow before 11.2."""
    image = noise(90, 130)
    wanted = load_frames(image, 48, 80)
    monkeypatch.delattr(Image.Image, "__arrow_c_array__")
    assert pixels_of(image) is None
    assert torch.equal(load_frames(image, 48, 80), wanted)
