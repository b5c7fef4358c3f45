"""One frame: the 3-D VAE, its last taps alone, and `FrameEncoder`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from benchmarks.cases import (
    DTYPES,
    LAST_TAPS,
    ONE_FRAME,
    OURS,
    PHOTOGRAPH,
    TINY_DIM,
    last_taps,
    sides,
    vae_and_encoder,
)
from benchmarks.harness import Row, Suite, gate_paths, say, timed_rows
from cosmos3_fast.images.load import load_pixels
from cosmos3_fast.vae.live.exact import encode_exact


@torch.no_grad()
def encoder(sizes: Mapping[str, int], base_dim: int | None = None) -> Iterator[Row]:
    """`sizes`: rounds of each size."""
    for dtype, torch_dtype in DTYPES.items():
        vae, ours = vae_and_encoder(dtype, base_dim)
        plain = last_taps(vae)
        for size, rounds in sizes.items():
            pixels = load_pixels(PHOTOGRAPH, *sides(size)).to(torch_dtype)
            clip = pixels[:, :, None]
            paths: dict[str, Callable[[], Tensor]] = {
                ONE_FRAME: lambda v=vae, x=clip: encode_exact(v, x),
                LAST_TAPS: lambda v=plain, x=clip: encode_exact(v, x),
                OURS: lambda e=ours, x=pixels: e(x),
            }
            say(f"encoder {size} {dtype}: correctness gate ...")
            exact = None
            if torch_dtype != torch.float32:
                # The error of float32 is four orders below that of bfloat16.
                exact = encode_exact(copy.deepcopy(vae).float(), clip.float())
            errors = gate_paths(f"encoder {size} {dtype}", paths, ONE_FRAME, LAST_TAPS, exact)
            yield from timed_rows(
                "encoder", size, dtype, paths, ONE_FRAME, rounds=rounds, errors=errors
            )


SUITE = Suite(
    encoder,
    {
        # Of fewer latents than these 24, chance decides which of two roundings errs more.
        "tiny": {"sizes": {"64x96": 2}, "base_dim": TINY_DIM},
        "short": {"sizes": {"256x448": 3, "480x832": 2}},
        "full": {"sizes": {"256x448": 7, "480x832": 5, "720x1280": 3}},
    },
)
