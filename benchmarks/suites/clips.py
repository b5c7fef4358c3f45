"""A clip to pixels and to latents: the 3-D VAE, the same channels-last, direct taps, and blocks.

Where the package fastvae is installed, its decoder is a row too. `clips_kept` are the VAE and ours
alone in a process whose malloc keeps its memory, as docs/clips.md says.
"""

from __future__ import annotations

import copy
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import util
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import DTYPES, OURS, TINY_DIM, channels_last, seeded_clip, vae_config
from benchmarks.harness import ROOT, Row, Suite, gate_paths, say, timed_rows
from cosmos3_fast.frames import latent_frames
from cosmos3_fast.vae import ClipDecoder, ClipEncoder, synthetic
from cosmos3_fast.vae.live.exact import decode_sample, encode_exact

# What lets glibc's malloc keep memory instead of mapping it anew at each call, in large pages.
KEEPING = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=8589934592:glibc.malloc.hugetlb=1"

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
    others: bool = True,
) -> Iterator[Row]:
    """Rows of the VAE and ours and, with `others`, of what lies between."""
    config = synthetic.synthetic_config(vae_config(base_dim), 0)
    for dtype in dtypes:
        torch_dtype = DTYPES[dtype]
        vae = torch.nn.Module.to(synthetic.synthetic_vae(config, 0, None), torch_dtype)
        last = channels_last(vae) if others else None
        for what in only:
            paths: dict[str, Callable[[], Tensor]]
            baseline = f"vae.{what} of {frames} frames"
            if what == "decode":
                decoder = ClipDecoder.from_vae(vae)
                taps = ClipDecoder.from_vae(vae, direct=True) if others else None
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
            if not others:
                paths = {path: paths[path] for path in (baseline, OURS)}
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


def kept(**setting: Any) -> Iterator[Row]:
    """`clips` of the VAE and ours in a new process that keeps its memory."""
    command = [sys.executable, "-m", "benchmarks.suites.clips", json.dumps(setting)]
    environment = {**os.environ, "GLIBC_TUNABLES": KEEPING}
    printed = subprocess.check_output(command, cwd=ROOT, text=True, env=environment)
    yield from json.loads(printed)


KEPT = Suite(kept, SUITE.settings)


if __name__ == "__main__":
    made = clips(**json.loads(sys.argv[1]), others=False)
    print(json.dumps([{**row, "suite": "clips_kept"} for row in made]))
