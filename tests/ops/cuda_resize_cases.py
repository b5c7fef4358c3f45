"""Calls of the emulated CUDA `resize_crop`, each compared with Pillow to the bit.

As a script: checks the library given, or with --mutations FOLDER that each planted fault is found;
a process of its own runs it, since a fault may end the process.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from cuda_emulation import Emulation, build, source_of
from resize_crop_cases import Case, limit_cases, random_case

from cosmos3_fast.ops.resize_crop import resize_crop_reference, vertical_first_in_pillow

COUNT = 200
NAME = "resize_crop"

MUTATIONS = {
    "row stride for column stride": ("y * images.sh, images.sw,", "y * images.sh, images.sh,"),
    "colors next to each other": ("green += from[color_step]", "green += from[1]"),
    "one tap short": ("tap < axis.taps;", "tap < axis.taps - 1;"),
    "weights in the order of the host": (
        "to[(1 + tap) * outputs + i]", "to[outputs + i * axis.taps + tap]",
    ),
    "not clamped above": ("value > 255 ? 255 : value", "value"),
    "columns beyond the last one": ("if (x >= width) {", "if (x > width) {"),
    "only the first image": ("images.data + b * images.sb + x", "images.data + x"),
    "passes in the other order": ("} else if (vertical_first) {", "} else if (!vertical_first) {"),
    "windows from the image's edge": (
        "source = torch::stable::narrow(source, 1, rows.begin, rows.end - rows.begin);", "",
    ),
}  # fmt: skip


def cases(count: int) -> Iterator[Case]:
    yield from limit_cases()
    yield from (random_case(seed, largest=60) for seed in range(count))


def run(emulation: Emulation, count: int = COUNT) -> int:
    """Calls made.

    Raises:
        AssertionError: the first call that is wrong.
    """
    torch.set_num_threads(1)
    resize_crop = emulation.ops[NAME]
    made = 0
    for case in cases(count):
        emulation.seed(made)
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
        made += 1
    empty = resize_crop(batch[:0], case.size, case.crop, case.filter)
    assert empty.shape == (0, *case.crop[2:], 3)
    return made


def outcome(library: Path) -> str:
    """What the cases say of a library, in a process of its own: a wild write may end it."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        text = "nothing"
        try:
            run(Emulation(library, NAME))
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(write, text.encode()[:4000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as end:
        text = end.read()
    _, status = os.waitpid(child, 0)
    return text or f"the process ended with status {status}"


def check_mutations(folder: Path, step: int) -> int:
    source = source_of(NAME).read_text()
    missed = 0
    for name in list(MUTATIONS)[::step]:
        before, after = MUTATIONS[name]
        assert before in source, f"{name}: {before!r} is not in {source_of(NAME)}"
        mutant, library = folder / "mutant.cu", folder / "mutant.so"
        mutant.write_text(source.replace(before, after, 1))
        build(library, "quick", mutant)
        text = outcome(library)
        # Only a wrong call or a crash counts, not an error of the test itself.
        caught = text.startswith(("AssertionError", "the process ended"))
        print(f"{name}: {text}" if caught else f"not caught: {name}: {text}", flush=True)
        missed += not caught
    return 1 if missed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", type=Path, nargs="?")
    parser.add_argument("--mutations", type=Path, metavar="FOLDER")
    parser.add_argument("--step", type=int, default=1, help="every so many planted faults only")
    parser.add_argument("--count", type=int, default=COUNT, help="random cases")
    given = parser.parse_args()
    torch.set_num_threads(1)  # before the forks, which threads would not survive
    if given.mutations is not None:
        return check_mutations(given.mutations, given.step)
    print(f"{run(Emulation(given.library, NAME), given.count)} calls equal Pillow")
    return 0


if __name__ == "__main__":
    sys.exit(main())
