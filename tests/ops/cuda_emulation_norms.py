"""Random calls of the emulated `rms_norm_silu`, `add_rms_norm_silu` and `add_pad`, each compared
with the reference; `cuda_emulation_run.py` runs them."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from cuda_emulation import Emulation, refusal_fault, trace_fault
from cuda_emulation_cases import values
from op_inputs import DTYPES
from torch import Tensor

from cosmos3_fast.ops.rms_norm_silu import (
    add_pad_reference,
    add_rms_norm_silu_reference,
    check_add_pad,
    check_norm,
    rms_norm_silu_reference,
)

REFERENCES: dict[str, Callable[..., Any]] = {
    "rms_norm_silu": rms_norm_silu_reference,
    "add_rms_norm_silu": add_rms_norm_silu_reference,
    "add_pad": add_pad_reference,
}
# On both sides of what a thread and a warp hold, with and without whole vectors.
CHANNELS = (
    1,
    2,
    3,
    7,
    8,
    12,
    31,
    32,
    33,
    48,
    64,
    96,
    160,
    256,
    264,
    320,
    500,
    512,
    640,
    1020,
    1024,
)
MANY_CHANNELS = (1025, 1028, 1032, 1056, 2048)


@dataclass
class Case:
    op: str
    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    flag: bool  # `silu`, or `pad`
    seed: int

    def arguments(self) -> tuple[Any, ...]:
        if self.op == "add_pad":
            return self.x, self.bias, self.residual, self.flag
        return self.x, self.weight, self.flag, self.bias, self.residual

    def __str__(self) -> str:
        def text(x: Tensor | None) -> str:
            return "none" if x is None else f"{x.dtype} {list(x.shape)} strides {x.stride()}"

        return (
            f"case {self.seed}, {self.op} {self.flag}: x {text(self.x)}, weight "
            f"{text(self.weight)}, bias {text(self.bias)}, residual {text(self.residual)}"
        )


def image(
    rng: random.Random, shape: list[int], dtype: torch.dtype, seed: int, dense: bool
) -> Tensor:
    """Channels-last, on a 16-byte boundary or not; or unless `dense` with a pitch, or
    contiguous."""
    batch, channels, height, width = shape
    generator = torch.Generator().manual_seed(seed)
    layout = rng.choice(("dense", "dense", "offset", "offset" if dense else "pitch", "contiguous"))
    offset = rng.choice((1, 8)) if layout == "offset" else 0
    pitch = channels + 3 if layout == "pitch" else channels
    count = batch * height * width * pitch
    memory = values(offset + count, dtype, generator)[offset:]
    # Squares of larger ones are infinite, but not where torch's norm of one channel takes none.
    large = 1e150 if dtype == torch.float64 else 1e17
    memory[(memory.abs() > large) & memory.isfinite()] = 1.0
    if layout == "contiguous" and not dense:
        return memory.view(shape)
    return memory.view(batch, height, width, pitch)[..., :channels].permute(0, 3, 1, 2)


def parameter(rng: random.Random, size: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    offset = rng.choice((0, 0, 1))
    # Finite: what they do to an infinity depends on the order of the products.
    return torch.randn(offset + size, generator=generator).to(dtype)[offset:]


def random_case(seed: int, dense: bool = False) -> Case:
    """With `dense`, what the op reads where it lies: nothing is copied or converted before."""
    rng = random.Random(seed)
    op = [*REFERENCES][seed % 3]
    dtype = rng.choice(DTYPES)
    averaged = rng.random() < 0.4
    t, s = (rng.choice((1, 2, 3)), rng.choice((1, 2, 3))) if averaged else (1, 1)
    channels = rng.choice(CHANNELS) if rng.random() < 0.9 else rng.choice(MANY_CHANNELS)
    channels = max(channels // t, 1) * t
    most = 2 if channels > 300 else 4
    shape = [rng.randint(1, 2), channels, rng.randint(1, most), rng.randint(1, most)]
    if rng.random() < 0.05:
        shape[rng.choice((0, 2, 3))] = 0
    residual_shape = [shape[0], channels // t, shape[2] * s, shape[3] * s]
    dtypes = [dtype if dense or rng.random() < 0.6 else rng.choice(DTYPES) for _ in range(2)]
    weight, bias = (parameter(rng, channels, each, seed + 1) for each in dtypes)
    return Case(
        op,
        image(rng, shape, dtype, 3 * seed, dense),
        rng.choice((None, weight, weight)) if op != "add_pad" else None,
        rng.choice((None, bias)),
        image(rng, residual_shape, dtype, 3 * seed + 2, dense)
        if averaged or rng.random() < 0.5
        else None,
        rng.random() < 0.7,
        seed,
    )


def call(emulation: Emulation, case: Case) -> tuple[Tensor, ...]:
    emulation.seed(case.seed)
    got = emulation.ops[case.op](*case.arguments())
    return got if isinstance(got, tuple) else (got,)


def fault_in_values(emulation: Emulation, case: Case) -> str | None:
    """What is wrong with the outputs: sums are equal, norms close."""
    got, wanted = call(emulation, case), REFERENCES[case.op](*case.arguments())
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    names = ("activated",) if case.op == "rms_norm_silu" else ("sum", "activated")[: len(got)]
    for name, ours, theirs in zip(names, got, wanted, strict=True):
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            return f"{name} is {ours.dtype} {list(ours.shape)}"
        if not ours.is_contiguous(memory_format=torch.channels_last):
            return f"{name} is not channels-last"
        equal = (ours == theirs) | (ours.isnan() & theirs.isnan())
        if name == "activated":
            # One rounding to the dtype on each side, and a few units of the arithmetic: the
            # largest square, the quotient, the exponential.
            compute = torch.finfo(torch.promote_types(theirs.dtype, torch.float32)).eps
            bound = torch.finfo(theirs.dtype).eps + 16 * compute
            difference = (ours.double() - theirs.double()).abs()
            equal |= difference <= bound * theirs.double().abs() + 16 * compute
        if not bool(equal.all()):
            return f"{name} differs from the reference"
    return None


def fault_in_accesses(emulation: Emulation, case: Case) -> str | None:
    """What is wrong with the loads and stores."""
    emulation.accesses()
    got = call(emulation, case)
    read = [x for x in (case.x, case.weight, case.bias, case.residual) if x is not None]
    return trace_fault(emulation.accesses(), read if case.x.numel() else [], list(got))


def edge_cases() -> Iterator[Case]:
    """Several rounds of blocks' pixels; nothing to add; norms below the clamp."""
    generator = torch.Generator().manual_seed(0)
    for seed, (op, dtype) in enumerate(itertools.product(REFERENCES, DTYPES)):
        x = values(16 * 7 * 9, dtype, generator).view(1, 7, 9, 16).permute(0, 3, 1, 2)
        yield Case(op, x, None, None, None, True, -1 - seed)
        tiny = torch.full_like(x, 1e-15 if dtype.itemsize > 2 else 0.0)
        yield Case(op, tiny, None, None, None, False, -1 - seed)


