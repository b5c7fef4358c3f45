"""Exact mode: the engine's own VAE, called on only the frames that matter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from cosmos3_fast.vae.topology import read_config


def encode_mode(vae: Any, pixels: Tensor) -> Tensor:
    """The posterior's mode (its mean) of `vae.encode(pixels)`, without gradients.

    Args:
        vae: a VAE whose `encode` returns diffusers' `AutoencoderKLOutput` or 1-tuple, or a
            distribution with `mode()` as SGLang's does.
        pixels: [B, 3, T, H, W] on the VAE's device and in its dtype.

    Returns:
        [B, z_dim, 1 + (T-1)/4, H/f, W/f] before normalisation.

    Raises:
        TypeError: `encode` returned something else.
    """
    with torch.no_grad():
        out = vae.encode(pixels)
        posterior = out[0] if isinstance(out, tuple) else getattr(out, "latent_dist", out)
        mode = getattr(posterior, "mode", None)
        # torch.Tensor has a method of that name which computes a statistic.
        if not callable(mode) or isinstance(posterior, Tensor):
            raise TypeError(
                f"vae.encode returned {type(out).__name__}, wanted a distribution with mode()"
            )
        return mode()


def normalize_latents(latents: Tensor, config: Any) -> Tensor:
    """`(latents - latents_mean) / latents_std` per channel, in `latents`' own dtype.

    The same operations in the same order as SGLang's `Cosmos3LatentPreparationStage._vae_encode`:
    the statistics are rounded to the latents' dtype first.

    Args:
        latents: [B, z_dim, T, H, W].
        config: the VAE's configuration, with `latents_mean` and `latents_std`.
    """
    mean, std = (
        torch.as_tensor(read_config(config, name))
        .view(1, -1, 1, 1, 1)
        .to(latents.device, latents.dtype)
        for name in ("latents_mean", "latents_std")
    )
    return (latents - mean) / std


def encode_exact(vae: Any, pixels: Tensor) -> Tensor:
    """Normalised latents through the VAE itself, as an unpatched engine computes them.

    Args:
        vae: see `encode_mode`; it has `encoder.conv_in` and `config`.
        pixels: [B, 3, T, H, W] in [-1, 1] with T = 1 + 4k; moved to the VAE's device and dtype.

    Returns:
        [B, z_dim, 1 + k, H/f, W/f] in the VAE's dtype. The VAE's tiling setting is respected.

    Raises:
        ValueError: wrong rank or number of frames.
    """
    if pixels.dim() != 5:
        raise ValueError(f"pixels has shape {list(pixels.shape)}, wanted [B, 3, T, H, W]")
    if pixels.shape[2] % 4 != 1:
        raise ValueError(f"pixels has {pixels.shape[2]} frames, wanted 1 + 4k")
    weight = vae.encoder.conv_in.weight
    return normalize_latents(encode_mode(vae, pixels.to(weight.device, weight.dtype)), vae.config)


@contextmanager
def untiled(vae: Any) -> Iterator[None]:
    """`vae.use_tiling = False` inside the block, where the VAE has that switch."""
    before = getattr(vae, "use_tiling", None)
    if before:
        vae.use_tiling = False
    try:
        yield
    finally:
        if before:
            vae.use_tiling = before
