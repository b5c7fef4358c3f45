"""The blend: the engines' formula, eager and compiled, the plain copy that bounds it, and ours.

In inference mode, as the engines run: outside of it torch's autograd wrapper, in Python, adds
microseconds to each call of a custom op. Every side keeps its latest results up to a size that no
cache holds, and so writes to memory that is mapped but not cached. If results were freed at once,
malloc would decide which side is given two blocks in turn and which three.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import DTYPES, OURS, SEED, USUAL, sides
from benchmarks.harness import Call, Row, Suite, gate_equal, timed_rows
from cosmos3_fast.frames import latent_frames
from cosmos3_fast.ops.prepare_latents import prepare_latents_formula

FORMULA, COMPILED, COPY = "eager formula", "compiled formula", "clone + 1-frame copy"
IN_PLACE = "ours, in place"
WORKING_SET = 64_000_000  # bytes, twice the last-level cache of a large part of a processor


def keeping(count: int, run: Callable[[], Any]) -> Call:
    """`run`, which keeps its latest `count` results, and has made so many."""
    kept: deque[Any] = deque(maxlen=count)
    for _ in range(count + 1):
        kept.append(run())
    return lambda: kept.append(run())


def clone_and_copy(cond: Tensor, noise: Tensor) -> Tensor:
    """The least that memory traffic allows."""
    latents = noise.clone()
    latents[:, :, :1] = cond
    return latents


@torch.inference_mode()
def op(cases: tuple[tuple[str, int], ...], rounds: int) -> Iterator[Row]:
    prepare, prepare_ = torch.ops.cosmos3.prepare_latents, torch.ops.cosmos3.prepare_latents_
    for size, frames in cases:
        height, width = (side // 16 for side in sides(size))
        for name, dtype in DTYPES.items():
            generator = torch.Generator().manual_seed(SEED)
            noise, cond = (
                torch.randn(1, 48, t, height, width, generator=generator).to(dtype)
                for t in (latent_frames(frames), 1)
            )
            work = noise.clone()
            # Compiled anew for each shape, as a user's own would be: no dynamic sizes.
            torch.compiler.reset()
            compiled = torch.compile(prepare_latents_formula, fullgraph=True, dynamic=False)
            paths: dict[str, Callable[[], Any]] = {
                FORMULA: lambda c=cond, n=noise: prepare_latents_formula(c, n),
                COMPILED: lambda c=cond, n=noise, run=compiled: run(c, n),
                COPY: lambda c=cond, n=noise: clone_and_copy(c, n),
                OURS: lambda c=cond, n=noise: prepare(c, n),
                IN_PLACE: lambda c=cond, n=work: prepare_(c, n),
            }
            case = f"{size}, {frames} frames"
            wanted, wanted_mask = paths[FORMULA]()
            for path in (COMPILED, OURS):
                latents, mask = paths[path]()
                gate_equal(f"op {case} {name}, {path}", latents, wanted)
                gate_equal(f"op {case} {name}, {path}: mask", mask, wanted_mask)
            gate_equal(f"op {case} {name}, {COPY}", paths[COPY](), wanted)
            gate_equal(f"op {case} {name}, {IN_PLACE}: mask", paths[IN_PLACE](), wanted_mask)
            gate_equal(f"op {case} {name}, {IN_PLACE}", work, wanted)
            del wanted, latents
            count = -(-WORKING_SET // noise.nbytes)
            keepers = {path: keeping(count, run) for path, run in paths.items()}
            repeats = max(3, int(2e7 / noise.numel()))
            yield from timed_rows("op", case, name, keepers, COPY, rounds=rounds, repeats=repeats)


SUITE = Suite(
    op,
    {
        "tiny": {"cases": (("32x48", 17),), "rounds": 2},
        "short": {"cases": USUAL, "rounds": 15},
        "full": {
            "cases": tuple(
                (size, frames)
                for size in ("256x448", "480x832", "720x1280")
                for frames in (17, 81, 189)
            ),
            "rounds": 41,
        },
    },
)
