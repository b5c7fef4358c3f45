"""Planted faults: the emulated CUDA source with one line changed; the random cases catch each.

As a script: builds and runs each of them; fails if one is not caught.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import torch
from cuda_emulation import SOURCE, Emulation, build
from cuda_emulation_cases import run

# The cases, from seed 0 on, within which each fault has to show.
CASES = 400

MUTATIONS = {
    "frame bits shifted by one": ("bits[t / 32] >> (t % 32)", "bits[t / 32] >> (t % 32 + 1)"),
    "words of frames taken modulo 2": ("return bits[t / 32]", "return bits[t / 32 % 2]"),
    "float16 read as bfloat16": (
        "static_cast<const Half*>(source.data)", "static_cast<const BFloat16*>(source.data)",
    ),
    "batch stride left out": (
        "return b * strides.b + c * strides.c", "return c * strides.c",
    ),
    "row and column strides swapped": (
        "i / width * strides.h + i % width * strides.w",
        "i / width * strides.w + i % width * strides.h",
    ),
    "in flight beyond the end: stored too": (
        "if (i + k * step < vectors) {", "if (i + k * step <= vectors) {",
    ),
    "loads one vector short": (
        "i + k * step < vectors ? i + k * step : i]",
        "i + k * step < vectors - 1 ? i + k * step : i]",
    ),
    "each thread skips every other round": (
        "i < vectors; i += kInFlight * step", "i < vectors; i += 2 * kInFlight * step",
    ),
    "scalar copy ends early": (
        "  for (int64_t i = threadIdx.x; i < plane; i += blockDim.x) {\n    out[i] = load_as<T>(",
        "  for (int64_t i = threadIdx.x; i < plane - 1; i += blockDim.x) {\n"
        "    out[i] = load_as<T>(",
    ),
    "channels beyond the grid left out": (
        "c < shape.c; c += gridDim.y", "c < gridDim.y; c += gridDim.y",
    ),
    "velocity of a block other than the first left out": (
        "velocity_mask[t] = convert<T>(is_condition ? 0.0f : 1.0f)",
        "velocity_mask[blockIdx.x] = convert<T>(is_condition ? 0.0f : 1.0f)",
    ),
    "blend rounds one operand": (
        "return convert<T>(m * cond +", "return convert<T>(m * convert<T>(cond) +",
    ),
    "velocity written for the first batch entry only": ("if (b < mask_batch &&", "if (b < 1 &&"),
    "alignment of the storage not asked": (
        "reinterpret_cast<uintptr_t>(data) % sizeof(uint4) == 0", "data != nullptr",
    ),
    "alignment of the frame stride not asked": (" && aligned(strides.t)", ""),
    "alignment of the destination not asked": (
        "cond.vectorized &= is_vector_aligned(noise.const_data_ptr(), shape, to, sizeof(T));",
        "cond.vectorized &= plane_is_dense(shape, to);",
    ),
    "vectors where dtypes differ": ("x.scalar_type() == out_dtype &&", "true &&"),
    "frames that are not conditioned written too": (
        "if (!is_condition || shape.plane() == 0) {", "if (shape.plane() == 0) {",
    ),
    "last frame of a launch taken for the next one's": (
        "frame < first + count", "frame < first + count - 1",
    ),
    "further launches start at frame 0": (
        "const int64_t t = first_frame + blockIdx.x;\n  const bool is_condition",
        "const int64_t t = blockIdx.x;\n  const bool is_condition",
    ),
}  # fmt: skip

# These leave every result right: only the trace of the loads and stores shows them.
SILENT_MUTATIONS = {
    "in flight beyond the end: the first one stored again": (
        "        if (i + k * step < vectors) {\n          to[i + k * step] = held[k];",
        "        {\n          to[i + k * step < vectors ? i + k * step : i] = held[k];",
    ),
    "in flight beyond the end: loaded too": (
        "from[i + k * step < vectors ? i + k * step : i]", "from[i + k * step]",
    ),
    "every block writes the velocity": (
        "if (blockIdx.y == 0 && blockIdx.z == 0 && threadIdx.x == 0)", "if (threadIdx.x == 0)",
    ),
    "every thread takes its neighbors' elements too": (
        "i < plane; i += blockDim.x) {\n    out[i] = load_as<T>(",
        "i < plane; i += 1) {\n    out[i] = load_as<T>(",
    ),
}  # fmt: skip


def outcome(library: Path, traced: bool) -> str:
    """What the cases say of a library, each in a process of its own: a wild write may end it."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        text = "nothing"
        try:
            run(Emulation(library), 0, CASES, traced)
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(write, text.encode()[:4000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as end:
        text = end.read()
    _, status = os.waitpid(child, 0)
    return text or f"the process ended with status {status}"


def is_caught(name: str, folder: Path) -> bool:
    """Whether the cases find the fault `name`; says what they found.

    Raises:
        AssertionError: the fault no longer fits the source.
    """
    traced = name in SILENT_MUTATIONS
    before, after = (SILENT_MUTATIONS if traced else MUTATIONS)[name]
    source = SOURCE.read_text()
    assert before in source, f"{name}: {before!r} is not in {SOURCE}"
    mutant, library = folder / "mutant.cu", folder / "mutant.so"
    mutant.write_text(source.replace(before, after, 1))
    build(library, "traced" if traced else "quick", mutant)
    text = outcome(library, traced)
    print(f"{name}: {text}", flush=True)
    # Only a wrong call or a crash counts, not an error of the test itself.
    return text.startswith(("AssertionError", "the process ended"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="which faults; all of them where none is given")
    torch.set_num_threads(1)  # before the forks, which threads would not survive
    names = parser.parse_args().names or [*MUTATIONS, *SILENT_MUTATIONS]
    with tempfile.TemporaryDirectory() as folder:
        missed = [name for name in names if not is_caught(name, Path(folder))]
    print(f"{len(names) - len(missed)} of {len(names)} caught")
    for name in missed:
        print(f"not caught: {name}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
