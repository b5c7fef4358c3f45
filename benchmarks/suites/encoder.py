"""One frame: the 3-D VAE, the folded network without and with this package's kernels."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import gate_rounding, say
from benchmarks.paths import (
    DTYPES,
    ONE_FRAME,
    OURS,
    PHOTOGRAPH,
    TINY_DIM,
    UNFUSED,
    encode_unfused,
    sides,
    vae_and_encoder,
)
from benchmarks.suites import Row, Suite, timed_rows
from cosmos3_fast.images.load import load_pixels
from cosmos3_fast.vae.live.exact import encode_exact


@torch.no_grad()
def encoder(sizes: Mapping[str, int], base_dim: int | None = None) -> Iterator[Row]:
    """`sizes`: rounds of each size."""
    for dtype, torch_dtype in DTYPES.items():
        vae, ours = vae_and_encoder(dtype, base_dim)
        for size, rounds in sizes.items():
            pixels = load_pixels(PHOTOGRAPH, *sides(size)).to(torch_dtype)
            paths: dict[str, Callable[[], Tensor]] = {
                ONE_FRAME: lambda p=pixels, v=vae: encode_exact(v, p[:, :, None]),
                UNFUSED: lambda p=pixels, e=ours: encode_unfused(e, p),
                OURS: lambda p=pixels, e=ours: e(p),
            }
            errors = _gate(f"encoder {size} {dtype}", paths, vae, pixels)
            yield from timed_rows(
                "encoder", size, dtype, paths, ONE_FRAME, rounds=rounds, errors=errors
            )


def _gate(
    name: str, paths: Mapping[str, Callable[[], Tensor]], vae: Any, pixels: Tensor
) -> dict[str, float]:
    """The errors of the paths; in bfloat16 the VAE's own as well, which bounds the others."""
    say(f"{name}: correctness gate ...")
    wanted, exact = paths[ONE_FRAME](), None
    if pixels.dtype != torch.float32:
        # The error of float32 is four orders below that of bfloat16.
        exact = encode_exact(copy.deepcopy(vae).float(), pixels.float()[:, :, None])
    errors = {}
    for path in (UNFUSED, OURS):
        compared = gate_rounding(f"{name}, {path}", paths[path](), wanted, exact)
        errors[path] = compared.error
        if exact is not None:
            errors[ONE_FRAME] = compared.bound
    return errors


SUITE = Suite(
    encoder,
    {
        # Of fewer latents than these 24, chance decides which of two roundings errs more.
        "tiny": {"sizes": {"64x96": 2}, "base_dim": TINY_DIM},
        "short": {"sizes": {"256x448": 3, "480x832": 2}},
        "full": {"sizes": {"256x448": 7, "480x832": 5, "720x1280": 3}},
    },
    order=20,
)
