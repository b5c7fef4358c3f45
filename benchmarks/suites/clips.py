"""A clip to pixels and to latents: the 3-D VAE, the same channels-last, direct taps, and blocks.

Where the package fastvae is installed, its decoder is a row too.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from importlib import util

import torch
from torch import Tensor

from benchmarks.cases import DTYPES, OURS, TINY_DIM, channels_last, seeded_clip, vae_config
from benchmarks.harness import Row, Suite, gate_paths, say, timed_rows
from cosmos3_fast.frames import latent_frames
from cosmos3_fast.vae import ClipDecoder, ClipEncoder, synthetic
from cosmos3_fast.vae.live.exact import decode_sample, encode_exact

CHANNELS_LAST = "the VAE, channels_last_3d"
DIRECT = "direct taps"


@torch.inference_mode()
def clips(
    size: str,
    frames: int,
    rounds: int,
    dtypes: tuple[str, ...] = ("float32",),
    base_dim: int | None = None,
    only: tuple[str, ...] = ("decode", "encode"),
) -> Iterator[Row]:
    """Rows of each path, for a decode and an encode."""
    config = synthetic.synthetic_config(vae_config(base_dim), 0)
    for dtype in dtypes:
        torch_dtype = DTYPES[dtype]
        vae = torch.nn.Module.to(synthetic.synthetic_vae(config, 0, None), torch_dtype)
        last = channels_last(vae)
        for what in only:
            paths: dict[str, Callable[[], Tensor]]
            baseline = f"vae.{what} of {frames} frames"
            if what == "decode":
                decoder = ClipDecoder.from_vae(vae)
                taps = ClipDecoder.from_vae(vae, direct=True)
                count = latent_frames(frames)
                z = seeded_clip(config["z_dim"], count, size, 16, torch_dtype)
                paths = {
                    baseline: lambda v=vae, z=z: decode_sample(v, z),
                    CHANNELS_LAST: lambda v=last, z=z: decode_sample(v, z),
                    DIRECT: lambda d=taps, z=z: d.decode_unnormalized(z),
                    OURS: lambda d=decoder, z=z: d.decode_unnormalized(z),
                }
                if util.find_spec("fastvae"):
                    fast = importlib.import_module("fastvae").FastVAEDecoder.from_vae(vae)
                    paths["fastvae"] = lambda d=fast, z=z: d.decode(z)
            else:
                encoder = ClipEncoder.from_vae(vae)
                x = seeded_clip(3, frames, size, 1, torch_dtype).clamp(-1, 1)
                paths = {
                    baseline: lambda v=vae, x=x: encode_exact(v, x),
                    CHANNELS_LAST: lambda v=last, x=x: encode_exact(v, x),
                    OURS: lambda e=encoder, x=x: e(x),
                }
            name = f"{what} {size}, {frames} frames"
            say(f"clips: {name} {dtype}: correctness gate ...")
            exact = None
            if torch_dtype != torch.float32:
                plain = copy.deepcopy(vae).float()
                given = decode_sample(plain, z.float()) if what == "decode" else None
                exact = encode_exact(plain, x.float()) if given is None else given
            errors = gate_paths(f"clips {name} {dtype}", paths, baseline, CHANNELS_LAST, exact)
            yield from timed_rows(
                "clips", name, dtype, paths, baseline, rounds=rounds, errors=errors
            )


SUITE = Suite(
    clips,
    {
        "tiny": {"size": "32x64", "frames": 9, "rounds": 1, "base_dim": TINY_DIM},
        "short": {"size": "128x224", "frames": 5, "rounds": 1},
        "full": {"size": "256x448", "frames": 17, "rounds": 3},
    },
)
