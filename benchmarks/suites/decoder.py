"""One latent frame to pixels: the 3-D VAE, a plain last-tap fold, and `FrameDecoder`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import gate_error, gate_rounding, say
from benchmarks.paths import DTYPES, OURS, SEED, TINY_DIM, sides, unfused, vae_config
from benchmarks.suites import Row, Suite, timed_rows
from cosmos3_fast import FrameDecoder
from cosmos3_fast.vae import synthetic
from cosmos3_fast.vae.live.exact import decode_sample
from cosmos3_fast.vae.networks import layers
from cosmos3_fast.vae.verify import FLOAT32_BOUND

VAE, PLAIN = "vae.decode of 1 frame", "last taps, plain"
# The plain fold is not held to the VAE's own rounding, only to computing the same.
PLAIN_BOUND = {"float32": FLOAT32_BOUND, "bfloat16": 0.1}


def _plain_norm(x: Tensor, weight: Tensor | None, silu: bool = True) -> Tensor:
    y = F.normalize(x, dim=1)
    if weight is not None:
        y = y * x.shape[1] ** 0.5 * weight.view(-1, 1, 1)
    return F.silu(y) if silu else y


def _plain_upsample(
    self: layers.Upsample, x: Tensor, shortcut: Tensor | None = None, factor_t: int = 1
) -> layers.Sum:
    y = F.conv2d(F.interpolate(x, scale_factor=2.0), self.weight, self.bias, padding=1)
    if shortcut is None:
        return layers.Sum(y)
    phases = [layers.duplicated_phase(shortcut, y.shape[1], factor_t, i) for i in range(4)]
    return layers.Sum(y + F.pixel_shuffle(torch.stack(phases, 2).flatten(1, 2), 2))


@contextmanager
def plain() -> Iterator[None]:
    """Inside, a `FrameDecoder` is what others make of single frames: the last temporal taps only.

    The 3x3 convolutions follow the up-sampling, and norms and convolutions are torch's.
    """
    with unfused(_plain_norm), mock.patch.object(layers.Upsample, "deferred", _plain_upsample):
        yield


def decoder_config(base_dim: int | None) -> dict[str, Any]:
    """Cosmos3's VAE, with another decoder width where one is given."""
    config = vae_config(base_dim)
    return config if base_dim is None else {**config, "decoder_base_dim": base_dim}


def latent_frame(config: Any, size: str, dtype: torch.dtype) -> Tensor:
    """Seeded noise [1, z, 1, h, w] on the VAE's own scale."""
    height, width = (side // 16 for side in sides(size))
    generator = torch.Generator().manual_seed(SEED)
    return torch.randn(1, config["z_dim"], 1, height, width, generator=generator).to(dtype)


@torch.inference_mode()
def decoder(
    size: str, rounds: int, dtypes: tuple[str, ...] = tuple(DTYPES), base_dim: int | None = None
) -> Iterator[Row]:
    config = decoder_config(base_dim)
    for dtype in dtypes:
        torch_dtype = DTYPES[dtype]
        vae = synthetic.synthetic_vae(config, 0, decoder_base_dim=None)
        vae = torch.nn.Module.to(vae, torch_dtype)
        ours = FrameDecoder.from_vae(vae)
        latents = latent_frame(vae.config, size, torch_dtype)

        def plainly(decode: FrameDecoder = ours, z: Tensor = latents) -> Tensor:
            with plain():
                return decode.decode_unnormalized(z)

        paths: dict[str, Callable[[], Tensor]] = {
            VAE: lambda v=vae, z=latents: decode_sample(v, z),
            PLAIN: plainly,
            OURS: lambda d=ours, z=latents: d.decode_unnormalized(z),
        }
        name = f"decoder {size} {dtype}"
        say(f"{name}: correctness gate ...")
        wanted = paths[VAE]()
        errors = {PLAIN: gate_error(f"{name}, {PLAIN}", plainly(), wanted, PLAIN_BOUND[dtype])}
        if torch_dtype == torch.float32:
            errors[OURS] = gate_error(f"{name}, {OURS}", paths[OURS](), wanted, FLOAT32_BOUND)
        else:
            # The error of float32 is four orders below that of bfloat16.
            exact = decode_sample(copy.deepcopy(vae).float(), latents.float())
            compared = gate_rounding(name, paths[OURS](), wanted, exact)
            errors[OURS], errors[VAE] = compared.error, compared.bound
            del errors[PLAIN]
        del wanted
        yield from timed_rows("decoder", size, dtype, paths, VAE, rounds=rounds, errors=errors)


SUITE = Suite(
    decoder,
    {
        "tiny": {"size": "32x48", "rounds": 1, "base_dim": TINY_DIM},
        "short": {"size": "256x448", "rounds": 3, "dtypes": ("float32",)},
        "full": {"size": "256x448", "rounds": 5},
    },
    order=25,
)
