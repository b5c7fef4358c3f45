"""A VAE of a real topology with seeded random weights, for tests, demos and timings.

It encodes to noise-like latents: right shapes, costs and value ranges, no meaning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cosmos3_fast.vae.topology import EncoderTopology, Shape

COSMOS3_VAE_CONFIG: dict[str, Any] = {
    "_class_name": "AutoencoderKLWan",
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
    "dropout": 0.0,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 16,
}
"""The configuration of the VAE that Cosmos3 uses, but for its latent statistics."""


def synthetic_config(
    config: Mapping[str, Any] = COSMOS3_VAE_CONFIG, seed: int = 0
) -> dict[str, Any]:
    """`config` with seeded `latents_mean` (about ±0.5) and `latents_std` (0.5 to 1.5)."""
    generator = torch.Generator().manual_seed(seed)
    z_dim = config["z_dim"]
    mean = torch.randn(z_dim, generator=generator) * 0.5
    std = torch.rand(z_dim, generator=generator) + 0.5
    return {
        **config,
        "latents_mean": [round(value, 4) for value in mean.tolist()],
        "latents_std": [round(value, 4) for value in std.tolist()],
    }


def synthetic_state_dict(config: Any, seed: int = 0) -> dict[str, Tensor]:
    """Encoder and `quant_conv` tensors of the 3-D VAE in fp32, with diffusers' names.

    Gammas scatter around 1 and biases around 0, unlike at initialisation, so that folds are put
    to the test. Kernels are normal with variance 1 / (Cin·kH·kW): one frame passes through one
    temporal tap.

    Args:
        config: a complete VAE configuration (`synthetic_config`).
        seed: the same seed gives the same tensors.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = EncoderTopology.from_config(config).tensor_shapes()
    return {name: _random_tensor(name, shape, generator) for name, shape in shapes.items()}


def _random_tensor(name: str, shape: Shape, generator: torch.Generator) -> Tensor:
    values = torch.randn(shape, generator=generator)
    if name.endswith(".gamma"):
        return values.mul_(0.25).add_(1.0)
    if name.endswith(".bias"):
        return values.mul_(0.25)
    return values.mul_((shape[1] * shape[-2] * shape[-1]) ** -0.5)


def synthetic_vae(
    config: Mapping[str, Any] = COSMOS3_VAE_CONFIG, seed: int = 0, decoder_base_dim: int = 16
) -> Any:
    """A diffusers `AutoencoderKLWan` in fp32 whose encoder has `synthetic_state_dict`'s weights.

    Args:
        config: latent statistics are added where it has none.
        seed: of weights and statistics.
        decoder_base_dim: a small decoder saves time and memory.
    """
    from diffusers import AutoencoderKLWan

    if "latents_mean" not in config:
        config = synthetic_config(config, seed)
    # The initialisation that the meta device skips takes longer than all the rest.
    with torch.device("meta"):
        vae = AutoencoderKLWan.from_config({**config, "decoder_base_dim": decoder_base_dim})
    state = synthetic_state_dict(config, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for name, tensor in vae.state_dict().items():
        if name not in state:
            state[name] = _random_tensor(name, tuple(tensor.shape), generator)
    vae.load_state_dict(state, assign=True)
    return vae.eval().requires_grad_(False)
