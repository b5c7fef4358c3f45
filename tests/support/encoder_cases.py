"""Configurations, images and VAEs shared by the encoder's tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cosmos3_fast.vae.live.exact import encode_exact
from cosmos3_fast.vae.synthetic import (
    COSMOS3_VAE_CONFIG,
    synthetic_config,
    synthetic_state_dict,
    synthetic_vae,
)

# Reduced widths; what remains is as in the real VAEs.
RESIDUAL = synthetic_config({**COSMOS3_VAE_CONFIG, "base_dim": 16})
WAN21 = synthetic_config(
    {
        "_class_name": "AutoencoderKLWan",
        "base_dim": 16,
        "z_dim": 16,
        "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "attn_scales": [],
        "temperal_downsample": [False, True, True],
        "dropout": 0.0,
        "patch_size": None,
    }
)
WAN21_ATTENTION = {**WAN21, "attn_scales": [1.0, 0.25]}
QWEN = {k: v for k, v in WAN21.items() if k != "patch_size"} | {
    "_class_name": "AutoencoderKLQwenImage",
    "input_channels": 3,
}
# Widths whose average shortcut takes the general route: groups that are not one cell.
UNEVEN = synthetic_config(
    {
        **RESIDUAL,
        "base_dim": 8,
        "dim_mult": [1, 2, 8, 4],
        "temperal_downsample": [True, False, True],
        "num_res_blocks": 1,
    }
)
# The least that still has every kind of layer, for the compiler.
TINY = synthetic_config(
    {
        **RESIDUAL,
        "dim_mult": [2, 2],
        "temperal_downsample": [True],
        "num_res_blocks": 1,
        "z_dim": 4,
    }
)
# The same for clips: two temporal down-samplings, one whose average shortcut is a mere pooling.
TINY_CLIP = synthetic_config(
    {
        **RESIDUAL,
        "dim_mult": [2, 2, 2],
        "temperal_downsample": [True, True],
        "num_res_blocks": 1,
        "z_dim": 4,
    }
)


HALVES = [torch.bfloat16, torch.float16]


def qwen_vae(seed: int = 0) -> Any:
    import diffusers

    vae = diffusers.AutoencoderKLQwenImage.from_config(QWEN)
    vae.load_state_dict(synthetic_state_dict(QWEN, seed), strict=False)
    return vae.eval().requires_grad_(False)


BUILDERS: dict[str, Callable[[int], Any]] = {
    "wan2.2": lambda seed: synthetic_vae(RESIDUAL, seed),
    "wan2.2 uneven": lambda seed: synthetic_vae(UNEVEN, seed),
    "wan2.1": lambda seed: synthetic_vae(WAN21, seed),
    "wan2.1 attention": lambda seed: synthetic_vae(WAN21_ATTENTION, seed),
    "qwen-image": qwen_vae,
}


def image(seed: int, batch: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """[B, 3, H, W] uniform in [-1, 1]."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return (torch.rand(batch, 3, height, width, generator=generator) * 2 - 1).to(dtype)


def clip(seed: int, batch: int, frames: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """[B, 3, T, H, W] uniform in [-1, 1]."""
    generator = torch.Generator().manual_seed(2000 + seed)
    return (torch.rand(batch, 3, frames, height, width, generator=generator) * 2 - 1).to(dtype)


def reference(vae: Any, pixels: Tensor) -> Tensor:
    """[B, 3, H, W] through the 3-D VAE, normalised as SGLang does."""
    return encode_exact(vae, pixels[:, :, None])
