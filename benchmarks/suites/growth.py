"""What the engines paid before they encoded one frame: `vae.encode` of T frames."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.cases import OURS, PHOTOGRAPH, TINY_DIM, all_frames, sides, vae_and_encoder
from benchmarks.harness import Row, Suite, gate_error, timed_rows
from cosmos3_fast.images.load import load_pixels
from cosmos3_fast.vae.live.exact import encode_exact


@torch.no_grad()
def growth(
    size: str, frame_counts: tuple[int, ...], rounds: int, base_dim: int | None = None
) -> Iterator[Row]:
    vae, ours = vae_and_encoder("float32", base_dim)
    pixels = load_pixels(PHOTOGRAPH, *sides(size))
    for frames in frame_counts:
        clip = pixels[:, :, None].expand(-1, -1, frames, -1, -1)
        case, theirs = f"{size}, T={frames}", all_frames(frames)
        paths: dict[str, Callable[[], Tensor]] = {
            theirs: lambda c=clip: encode_exact(vae, c),
            OURS: lambda: ours(pixels),
        }
        errors = {OURS: gate_error(f"growth {case}", ours(pixels), paths[theirs]()[:, :, :1])}
        yield from timed_rows(
            "growth", case, "float32", paths, theirs, rounds=rounds, errors=errors
        )


SUITE = Suite(
    growth,
    {
        "tiny": {"size": "32x48", "frame_counts": (1, 5), "rounds": 1, "base_dim": TINY_DIM},
        "short": {"size": "256x448", "frame_counts": (1, 5), "rounds": 1},
        "full": {"size": "256x448", "frame_counts": (1, 5, 9, 17), "rounds": 1},
    },
)
