"""A photograph and a seed to conditioned latents, from the file on.

The engines' stage is written out (`cases.engine_stage`); the `engines` suite has their own code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import (
    OURS,
    PHOTOGRAPH,
    SEED,
    TINY_DIM,
    all_frames,
    engine_stage,
    gate_stage,
    sides,
    vae_and_encoder,
)
from benchmarks.harness import Row, Suite, say, timed_rows
from cosmos3_fast.latents import LatentPreparation


@torch.no_grad()
def stage(
    size: str, frames: int, rounds: int, clip_rounds: int, base_dim: int | None = None
) -> Iterator[Row]:
    """`clip_rounds` are those of `vae.encode` of every frame, a long one."""
    vae, encoder = vae_and_encoder("float32", base_dim)
    prepare = LatentPreparation(encoder)
    request = (PHOTOGRAPH, frames, *sides(size))

    def ours() -> tuple[Tensor, Tensor]:
        prepared = prepare(*request, seed=SEED, dtype=torch.float32, mode="fast")
        return prepared.latents, prepared.velocity_mask

    case = f"{size}, {frames} frames"
    for encoded, path_rounds in ((1, rounds), (frames, clip_rounds)):
        path = all_frames(encoded)

        def theirs(encoded: int = encoded) -> tuple[Tensor, Tensor]:
            return engine_stage(vae, *request, encoded_frames=encoded)

        say(f"stage {case}, {path}: correctness gate ...")
        error = gate_stage(f"stage {case}, against {path}", ours(), theirs())
        paths: dict[str, Callable[[], Any]] = {path: theirs, OURS: ours}
        yield from timed_rows(
            "stage", case, "float32", paths, path, rounds=path_rounds, errors={OURS: error}
        )


SUITE = Suite(
    stage,
    {
        "tiny": {
            **{"size": "32x48", "frames": 5, "rounds": 2, "clip_rounds": 1},
            "base_dim": TINY_DIM,
        },
        "short": {"size": "256x448", "frames": 5, "rounds": 3, "clip_rounds": 1},
        "full": {"size": "480x832", "frames": 17, "rounds": 5, "clip_rounds": 2},
    },
)
