"""What several benchmarks measure: the engine's stage written out, and the unfused encoder."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import ROOT, gate_equal, gate_error
from cosmos3_fast.frames import latent_frames
from cosmos3_fast.images.load import ImageLike, load_pixels
from cosmos3_fast.ops.prepare_latents import prepare_latents_formula
from cosmos3_fast.ops.rms_norm_silu import factors, rms_norm_silu_reference
from cosmos3_fast.vae import FrameEncoder
from cosmos3_fast.vae.live.exact import encode_exact
from cosmos3_fast.vae.networks import layers
from cosmos3_fast.vae.synthetic import COSMOS3_VAE_CONFIG, synthetic_vae

PHOTOGRAPH = ROOT / "examples" / "falcon9_dscovr.jpg"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SEED = 42
TINY_DIM = 16  # a tenth of the VAE's width: for trying a suite, not for figures

OURS, ONE_FRAME, UNFUSED = "ours", "vae.encode of 1 frame", "folded, unfused"


def all_frames(frames: int) -> str:
    """The name of the path through `vae.encode` of a whole clip."""
    return ONE_FRAME if frames == 1 else f"vae.encode of {frames} frames"


def sides(size: str) -> tuple[int, int]:
    """Of a "HEIGHTxWIDTH"."""
    height, width = size.split("x")
    return int(height), int(width)


def vae_config(base_dim: int | None) -> dict[str, Any]:
    """Cosmos3's VAE, in another width where one is given."""
    return {**COSMOS3_VAE_CONFIG, **({} if base_dim is None else {"base_dim": base_dim})}


def vae_and_encoder(dtype: str, base_dim: int | None = None) -> tuple[Any, FrameEncoder]:
    """diffusers' VAE with seeded random weights, and the encoder folded from it."""
    vae = torch.nn.Module.to(synthetic_vae(vae_config(base_dim), 0), DTYPES[dtype])
    return vae, FrameEncoder.from_vae(vae)


def _plain_sum(x: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """`x + bias + residual` as torch adds; may write into `x`, which is a convolution's result."""
    if bias is not None:
        x = x + bias.view(-1, 1, 1)
    if residual is None:
        return x
    t, s = factors(x, residual)
    pooled = F.avg_pool2d(residual, s) if s > 1 else residual
    if t == 1:
        return x + pooled
    x[:, t - 1 :: t] += pooled
    return x


@functools.cache
def _plain_functions(norm: Callable[..., Tensor]) -> dict[str, Callable[..., Any]]:
    """In place of those of `layers`; always the same, for which torch.compile looks."""

    def plain_norm(
        x: Tensor, weight: Tensor | None, silu: bool = True, *terms: Tensor | None
    ) -> Tensor:
        return norm(_plain_sum(x, *terms), weight, silu)

    def plain_sum_and_norm(
        x: Tensor, weight: Tensor | None, silu: bool = True, *terms: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        total = _plain_sum(x, *terms)
        return total, norm(total, weight, silu)

    def plain_pad(
        x: Tensor, bias: Tensor | None, residual: Tensor | None, pad: bool = True
    ) -> Tensor:
        total = _plain_sum(x, bias, residual)
        return F.pad(total, (0, 1, 0, 1)) if pad else total

    return {
        "rms_norm_silu": plain_norm,
        "add_rms_norm_silu": plain_sum_and_norm,
        "add_pad": plain_pad,
        "defers_bias": lambda x: False,
        "takes_winograd": lambda *_: False,
    }


@contextmanager
def unfused(norm: Callable[..., Tensor] = rms_norm_silu_reference) -> Iterator[None]:
    """Inside, the folded networks run without this package's kernels: torch's convolutions with
    their biases, sums, pads and pooling, and `norm(x, weight, silu)`."""
    with mock.patch.multiple(layers, **_plain_functions(norm)):
        yield


def encode_unfused(encoder: FrameEncoder, pixels: Tensor) -> Tensor:
    with unfused():
        return encoder(pixels)


@torch.no_grad()
def engine_stage(
    vae: Any,
    image: ImageLike,
    num_frames: int,
    height: int,
    width: int,
    *,
    encoded_frames: int = 1,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Latent preparation as the engines write it: an image to latents and their velocity mask.

    Args:
        vae: whose device the results are on.
        image: see `load_pixels`.
        encoded_frames: how often the image is repeated for `vae.encode`: SGLang and vLLM-Omni
            encode 1 frame, diffusers all of them.
        dtype: of the results.
    """
    pixels = load_pixels(image, height, width)
    clip = pixels[:, :, None].expand(-1, -1, encoded_frames, -1, -1)
    condition = encode_exact(vae, clip)[:, :, :1]
    device = condition.device
    shape = (1, condition.shape[1], latent_frames(num_frames), *condition.shape[3:])
    generator = torch.Generator(device).manual_seed(SEED)
    noise = torch.randn(shape, generator=generator, device=device, dtype=dtype)
    return prepare_latents_formula(condition, noise)


def gate_stage(name: str, ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> float:
    """Latents and mask against the engine's: the error of frame 0; all else must be equal."""
    (latents, mask), (wanted, wanted_mask) = ours, theirs
    error = gate_error(f"{name}: latent frame 0", latents[:, :, :1], wanted[:, :, :1])
    gate_equal(f"{name}: noise frames", latents[:, :, 1:], wanted[:, :, 1:])
    gate_equal(f"{name}: velocity mask", mask, wanted_mask)
    return error
