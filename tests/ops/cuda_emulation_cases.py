"""Random calls of the emulated `prepare_latents`, each compared with the reference to the bit.

`cuda_emulation_run.py` runs them.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from cuda_emulation import Emulation, refusal_fault, trace_fault
from op_inputs import DTYPES
from torch import Tensor

from cosmos3_fast.ops.prepare_latents import (
    check_frames,
    check_frames_in_place,
    check_mask,
    prepare_latents_in_place_reference,
    prepare_latents_mask_reference,
    prepare_latents_reference,
)

INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16}
FORMS = ("frames", "mask", "in place")
# Around the words of a FrameSet and the frames that one launch takes.
EDGES = (31, 32, 33, 63, 64, 65, 4095, 4096, 4097, 8191, 8192, 8193, 8200)


@dataclass
class Case:
    form: str
    cond: Tensor
    noise: Tensor
    frames: list[int]
    mask: Tensor
    seed: int

    def __str__(self) -> str:
        def text(x: Tensor) -> str:
            return f"{x.dtype} {list(x.shape)} strides {x.stride()} at {x.storage_offset()}"

        return (
            f"case {self.seed}, {self.form}: cond {text(self.cond)}, noise {text(self.noise)}, "
            f"frames {self.frames}, mask {text(self.mask)}"
        )


def values(count: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Normal ones; an eighth any bits at all, an eighth what arithmetic treats apart."""
    plain = torch.randn(count, generator=generator, dtype=torch.float32).to(dtype)
    integer = INTEGERS[dtype.itemsize]
    info = torch.iinfo(integer)
    bits = torch.randint(info.min, info.max, (count,), generator=generator, dtype=integer)
    tiny = torch.finfo(dtype).tiny
    special = torch.tensor(
        [0.0, -0.0, 1.0, float("inf"), float("-inf"), float("nan"), tiny / 4, -tiny / 4,
         torch.finfo(dtype).max],
        dtype=dtype,
    )  # fmt: skip
    which = torch.randint(len(special), (count,), generator=generator)
    kind = torch.randint(8, (count,), generator=generator)
    plain = torch.where(kind == 0, bits.view(dtype), plain)
    return torch.where(kind == 1, special[which], plain)


def strided(
    rng: random.Random, shape: list[int], dtype: torch.dtype, seed: int, expand: bool
) -> Tensor:
    """Any order of dimensions, padding after each, an offset; dimensions of one element have
    strides without a meaning, and with `expand` some of the others have stride 0."""
    order = list(range(5))
    layout = rng.randrange(4)
    if layout == 2:
        order[:3] = rng.sample(order[:3], 3)
    elif layout == 3:
        rng.shuffle(order)
    strides, step = [0] * 5, 1
    for dim in reversed(order):
        strides[dim] = step
        if expand and shape[dim] > 1 and rng.random() < 0.1:
            strides[dim] = 0
        else:
            # Padding by whole 16-byte vectors as well as by odd amounts.
            padding = rng.choice((0, 0, 1, 3, 8, 16)) if layout and rng.random() < 0.4 else 0
            step = step * max(shape[dim], 1) + padding
        if shape[dim] == 1 and rng.random() < 0.5:
            strides[dim] = rng.choice((0, 1, 7, 10**12))
    offset = rng.choice((0, 0, 0, 8, 1, 5, 17))
    last = sum((n - 1) * s for n, s in zip(shape, strides, strict=True) if n > 1)
    generator = torch.Generator().manual_seed(seed)
    memory = values(offset + last + 1, dtype, generator)
    return memory.as_strided(shape, strides, offset)


def sizes(rng: random.Random, large: bool) -> list[int]:
    """[B, C, T, H, W]: many small, some of many frames, some of planes that take several rounds."""
    kind = rng.random()
    if kind < 0.08:
        frames = rng.choice(EDGES) if large else rng.choice(EDGES[:6])
        return [rng.choice((1, 2)), rng.choice((1, 2)), frames, 1, rng.choice((1, 2, 4, 8))]
    if kind < 0.2:
        plane = rng.choice(((20, 52), (33, 64), (63, 65), (80, 104), (16, 1024), (129, 128)))
        return [1, rng.choice((1, 2)), rng.choice((1, 2, 3)), *plane]
    shape = [rng.randint(1, 3), rng.randint(1, 4), rng.randint(1, 9)]
    shape += [rng.choice((1, 2, 3, 4, 8, 12)), rng.choice((1, 2, 3, 4, 8, 16, 17))]
    if kind > 0.95:
        shape[rng.randrange(5)] = 0
    return shape


