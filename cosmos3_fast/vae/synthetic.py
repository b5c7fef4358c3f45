"""A VAE of a real topology with seeded random weights, for tests, demos and timings.

It encodes to noise-like latents and decodes to noise-like pixels: right shapes, costs and value
ranges, no meaning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cosmos3_fast.vae.topology import DecoderTopology, EncoderTopology, Shape

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
    mean = torch.randn(z_dim, generator=generator, device="cpu") * 0.5
    std = torch.rand(z_dim, generator=generator, device="cpu") + 0.5
    return {
        **config,
        "latents_mean": [round(value, 4) for value in mean.tolist()],
        "latents_std": [round(value, 4) for value in std.tolist()],
    }


def synthetic_state_dict(config: Any, seed: int = 0) -> dict[str, Tensor]:
    """Encoder and `quant_conv` tensors of the 3-D VAE in float32, with diffusers' names.

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


def synthetic_decoder_state_dict(config: Any, seed: int = 0) -> dict[str, Tensor]:
    """Decoder and `post_quant_conv` tensors, as `synthetic_state_dict` makes the encoder's.

    The last convolution is smaller, so that most pixels lie inside [-1, 1], where no clamp hides
    an error.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    shapes = DecoderTopology.from_config(config).tensor_shapes()
    tensors = {name: _random_tensor(name, shape, generator) for name, shape in shapes.items()}
    tensors["decoder.conv_out.weight"].mul_(0.4)
    return tensors


def _random_tensor(name: str, shape: Shape, generator: torch.Generator) -> Tensor:
    values = torch.randn(shape, generator=generator, device="cpu")
    if name.endswith(".gamma"):
        return values.mul_(0.25).add_(1.0)
    if name.endswith(".bias"):
        return values.mul_(0.25)
    return values.mul_((shape[1] * shape[-2] * shape[-1]) ** -0.5)


def synthetic_vae(
    config: Mapping[str, Any] = COSMOS3_VAE_CONFIG,
    seed: int = 0,
    decoder_base_dim: int | None = 16,
) -> Any:
    """A diffusers VAE in float32 with the weights of both synthetic state dicts.

    Args:
        config: `_class_name` says which class, by default `AutoencoderKLWan`; latent statistics
            are added where it has none.
        seed: of weights and statistics.
        decoder_base_dim: a small decoder saves time and memory; None: as `config` has it.
            Qwen-Image's is as wide as its encoder.
    """
    import diffusers

    if "latents_mean" not in config:
        config = synthetic_config(config, seed)
    name = config.get("_class_name", "AutoencoderKLWan")
    if decoder_base_dim is not None and name == "AutoencoderKLWan":
        config = {**config, "decoder_base_dim": decoder_base_dim}
    # The initialisation that the meta device skips takes longer than all the rest.
    with torch.device("meta"):
        vae = getattr(diffusers, name).from_config(config)
    state = synthetic_state_dict(config, seed) | synthetic_decoder_state_dict(config, seed)
    vae.load_state_dict(state, assign=True)
    return vae.eval().requires_grad_(False)
