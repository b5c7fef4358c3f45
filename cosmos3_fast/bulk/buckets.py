"""The size a picture is encoded at: one for all, or the aspect-ratio bucket next to its own."""

from __future__ import annotations

import argparse
import functools
import math
import re
from dataclasses import dataclass

from cosmos3_fast.images.resize import covering

MEGAPIXEL = 2**20
"""Pixels in "1M": a square bucket of 1M is 1024x1024, as trainers have it."""

_MOST_ELONGATED = 4
"""Aspect ratio of the longest bucket, either way."""


@dataclass(frozen=True)
class Sizes:
    """Which size each picture gets.

    A bucket of area A has a width w that is a multiple of the VAE's spatial factor f and the height
    `h = f · floor(A / (w·f))`: as many rows as A allows. Widths and heights are swapped to have
    both orientations, and buckets longer than 4:1 are left out. Of several areas, a picture takes
    the largest one that is not more than its own, or the smallest if all are, and of that area's
    buckets the one with the least `|log(w/h) - log(W/H)|`, which cuts off least.

    Args:
        fixed: (height, width) for every picture, or None for buckets.
        areas: of the buckets, in pixels.
        factor: pixels per latent cell; sizes are multiples of it.

    Raises:
        ValueError: neither or both of `fixed` and `areas`, or one that the factor does not allow.
    """

    fixed: tuple[int, int] | None
    areas: tuple[int, ...]
    factor: int

    def __post_init__(self) -> None:
        if (self.fixed is None) == (not self.areas):
            raise ValueError(
                f"size or buckets must be given, not both, got {self.fixed} and {self.areas}"
            )
        for name, side in zip(("height", "width"), self.fixed or (), strict=False):
            if side < 1 or side % self.factor:
                raise ValueError(
                    f"{name} must be a positive multiple of the VAE's spatial factor "
                    f"{self.factor}, got {side}"
                )
        for area in self.areas:
            if not self.factor**2 <= area <= 2**31:
                raise ValueError(
                    f"bucket area must be from {self.factor**2} pixels to 2^31, got {area}"
                )

    def choose(self, height: int, width: int) -> tuple[int, int]:
        """The (height, width) at which a picture of that size is encoded."""
        if self.fixed is not None:
            return self.fixed
        fitting = [area for area in self.areas if area <= height * width]
        area = max(fitting) if fitting else min(self.areas)
        wanted = math.log(width / height)
        return min(
            buckets(area, self.factor), key=lambda size: abs(math.log(size[1] / size[0]) - wanted)
        )


@functools.lru_cache
def buckets(area: int, factor: int) -> tuple[tuple[int, int], ...]:
    """Every (height, width) of an area, as `Sizes` describes them."""
    found = set()
    for long in range(factor, math.isqrt(area * _MOST_ELONGATED) + factor, factor):
        short = area // (long * factor) * factor
        if short and max(long, short) <= _MOST_ELONGATED * min(long, short):
            found |= {(long, short), (short, long)}
    return tuple(sorted(found)) or ((factor, factor),)


def crop_box(
    height: int, width: int, target_height: int, target_width: int
) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) that `resize.resize_to_cover` shows, in the original's pixels."""
    (resized_height, resized_width), (top, left) = covering(
        height, width, target_height, target_width
    )
    x, y = width / resized_width, height / resized_height
    right, bottom = (left + target_width) * x, (top + target_height) * y
    return left * x, top * y, min(right, width), min(bottom, height)


def areas_option(text: str) -> tuple[int, ...]:
    """ "0.25M,1M" to pixels; a plain number is in pixels."""
    areas = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)(M?)", part.strip(), re.IGNORECASE)
        if match is None:
            raise argparse.ArgumentTypeError(f"must be areas such as 0.25M,1M, got {text!r}")
        areas.append(round(float(match[1]) * (MEGAPIXEL if match[2] else 1)))
    return tuple(areas)
