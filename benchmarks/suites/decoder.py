"""One latent frame to pixels: the 3-D VAE, its last taps alone, and `FrameDecoder`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.cases import (
    DTYPES,
    LAST_TAPS,
    OURS,
    TINY_DIM,
    last_taps,
    seeded_frame,
    vae_config,
)
from benchmarks.harness import Row, Suite, gate_paths, say, timed_rows
from cosmos3_fast.vae import FrameDecoder, synthetic
from cosmos3_fast.vae.live.exact import decode_sample

VAE = "vae.decode of 1 frame"


@torch.inference_mode()
def decoder(
    size: str, rounds: int, dtypes: tuple[str, ...] = tuple(DTYPES), base_dim: int | None = None
) -> Iterator[Row]:
    config = synthetic.synthetic_config(vae_config(base_dim), 0)
    for dtype in dtypes:
        torch_dtype = DTYPES[dtype]
        vae = synthetic.synthetic_vae(config, 0, decoder_base_dim=None)
        vae = torch.nn.Module.to(vae, torch_dtype)
        ours = FrameDecoder.from_vae(vae)
        plain = last_taps(vae)
        latents = seeded_frame(config["z_dim"], size, torch_dtype)
        paths: dict[str, Callable[[], Tensor]] = {
            VAE: lambda v=vae, z=latents: decode_sample(v, z),
            LAST_TAPS: lambda v=plain, z=latents: decode_sample(v, z),
            OURS: lambda d=ours, z=latents: d.decode_unnormalized(z),
        }
        say(f"decoder {size} {dtype}: correctness gate ...")
        exact = None
        if torch_dtype != torch.float32:
            # The error of float32 is four orders below that of bfloat16.
            exact = decode_sample(copy.deepcopy(vae).float(), latents.float())
        errors = gate_paths(f"decoder {size} {dtype}", paths, VAE, LAST_TAPS, exact)
        yield from timed_rows("decoder", size, dtype, paths, VAE, rounds=rounds, errors=errors)


SUITE = Suite(
    decoder,
    {
        "tiny": {"size": "64x96", "rounds": 1, "base_dim": TINY_DIM},
        "short": {"size": "256x448", "rounds": 3, "dtypes": ("float32",)},
        "full": {"size": "256x448", "rounds": 5},
    },
)
