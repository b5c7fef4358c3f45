"""Random calls of the emulated `transform_frames`, each compared with float64 and, of the sums,
with the reference; `cuda_emulation_run.py` runs them."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from cuda_emulation import Emulation, refusal_fault, trace_fault
from frame_products import BF16, DTYPES, F16, F32, F64, FORMS, LAYOUTS, Call, fault, make_call
from op_inputs import DTYPES as ALL
from torch import Tensor

from cosmos3_fast.ops.transform_frames import check_transform, transform_frames_reference

# On both sides of what a thread, a warp and a block hold, with and without whole vectors.
CHANNELS = (1, 3, 4, 7, 8, 12, 16, 24, 32, 40, 64, 96, 128, 136, 192, 256, 264, 320, 512, 516)
MANY_CHANNELS = (768, 1024, 1028, 2048, 2056)
# Triples that vectors take; all others are taken one element at a time.
MIXED = (*DTYPES, (F32, F32, F16), (F32, BF16, F32), (BF16, F32, F32))


def vector(rng: random.Random, size: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Around 1, on a 16-byte boundary or not."""
    offset = rng.choice((0, 0, 0, 1))
    generator = torch.Generator().manual_seed(seed)
    return (1 + 0.5 * torch.randn(offset + size, generator=generator)).to(dtype)[offset:]


def shifted(rng: random.Random, x: Tensor) -> Tensor:
    """The same values with the same strides, perhaps off a 16-byte boundary."""
    offset = rng.choice((0, 0, 0, 1))
    memory = torch.empty(offset + x.numel(), dtype=x.dtype)
    return memory[offset:].view(x.movedim(-3, -1).shape).movedim(-1, -3).copy_(x)


def random_case(seed: int, dense: bool = False) -> Call:
    """With `dense`, what the op reads where it lies: nothing is copied before."""
    rng = random.Random(seed)
    count, to = FORMS[seed % len(FORMS)]
    dtypes = rng.choice(MIXED)
    channels = rng.choice(CHANNELS) if rng.random() < 0.9 else rng.choice(MANY_CHANNELS)
    most = 1 if channels > 256 else 3
    image = (rng.randint(1, 2), channels, rng.randint(1, most), rng.randint(1, most))
    if rng.random() < 0.03:
        image = (*image[:2], 0, image[3])
    names = ("bias", "residual", "weight", "past", "scales")
    call = make_call(
        *(count, to, rng.choice((1, 1, 2, 3, 4, 4, 5, 8, 9)), image, dtypes),
        layout="channels_last" if dense else rng.choice(LAYOUTS),
        seed=seed,
        absent=tuple(n for n in names if rng.random() < 0.25),
        silu=rng.random() < 0.7,
        keep_sum=rng.random() < 0.7,
    )
    for name in ("bias", "weight"):
        if name in call.named:
            dtype = dtypes[0] if rng.random() < 0.5 else rng.choice(ALL)
            call.named[name] = vector(rng, channels, dtype, seed + len(name))
    if dense:
        call.products = [shifted(rng, x) for x in call.products]
        for name in ("residual", "past"):
            if name in call.named:
                call.named[name] = shifted(rng, call.named[name])
    return call


def edge_cases() -> Iterator[Call]:
    """More pixels than a block has, norms below the clamp, scales that keep float16 finite."""
    for dtypes in ((F16, BF16, F16), (F32,) * 3, (F64,) * 3):
        yield make_call(6, 4, 4, (2, 16, 7, 9), dtypes)
        tiny = make_call(6, 4, 5, (1, 32, 1, 2), dtypes, absent=("residual", "bias"))
        for x in tiny.products:
            x.mul_(0.0 if dtypes[0] == F16 else 1e-15)
        yield tiny
    large = make_call(6, 0, 4, (1, 64, 1, 2), (F16, F32, F16))
    for x in large.products:
        x.mul_(10000.0)
    yield large


def call_op(emulation: Emulation, case: Call, seed: int) -> tuple[Tensor, ...]:
    emulation.seed(seed)
    return emulation.ops["transform_frames"](*case.all())


def fault_in_values(emulation: Emulation, case: Call, seed: int) -> str | None:
    """What is wrong with the outputs: sums are equal to the reference's, one order of additions."""
    before = emulation.launches()
    got = call_op(emulation, case, seed)
    wanted = transform_frames_reference(*case.all())
    if not torch.equal(got[0], wanted[0]):
        return "sum differs from the reference"
    if emulation.launches() - before > 1:
        return "it launches more than once"
    return fault(case, got)


def fault_in_accesses(emulation: Emulation, case: Call, seed: int) -> str | None:
    """What is wrong with the loads and stores."""
    emulation.accesses()
    got = call_op(emulation, case, seed)
    named = case.named
    read = [*case.products, named.get("bias"), named.get("residual")]
    if named["to"]:
        read += [named.get("weight"), named.get("past")]
    runs = case.products[0].numel() and (named["keep_sum"] or named["to"])
    there = [x for x in read if x is not None] if runs else []
    return trace_fault(emulation.accesses(), there, list(got))


def fault_in_refusals(emulation: Emulation) -> str | None:
    """Whether the host function refuses what the reference's check refuses, in its words."""
    x = torch.zeros(4, 3, 2, 5)
    for arguments in (
        ([x, x], 4),
        ([x], 3),
        ([x], 4, 3),
        ([x], 0),
        ([x, x, x.bfloat16()], 4),
        ([x[0]], 4),
        ([x], 4, 1, x[0, :2, 0, 0]),
        ([x], 4, 1, None, x),
        ([x], 4, 1, None, None, None, True, x.view(2, 2, 3, 2, 5)),
        ([x], 4, 1, None, None, None, True, None, [1.0, 2.0]),
        ([x], 4, 1, None, None, None, True, None, None, True, F64),
        ([x], 4, 2, None, None, None, True, None, None, True, None, None, 0.0),
    ):
        found = refusal_fault(emulation.ops["transform_frames"], check_transform, arguments)
        if found is not None:
            return found
    return None


def run(emulation: Emulation, first: int, count: int, traced: bool) -> Counter[str]:
    """Calls made.

    Raises:
        AssertionError: the first call that is wrong, and what is wrong with it.
    """
    torch.set_num_threads(1)
    made: Counter[str] = Counter()
    check: Any = fault_in_accesses if traced else fault_in_values
    found = fault_in_refusals(emulation)
    assert found is None, found
    edges = () if traced else ((-1 - i, case) for i, case in enumerate(edge_cases()))
    cases = ((seed, random_case(seed, dense=traced)) for seed in range(first, first + count))
    for seed, case in itertools.chain(edges, cases):
        found = check(emulation, case, seed)
        assert found is None, f"{found} in case {seed}: {case}"
        made["transform_frames"] += 1
    return made
