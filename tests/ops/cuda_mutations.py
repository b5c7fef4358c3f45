"""Planted faults: the emulated CUDA source with one line changed; the random cases catch each.

As a script: builds and runs each of them; fails if one is not caught.
"""

from __future__ import annotations

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
    "last frame of a launch taken for the next one's": (
        "frame < first + count", "frame < first + count - 1",
    ),
    "further launches start at frame 0": (
        "const int64_t t = first_frame + blockIdx.x;\n  const bool is_condition",
        "const int64_t t = blockIdx.x;\n  const bool is_condition",
    ),
}  # fmt: skip


def outcome(library: Path, namespace: str) -> str:
    """What the cases say of a library, each in a process of its own: a wild write may end it."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        text = "nothing"
        try:
            run(Emulation(library, namespace), 0, CASES, traced=False)
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(write, text.encode()[:4000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as end:
        text = end.read()
    _, status = os.waitpid(child, 0)
    return text or f"the process ended with status {status}"


def survivors(names: list[str], folder: Path) -> dict[str, str]:
    """The mutations among `names` that the cases do not catch: each with what was found instead.

    Raises:
        AssertionError: a mutation no longer fits the source.
    """
    torch.set_num_threads(1)  # before the forks, which threads would not survive
    source = SOURCE.read_text()
    missed = {}
    for index, name in enumerate(names):
        before, after = MUTATIONS[name]
        assert before in source, f"{name}: {before!r} is not in {SOURCE}"
        namespace = f"cosmos3_mutant{index}"
        mutant, library = folder / f"{namespace}.cu", folder / f"{namespace}.so"
        mutant.write_text(source.replace(before, after))
        build(library, "plain", mutant, namespace)
        text = outcome(library, namespace)
        print(f"{name}: {text}", flush=True)
        # Only a wrong result or a crash is a catch, not an error of the test itself.
        if not text.startswith(("AssertionError", "the process ended")):
            missed[name] = text
    return missed


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        missed = survivors(list(MUTATIONS), Path(folder))
    print(f"{len(MUTATIONS) - len(missed)} of {len(MUTATIONS)} caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
