"""Makes random calls of a source's emulated ops.

A process of its own, since a fault may end the process: sanitizers abort, and a wild write of a
planted fault can do anything. Prints how many calls it made, or the first that is wrong.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import cuda_emulation_cases
import cuda_emulation_frames
import cuda_emulation_norms
import cuda_emulation_pixels
import cuda_emulation_resizes
from cuda_emulation import Emulation

RUNS = {
    "prepare_latents": cuda_emulation_cases.run,
    "rms_norm_silu": cuda_emulation_norms.run,
    "resize_crop": cuda_emulation_resizes.run,
    "transform_frames": cuda_emulation_frames.run,
    "pack_pixels": partial(cuda_emulation_pixels.run, "pack_pixels"),
    "unpack_pixels": partial(cuda_emulation_pixels.run, "unpack_pixels"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", choices=RUNS)
    parser.add_argument("library", type=Path)
    parser.add_argument("--first", type=int, default=0, help="seed of the first case")
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--traced", action="store_true", help="check every load and store instead")
    given = parser.parse_args()
    emulation = Emulation(given.library, given.source)
    try:
        made = RUNS[given.source](emulation, given.first, given.count, given.traced)
    except AssertionError as error:
        print(error)
        return 1
    for form, count in made.items():
        print(f"{form}: {count} calls")
    print(f"{emulation.launches()} launches")
    return 0


if __name__ == "__main__":
    sys.exit(main())
