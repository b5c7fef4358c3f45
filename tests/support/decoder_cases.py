"""Configurations and latents shared by the decoder's tests; reduced widths of the real VAEs."""

from __future__ import annotations

from typing import Any

import torch
from encoder_cases import RESIDUAL, WAN21
from torch import Tensor

from cosmos3_fast.vae.live.exact import decode_sample
from cosmos3_fast.vae.synthetic import synthetic_config, synthetic_vae

WAN22 = {**RESIDUAL, "base_dim": 8, "decoder_base_dim": 8}
WAN21_NARROW = {**WAN21, "base_dim": 8}
QWEN = {k: v for k, v in WAN21_NARROW.items() if k != "patch_size"} | {
    "_class_name": "AutoencoderKLQwenImage",
    "input_channels": 3,
}
# Widths whose duplicating shortcut takes the general route: cells of which a repetition is no part.
UNEVEN = synthetic_config(
    {
        **WAN22,
        "dim_mult": [1, 2, 8, 4],
        "temperal_downsample": [True, False, True],
        "num_res_blocks": 1,
    }
)
# The least that still has every kind of layer, for the compiler and for gradients.
TINY = synthetic_config(
    {
        **WAN22,
        "dim_mult": [1, 2],
        "temperal_downsample": [True],
        "num_res_blocks": 1,
        "z_dim": 4,
    }
)
# The same for clips, which need a temporal factor of 4.
TINY_CLIP = synthetic_config(
    {
        **WAN22,
        "dim_mult": [1, 2, 2],
        "temperal_downsample": [True, True],
        "num_res_blocks": 1,
        "z_dim": 4,
    }
)
FAMILIES: dict[str, dict[str, Any]] = {
    "wan2.2": WAN22,
    "wan2.2 uneven": UNEVEN,
    "wan2.1": WAN21_NARROW,
    "qwen-image": QWEN,
}


def latent_frame(
    config: dict[str, Any], seed: int, batch: int, height: int, width: int, dtype: torch.dtype
) -> Tensor:
    """[B, z, h, w], normalised."""
    generator = torch.Generator().manual_seed(3000 + seed)
    shape = (batch, config["z_dim"], height, width)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def latent_clip(
    config: dict[str, Any],
    seed: int,
    batch: int,
    frames: int,
    height: int,
    width: int,
    dtype: torch.dtype,
    motion: str = "random",
) -> Tensor:
    """[B, z, T, h, w], normalised: each frame new, "still", or "slow", by a twentieth a frame."""
    generator = torch.Generator().manual_seed(4000 + seed)
    shape = (batch, config["z_dim"], frames, height, width)
    latents = torch.randn(shape, generator=generator, dtype=torch.float64)
    if motion != "random":
        steps = 0.05 * latents[:, :, 1:].cumsum(2) if motion == "slow" else 0
        latents[:, :, 1:] = latents[:, :, :1] + steps
    return latents.to(dtype)


def denormalized(config: dict[str, Any], latents: Tensor) -> Tensor:
    """[B, z, T, h, w] as `vae.decode` takes them, computed as the pipelines do."""
    mean, std = (
        torch.tensor(config[name], dtype=torch.float64).to(latents.dtype).view(1, -1, 1, 1, 1)
        for name in ("latents_mean", "latents_std")
    )
    return (latents if latents.dim() == 5 else latents.unsqueeze(2)) * std + mean


def reference(vae: Any, latents: Tensor) -> Tensor:
    """[B, z, h, w] or [B, z, T, h, w], normalised, through the 3-D VAE: [B, 3, F, H, W]."""
    return decode_sample(vae, denormalized(vae.config, latents))


def decoding_vae(family: str, seed: int, dtype: torch.dtype = torch.float32) -> Any:
    """A VAE of `FAMILIES` with seeded random weights."""
    vae = synthetic_vae(FAMILIES[family], seed, decoder_base_dim=None)
    # AutoencoderKLWan.to keeps some modules in float32.
    return torch.nn.Module.to(vae, dtype)
