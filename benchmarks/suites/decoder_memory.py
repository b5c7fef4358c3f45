"""Resident and peak memory of one decode, each side in a process of its own, as `memory` has it.

`python -m benchmarks.suites.decoder_memory vae|ours DTYPE SIZE` prints JSON. The VAE is measured
without its encoder, in its favour.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from benchmarks.harness import Call
from benchmarks.paths import DTYPES, TINY_DIM
from benchmarks.suites import Figures, Suite
from benchmarks.suites.decoder import decoder_config, latent_frame
from benchmarks.suites.memory import both_sides, of_first_call, side_lines
from cosmos3_fast import FrameDecoder
from cosmos3_fast.vae import synthetic


@torch.inference_mode()
def measure_side(which: str, dtype: str, size: str, base_dim: int | None) -> dict[str, float]:
    config = synthetic.synthetic_config(decoder_config(base_dim), 0)
    latents = latent_frame(config, size, DTYPES[dtype])

    def load_vae() -> Call:
        vae = synthetic.synthetic_vae(config, 0, decoder_base_dim=None)
        vae = torch.nn.Module.to(vae, DTYPES[dtype])
        del vae.encoder
        return lambda: vae.decode(latents)

    def load_ours() -> Call:
        tensors = synthetic.synthetic_decoder_state_dict(config, 0)
        ours = FrameDecoder.from_state_dict(tensors, config, DTYPES[dtype])
        return lambda: ours.decode_unnormalized(latents)

    if which == "ours":
        return of_first_call(load_ours)
    import diffusers  # noqa: F401 - its import is not the decode's memory

    return of_first_call(load_vae)


def decoder_memory(
    size: str, dtypes: tuple[str, ...] = tuple(DTYPES), base_dim: int | None = None
) -> Figures:
    """Both in each dtype, each in a fresh process."""
    name = "benchmarks.suites.decoder_memory"
    figures: dict[str, Any] = {"size": size}
    return figures | {dtype: both_sides(name, dtype, size, base_dim) for dtype in dtypes}


def lines(figures: Figures) -> list[str]:
    return side_lines("first decode", "3-D VAE without its encoder", figures)


SUITE = Suite(
    decoder_memory,
    {
        "tiny": {"size": "32x48", "dtypes": ("float32",), "base_dim": TINY_DIM},
        "short": {"size": "256x448", "dtypes": ("float32",)},
        "full": {"size": "256x448"},
    },
    order=55,
    lines=lines,
)

if __name__ == "__main__":
    side, of_dtype, at_size, dim = sys.argv[1:]
    print(json.dumps(measure_side(side, of_dtype, at_size, int(dim) if dim else None)))
