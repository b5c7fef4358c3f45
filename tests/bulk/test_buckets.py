"""Aspect-ratio buckets, and the box of a picture that is encoded."""

from __future__ import annotations

import argparse
import math

import pytest
import torch
from bulk_cases import picture
from hypothesis import given
from hypothesis import strategies as st

from cosmos3_fast.bulk.buckets import MEGAPIXEL, Sizes, areas_option, buckets, crop_box
from cosmos3_fast.images.load import load_frames


def test_a_square_bucket_is_what_trainers_call_it():
    assert Sizes(None, areas_option("1M"), 16).choose(3000, 3000) == (1024, 1024)
    assert Sizes(None, areas_option("0.25M,1M"), 16).choose(600, 600) == (512, 512)


@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([8, 16]))
def test_the_bucket_next_to_the_aspect_ratio(height: int, width: int, factor: int):
    areas = (MEGAPIXEL // 4, MEGAPIXEL)
    chosen = Sizes(None, areas, factor).choose(height, width)
    area = MEGAPIXEL if height * width >= MEGAPIXEL else MEGAPIXEL // 4
    assert chosen in buckets(area, factor)
    assert all(side % factor == 0 for side in chosen)
    # No bucket exceeds its area, nor leaves room for another column of its rows.
    assert area - max(chosen) * factor < chosen[0] * chosen[1] <= area
    distance = abs(math.log(chosen[1] / chosen[0] * height / width))
    for other in buckets(area, factor):
        assert distance <= abs(math.log(other[1] / other[0] * height / width)) + 1e-12


@pytest.mark.parametrize("factor", [8, 16])
def test_buckets_have_both_orientations(factor: int):
    sizes = buckets(MEGAPIXEL, factor)
    assert {(width, height) for height, width in sizes} == set(sizes)
    assert max(width / height for height, width in sizes) <= 4


@pytest.mark.parametrize("text", ["", "1G", "-1M", "1M,,2M", "M"])
def test_areas_that_are_none(text: str):
    with pytest.raises(argparse.ArgumentTypeError, match="must be areas such as"):
        areas_option(text)


@pytest.mark.parametrize(("height", "width"), [(40, 90), (90, 40), (24, 60), (20, 8)])
def test_the_crop_box_is_what_is_shown(height: int, width: int):
    # Nothing outside the box, but for the reach of the filter, changes what is encoded.
    target = (16, 16)
    left, top, right, bottom = crop_box(height, width, *target)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert (right - left) / (bottom - top) == pytest.approx(1, rel=0.05)
    reach = 3 * max(1.0, (right - left) / target[1], (bottom - top) / target[0])
    image = picture(0, height, width)
    painted = image.copy()
    box = (left - reach, top - reach, right + reach, bottom + reach)
    for y in range(height):
        for x in range(width):
            if not (box[0] <= x < box[2] and box[1] <= y < box[3]):
                painted.putpixel((x, y), (0, 0, 0))
    assert painted.tobytes() != image.tobytes()
    assert torch.equal(load_frames(image, *target), load_frames(painted, *target))
