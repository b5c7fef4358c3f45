"""Random pictures, sizes, crops and memory layouts for `resize_crop`; Pillow's result of each.

As a script: compares so many cases with Pillow in every byte, prints how many.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor

from cosmos3_fast import ops
from cosmos3_fast.ops.resize_crop import FILTERS

LAYOUTS = ("interleaved", "planar", "with alpha", "sliced", "stepped", "expanded")
# Bytes that Pillow has to make, between its passes too.
LARGEST = 3_000_000


@dataclass(frozen=True)
class Case:
    """Arguments of one call."""

    image: Tensor
    size: tuple[int, int]
    crop: tuple[int, int, int, int]
    filter: str

    def __str__(self) -> str:
        return (
            f"image {list(self.image.shape)} strides {self.image.stride()} at "
            f"{self.image.storage_offset()}, size {self.size}, crop {self.crop}, {self.filter}"
        )

    def pillow(self) -> Tensor:
        """uint8 [h, w, 3]: the whole image resized, then cropped."""
        whole = Image.fromarray(self.image.cpu().contiguous().numpy())
        resized = whole.resize(self.size[::-1], Image.Resampling[self.filter.upper()])
        top, left, height, width = self.crop
        return torch.from_numpy(np.array(resized.crop((left, top, left + width, top + height))))


def in_layout(values: Tensor, layout: str) -> Tensor:
    """`values` [H, W, 3] in memory of another kind."""
    height, width, _ = values.shape
    match layout:
        case "interleaved":
            return values
        case "planar":
            return values.permute(2, 0, 1).contiguous().permute(1, 2, 0)
        case "with alpha":  # as Pillow keeps RGB too; nothing follows the last byte of color
            memory = torch.arange(4 * height * width - 1).to(torch.uint8)
            x = memory.as_strided((height, width, 3), (4 * width, 4, 1))
        case "sliced":  # rows of a larger image, at an odd offset
            x = torch.zeros(height + 2, width + 3, 3, dtype=torch.uint8)[1:-1, 2:-1]
        case "stepped":
            x = torch.zeros(2 * height, 2 * width, 3, dtype=torch.uint8)[::2, 1::2]
        case "expanded":  # one row, or one column, for all
            return (values[:1] if height % 2 else values[:, :1]).expand(height, width, 3)
    return x.copy_(values)


def side(rng: random.Random, largest: int) -> int:
    kind = rng.random()
    if kind < 0.15:
        return rng.randint(1, 9)
    return rng.randint(1, min(largest, 200 if kind < 0.75 else 900 if kind < 0.95 else 5000))


def random_case(seed: int, largest: int = 5000) -> Case:
    """Sides of 1 … `largest`, up, down or kept; any crop of the result."""
    rng = random.Random(seed)
    while True:
        (h, w), (height, width) = ((side(rng, largest), side(rng, largest)) for _ in range(2))
        if rng.random() < 0.1:
            height = h
        if rng.random() < 0.1:
            width = w
        if max(h * w, height * width, h * width, w * height) * 3 <= LARGEST:
            break
    rows, columns = rng.randint(1, height), rng.randint(1, width)
    if rng.random() < 0.2:
        rows, columns = height, width
    crop = (rng.randint(0, height - rows), rng.randint(0, width - columns), rows, columns)
    values = np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)
    if rng.random() < 0.3:  # black and white: the filters overshoot
        values = (values > 127).astype(np.uint8) * 255
    image = in_layout(torch.from_numpy(values), rng.choice(LAYOUTS))
    return Case(image, (height, width), crop, rng.choice(FILTERS))


def limit_cases() -> Iterator[Case]:
    """One pixel to many, many to one, extreme ratios, sizes that stay."""
    sizes = [
        ((1, 1), (1, 1)), ((1, 1), (40, 50)), ((40, 50), (1, 1)), ((1, 5000), (80, 3)),
        ((5000, 1), (3, 80)), ((2, 3), (5000, 20)), ((3, 2), (20, 5000)), ((5000, 30), (1, 30)),
        ((30, 5000), (30, 1)), ((33, 65), (33, 65)), ((33, 65), (32, 65)), ((33, 65), (33, 66)),
        ((7, 500), (500, 7)), ((500, 7), (7, 500)),
        ((900, 5), (90, 40)), ((505, 5), (500, 40)), ((495, 5), (90, 40)), ((90, 90), (40, 66)),
    ]  # fmt: skip
    for seed, ((h, w), (height, width)) in enumerate(sizes):
        values = np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)
        for name in FILTERS:
            image = torch.from_numpy(values)
            yield Case(image, (height, width), (0, 0, height, width), name)
            yield Case(image, (height, width), (height - 1, width - 1, 1, 1), name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0, help="seed of the first case")
    parser.add_argument("--count", type=int, default=10_000)
    given = parser.parse_args()
    made: Counter[str] = Counter()
    for seed in range(given.first, given.first + given.count):
        case = random_case(seed)
        got = ops.resize_crop(case.image, case.size, case.crop, case.filter)
        if not torch.equal(got, case.pillow()):
            print(f"case {seed} differs from Pillow {PIL.__version__}: {case}")
            return 1
        made[case.filter] += 1
    print(f"equal to Pillow {PIL.__version__} in every byte: {dict(made)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
