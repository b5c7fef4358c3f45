"""Random calls of the emulated `pack_pixels` and `unpack_pixels`, each compared with the reference
to the bit; `cuda_emulation_run.py` runs them."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from cuda_emulation import Emulation, refusal_fault, trace_fault
from cuda_emulation_cases import same_bits, values
from op_inputs import DTYPES
from torch import Tensor

from cosmos3_fast.ops.pack_pixels import check_pixels, pack_pixels_reference
from cosmos3_fast.ops.unpack_pixels import check_patches, unpack_pixels_reference

REFERENCES: dict[str, Callable[..., Tensor]] = {
    "pack_pixels": pack_pixels_reference,
    "unpack_pixels": unpack_pixels_reference,
}
CHANNELS_LAST = (0, 2, 3, 1)


@dataclass
class Case:
    x: Tensor
    rest: tuple[Any, ...]
    seed: int

    def __str__(self) -> str:
        return (
            f"case {self.seed}: {self.x.dtype} {list(self.x.shape)} strides {self.x.stride()} at "
            f"{self.x.storage_offset()}, {self.rest}"
        )


def strided(rng: random.Random, shape: list[int], dtype: torch.dtype, seed: int) -> Tensor:
    """[B, C, H, W] in any order of dimensions, most often channels-last or contiguous, with padding
    after some, an offset, and some dimensions of stride 0."""
    order = [*rng.choice(((0, 1, 2, 3), CHANNELS_LAST, CHANNELS_LAST))]
    dense = rng.random() < 0.4
    if not dense and rng.random() < 0.3:
        rng.shuffle(order)
    strides, step = [0] * 4, 1
    for dim in reversed(order):
        strides[dim] = step
        if not dense and shape[dim] > 1 and rng.random() < 0.1:
            strides[dim] = 0
        else:
            step = step * max(shape[dim], 1) + (0 if dense else rng.choice((0, 0, 1, 3, 8)))
    offset = rng.choice((0, 0, 8, 1, 5))
    last = sum((n - 1) * s for n, s in zip(shape, strides, strict=True) if n > 1)
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.uint8:
        memory = torch.randint(0, 256, (offset + last + 1,), generator=generator, dtype=dtype)
    else:
        memory = values(offset + last + 1, dtype, generator)
    return memory.as_strided(shape, strides, offset)


def random_case(op: str, seed: int) -> Case:
    rng = random.Random(seed)
    patch = rng.choice((1, 2, 2, 3, 4))
    rows, columns = rng.randint(1, 4), rng.choice((1, 2, 3, 4, 5, 8, 16, 17))
    if rng.random() < 0.1:
        columns = rng.choice((130, 257, 300))  # several blocks to a row
    batch = rng.randint(1, 3)
    if rng.random() < 0.04:
        batch, rows, columns = rng.choice(((0, rows, columns), (batch, 0, columns), (batch, 1, 0)))
    filled = 3 * patch**2
    if op == "unpack_pixels":
        x = strided(rng, [batch, filled, rows, columns], rng.choice(DTYPES), seed)
        return Case(x, (patch, rng.random() < 0.5), seed)
    dtype = rng.choice((torch.uint8, *DTYPES))
    x = strided(rng, [batch, 3, rows * patch, columns * patch], dtype, seed)
    channels = rng.choice((0, 0, filled, filled + rng.randint(1, 20), -(-filled // 8) * 8))
    rest = (patch, rng.choice(DTYPES), channels)
    return Case(x.permute(0, 2, 3, 1) if dtype == torch.uint8 else x, rest, seed)


def limit_cases(op: str) -> Iterator[Case]:
    """More rows and batch entries than a grid has, in y and in z; patches of many channels."""
    generator = torch.Generator().manual_seed(0)
    for seed, (batch, rows) in enumerate(((1, 65540), (65537, 1))):
        x = torch.randn(batch, 3, rows, 1, generator=generator)
        flags: tuple[Any, ...] = (torch.bfloat16, 0) if op == "pack_pixels" else (seed == 0,)
        yield Case(x, (1, *flags), -1 - seed)
    if op == "pack_pixels":
        yield Case(torch.randn(1, 3, 40, 80, generator=generator), (40, torch.half, 4801), -3)
    else:
        yield Case(torch.randn(1, 4800, 1, 2, generator=generator), (40, True), -3)


def fault_in_values(op: str, emulation: Emulation, case: Case) -> str | None:
    emulation.seed(case.seed)
    got = emulation.ops[op](case.x, *case.rest)
    wanted = REFERENCES[op](case.x, *case.rest)
    layout = torch.channels_last if op == "pack_pixels" else torch.contiguous_format
    if not got.is_contiguous(memory_format=layout):
        return "the result is not dense"
    equal = torch.equal if wanted.dtype == torch.uint8 else same_bits
    return None if equal(got, wanted) else "the result differs from the reference"


def fault_in_accesses(op: str, emulation: Emulation, case: Case) -> str | None:
    emulation.accesses()
    emulation.seed(case.seed)
    got = emulation.ops[op](case.x, *case.rest)
    return trace_fault(emulation.accesses(), [case.x] if case.x.numel() else [], [got])


def fault_in_refusals(op: str, emulation: Emulation) -> str | None:
    """Whether the host function refuses what the reference's check refuses, in its words."""
    image, patches = torch.zeros(1, 3, 4, 6), torch.zeros(1, 12, 2, 3)
    faulty: list[tuple[Any, ...]] = [
        (image[0], 2, torch.float32),
        (image.int(), 2, torch.float32),
        (image.byte(), 2, torch.float32),
        (image, 2, torch.uint8),
        (image, 0, torch.float32),
        (image[:0], 1 << 62, torch.float32),
        (image, 4, torch.float32),
        (image, 2, torch.float32, 11),
    ]
    check: Callable[..., None] = check_pixels
    if op == "unpack_pixels":
        check = check_patches
        faulty = [(patches[0], 2), (patches.int(), 2), (patches, 0), (patches, 1 << 62), (image, 2)]
    found = (refusal_fault(emulation.ops[op], check, arguments) for arguments in faulty)
    return next(filter(None, found), None)


def run(op: str, emulation: Emulation, first: int, count: int, traced: bool) -> Counter[str]:
    """Calls made.

    Raises:
        AssertionError: the first call that is wrong, and what is wrong with it.
    """
    torch.set_num_threads(1)
    made: Counter[str] = Counter()
    fault = fault_in_refusals(op, emulation)
    assert fault is None, fault
    check = fault_in_accesses if traced else fault_in_values
    random_cases = (random_case(op, seed) for seed in range(first, first + count))
    for case in itertools.chain(random_cases, limit_cases(op) if not traced and first == 0 else ()):
        fault = check(op, emulation, case)
        assert fault is None, f"{fault} in {case}"
        made[op] += 1
    return made