def random_case(seed: int, large: bool = True) -> Case:
    rng = random.Random(seed)
    form = FORMS[seed % 3]
    noise_dtype, cond_dtype, mask_dtype = (rng.choice(DTYPES) for _ in range(3))
    if rng.random() < 0.4:
        cond_dtype = noise_dtype
    b, c, t, h, w = sizes(rng, large)
    noise = strided(rng, [b, c, t, h, w], noise_dtype, 3 * seed, expand=form != "in place")
    count = rng.choice((0, 1, min(2, t), min(t, 40), t if t <= 65 else min(t, 300)))
    frames = rng.sample(range(t), min(count, t))
    if t > 31 and rng.random() < 0.5:
        frames = [*{*frames, t - 1, *(f for f in (31, 32, 4095, 4096) if f < t)}]
    needed = max(t if form == "mask" else max(frames, default=0) + 1, 2)
    cond_frames = rng.choice((1, needed, needed + rng.randrange(3)))
    cond_shape = [rng.choice((1, b)), c, cond_frames, h, w]
    cond = strided(rng, cond_shape, cond_dtype, 3 * seed + 1, expand=True)
    mask = strided(rng, [rng.choice((1, b)), 1, t, 1, 1], mask_dtype, 3 * seed + 2, expand=True)
    weights = memory_of(mask)
    weights.copy_(weights.nan_to_num(0.5).abs().clamp(max=1))  # the op takes masks in [0, 1]
    return Case(form, cond, noise, frames, mask, seed)


def interleaved_cases() -> Iterator[Case]:
    """In place, where both operands are views of one buffer, which torch's copy_ allows."""
    for seed, dtype in enumerate(DTYPES):
        memory = values(2 * 3 * 5 * 8 * 16, dtype, torch.Generator().manual_seed(seed))
        x = memory.view(2, 3, 5, 8, 16)
        mask = torch.ones(1, 1, 5, 1, 1)
        yield Case("in place", x, x, [4, 0, 2], mask, -1)
        yield Case("in place", x[..., ::2], x[..., 1::2], [3, 1], mask, -2)
        yield Case("in place", x[:, :, 1:2, ::2], x[:, :, :, 1::2], [1, 3], mask, -3)


def empty_cases() -> Iterator[Case]:
    """Without elements, and so without an address, though nothing else bars vectors."""
    for form in FORMS:
        for index, dim in enumerate((0, 1, 3)):
            shape = [2, 3, 4, 8, 16]
            shape[dim] = 0
            # The strides of a full latent, so that every plane but the first is at an offset.
            strides = (1536, 512, 128, 16, 1)
            cond, noise = (torch.empty(shape).as_strided(shape, strides) for _ in range(2))
            mask = torch.full((max(shape[0], 1), 1, 4, 1, 1), 0.25)
            yield Case(form, cond, noise, [2, 0], mask, -20 - index)


def limit_cases() -> Iterator[Case]:
    """More channels and batch entries than a grid has, in y and in z."""
    for seed, (form, shape) in enumerate(
        (form, shape) for form in FORMS for shape in ([1, 65540, 1, 1, 1], [65537, 1, 2, 1, 1])
    ):
        generator = torch.Generator().manual_seed(seed)
        noise = values(int(np.prod(shape)), torch.float32, generator).view(shape)
        cond = values(shape[1], torch.bfloat16, generator).view(1, shape[1], 1, 1, 1)
        mask = torch.rand(shape[0], 1, shape[2], 1, 1, generator=generator)
        yield Case(form, cond, noise, [0], mask, -10 - seed)


def same_bits(got: Tensor, wanted: Tensor) -> bool:
    """A NaN that was converted or computed may have any payload."""
    integer = INTEGERS[wanted.dtype.itemsize]
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return False
    equal = got.contiguous().view(integer) == wanted.contiguous().view(integer)
    return bool((equal | (got.isnan() & wanted.isnan())).all())


def memory_of(x: Tensor) -> Tensor:
    return torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())


def clone_memory(case: Case) -> tuple[Tensor, Tensor]:
    """(cond, noise) over copies of their memory, which stays shared where it was."""
    memory = memory_of(case.noise).clone()
    noise = memory.as_strided(case.noise.shape, case.noise.stride(), case.noise.storage_offset())
    if case.cond.untyped_storage().data_ptr() == case.noise.untyped_storage().data_ptr():
        where = (case.cond.shape, case.cond.stride(), case.cond.storage_offset())
        return memory.as_strided(*where), noise
    return case.cond, noise


