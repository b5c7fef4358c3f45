"""Calls of the emulated CUDA `resize_crop`, each compared with Pillow to the bit."""

from __future__ import annotations

import itertools
from collections import Counter

import torch
from cuda_emulation import Emulation
from resize_crop_cases import limit_cases, random_case

from cosmos3_fast.ops.resize_crop import resize_crop_reference, vertical_first_in_pillow

NAME = "resize_crop"


def run(emulation: Emulation, first: int, count: int, traced: bool) -> Counter[str]:
    """Calls made.

    Args:
        traced: must be False: what the passes leave for each other lies in memory of the op's own.

    Raises:
        AssertionError: the first call that is wrong.
    """
    assert not traced
    torch.set_num_threads(1)
    resize_crop = emulation.ops[NAME]
    made: Counter[str] = Counter()
    random_cases = (random_case(seed, largest=60) for seed in range(first, first + count))
    for case in itertools.chain(limit_cases() if first == 0 else (), random_cases):
        emulation.seed(made[NAME])
        order = vertical_first_in_pillow(case.image.shape[:2], case.size)
        got = resize_crop(case.image, case.size, case.crop, case.filter, order)
        assert got.is_contiguous()
        assert torch.equal(got, case.pillow()), str(case)
        # Batches, and the order that Pillow does not take.
        batch = torch.stack([case.image, case.image.flip(0)])
        if batch.numel() < 30_000:
            arguments = (batch, case.size, case.crop, case.filter, not order)
            wanted = resize_crop_reference(*arguments)
            assert torch.equal(resize_crop(*arguments), wanted), f"batch: {case}"
        made[NAME] += 1
    empty = resize_crop(batch[:0], case.size, case.crop, case.filter)
    assert empty.shape == (0, *case.crop[2:], 3)
    return made
