"""What the engine adapters share: mode, announcement, and the tiny VAE of their self-tests."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import torch

from cosmos3_fast.vae.live.paths import Choice, check_mode
from cosmos3_fast.vae.synthetic import (
    COSMOS3_VAE_CONFIG,
    synthetic_config,
    synthetic_decoder_state_dict,
    synthetic_state_dict,
)

logger = logging.getLogger(__name__)

MODE_VARIABLE = "COSMOS3_FAST"
_OPTIONS = {"clips", "graphs"}


def choice_from_environment() -> Choice:
    """What the environment variable COSMOS3_FAST asks for: exact (if it is unset), fast or off.

    "fast" may have options after it. "clips": clips too go through folded networks; the engines
    have fused ones of their own, so that nobody gets ours who does not ask for them. "graphs":
    calls of one frame are replayed as CUDA graphs.

    Raises:
        ValueError: the variable holds something else.
    """
    value = os.environ.get(MODE_VARIABLE, "").strip().lower() or "exact"
    mode, *options = (part.strip() for part in value.split(","))
    checked = check_mode(mode, MODE_VARIABLE)
    known = len(_OPTIONS.intersection(options)) == len(options)
    if options and (checked != "fast" or not known):
        raise ValueError(
            f"{MODE_VARIABLE} must be exact, fast, 'fast,clips', 'fast,graphs', "
            f"'fast,clips,graphs' or off, got {value!r}"
        )
    return Choice(checked, clips="clips" in options, graphs="graphs" in options)


def guarded(wanted: Callable[..., int | None], *args: Any) -> int | None:
    """`wanted(*args)`, the announcement; all frames where it fails on what this release gives."""
    try:
        return wanted(*args)
    except Exception as error:  # the engine has the right to refuse or to know better
        logger.info("cosmos3_fast announces nothing: %r", error)
        return None


def tiny_vae_config(z_dim: int = 4) -> dict[str, Any]:
    """Cosmos3's VAE in small, with seeded statistics: 16 pixels and 4 frames per latent cell."""
    small = {"base_dim": 8, "decoder_base_dim": 8, "z_dim": z_dim, "num_res_blocks": 1}
    return synthetic_config({**COSMOS3_VAE_CONFIG, **small})


def load_tiny_weights(
    vae: Any, config: dict[str, Any], device: torch.device | str, dtype: torch.dtype
) -> Any:
    """Seeded random weights for a VAE of `config` on the meta device.

    Returns:
        `vae`, for inference.
    """
    known = synthetic_state_dict(config) | synthetic_decoder_state_dict(config)
    state = {
        name: known[name] if name in known else torch.zeros(tensor.shape, device="cpu")
        for name, tensor in vae.state_dict().items()
    }
    vae.load_state_dict(state, assign=True)
    return vae.to(device, dtype).eval().requires_grad_(False)


def tiny_diffusers_vae(
    cls: Any, config: dict[str, Any], device: torch.device | str, dtype: torch.dtype
) -> Any:
    """A VAE of a class that is, or is derived from, diffusers' `AutoencoderKLWan`."""
    with torch.device("meta"):
        vae = cls.from_config(config)
    return load_tiny_weights(vae, config, device, dtype)