def call(emulation: Emulation, case: Case, noise: Tensor, cond: Tensor) -> tuple[Tensor, ...]:
    emulation.seed(case.seed)
    if case.form == "frames":
        return emulation.ops["prepare_latents"](cond, noise, case.frames)
    if case.form == "mask":
        return emulation.ops["prepare_latents.mask"](cond, noise, case.mask)
    return (emulation.ops["prepare_latents_"](cond, noise, case.frames),)


def fault_in_values(emulation: Emulation, case: Case) -> str | None:
    """What is wrong with the outputs, and with all memory around an output in place."""
    cond, noise = clone_memory(case)
    before = memory_of(cond).clone()
    got = call(emulation, case, noise, cond)
    if case.form == "frames":
        wanted = prepare_latents_reference(case.cond, case.noise, case.frames)
    elif case.form == "mask":
        wanted = prepare_latents_mask_reference(case.cond, case.noise, case.mask)
    else:
        their_cond, their_noise = clone_memory(case)
        wanted = (
            memory_of(their_noise),
            prepare_latents_in_place_reference(their_cond, their_noise, case.frames),
        )
        got = (memory_of(noise), *got)
    names = ("memory of noise" if case.form == "in place" else "latents", "velocity_mask")
    for name, ours, theirs in zip(names, got, wanted, strict=True):
        if not same_bits(ours, theirs):
            return f"{name} differs from the reference"
    shares = cond.untyped_storage().data_ptr() == noise.untyped_storage().data_ptr()
    if not shares and not torch.equal(memory_of(cond).view(torch.uint8), before.view(torch.uint8)):
        return "cond_latent was written"
    if case.form != "in place" and any(not x.is_contiguous() for x in got):
        return "an output is not contiguous"
    return None


def fault_in_accesses(emulation: Emulation, case: Case) -> str | None:
    """What is wrong with the loads and stores."""
    cond, noise = clone_memory(case)
    emulation.accesses()
    got = call(emulation, case, noise, cond)
    accesses = emulation.accesses()
    rest = [t for t in range(noise.shape[2]) if t not in set(case.frames)]
    parts = [cond.select(2, t if cond.shape[2] > 1 else 0) for t in case.frames]
    if case.form == "mask":
        read = [cond[:, :, : noise.shape[2]], noise, case.mask]
        written = list(got)
    elif case.form == "frames":
        read = [*parts, *(noise.select(2, t) for t in rest)]
        written = list(got)
    else:
        read = parts
        written = [*(noise.select(2, t) for t in case.frames), *got]
    if noise.numel() == 0:
        read = [case.mask] if case.form == "mask" else []
    return trace_fault(accesses, read, written)


def fault_in_refusals(emulation: Emulation) -> str | None:
    """Whether the host functions refuse what the reference's checks refuse, in their words."""
    cond, noise = torch.zeros(1, 2, 1, 4, 4), torch.zeros(1, 2, 3, 4, 4)
    frames, in_place = emulation.ops["prepare_latents"], emulation.ops["prepare_latents_"]
    faulty: list[tuple[Callable[..., object], Callable[..., None], tuple[object, ...]]] = [
        (frames, check_frames, (cond, noise, [3])),
        (frames, check_frames, (cond, noise, [1, 1])),
        (frames, check_frames, (cond.int(), noise, [0])),
        (emulation.ops["prepare_latents.mask"], check_mask, (cond, noise, noise)),
        (in_place, check_frames_in_place, (cond, noise[:, :, :1].expand(1, 2, 3, 4, 4), [0])),
        (in_place, check_frames_in_place, (noise[:, :, :1, :2], noise[:, :, 1:, 1:3], [0])),
        (in_place, check_frames_in_place, (noise[:1, :, 1:2], noise, [0])),
    ]
    for op, check, arguments in faulty:
        fault = refusal_fault(op, check, arguments)
        if fault is not None:
            return fault
    return None


def run(emulation: Emulation, first: int, count: int, traced: bool) -> Counter[str]:
    """Calls made per form.

    Raises:
        AssertionError: the first call that is wrong, and what is wrong with it.
    """
    torch.set_num_threads(1)
    made: Counter[str] = Counter()
    check = fault_in_accesses if traced else fault_in_values
    small = itertools.chain(interleaved_cases(), empty_cases()) if not traced else ()
    limits = limit_cases() if not traced and first == 0 else ()
    random_cases = (random_case(seed, large=not traced) for seed in range(first, first + count))
    fault = fault_in_refusals(emulation)
    assert fault is None, fault
    # The costliest last.
    for case in itertools.chain(small, random_cases, limits):
        fault = check(emulation, case)
        assert fault is None, f"{fault} in {case}"
        made[case.form] += 1
    return made