def fault_in_refusals(emulation: Emulation) -> str | None:
    """Whether the host functions refuse what the reference's checks refuse, in their words."""
    x, short = torch.zeros(2, 4, 3, 5), torch.zeros(3)
    for op, check, arguments in (
        ("rms_norm_silu", check_norm, (x[0], None)),
        ("rms_norm_silu", check_norm, (x, short)),
        ("rms_norm_silu", check_norm, (x, None, True, short)),
        ("rms_norm_silu", check_norm, (x, None, True, None, x.bfloat16())),
        ("add_pad", check_add_pad, (x, None, x[:, :3])),
        ("add_pad", check_add_pad, (x.int(),)),
    ):
        fault = refusal_fault(emulation.ops[op], check, arguments)
        if fault is not None:
            return fault
    return None


def run(emulation: Emulation, first: int, count: int, traced: bool) -> Counter[str]:
    """Calls made per op.

    Raises:
        AssertionError: the first call that is wrong, and what is wrong with it.
    """
    torch.set_num_threads(1)
    made: Counter[str] = Counter()
    check = fault_in_accesses if traced else fault_in_values
    fault = fault_in_refusals(emulation)
    assert fault is None, fault
    random_cases = (random_case(seed, dense=traced) for seed in range(first, first + count))
    for case in itertools.chain(() if traced else edge_cases(), random_cases):
        fault = check(emulation, case)
        assert fault is None, f"{fault} in {case}"
        made[case.op] += 1
    return made
