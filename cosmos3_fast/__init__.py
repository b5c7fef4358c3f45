"""Conditioning image to NVIDIA Cosmos3 latents: exact 2-D VAE encode and one fused op."""

from cosmos3_fast.acceleration import accelerate, refresh, restore
from cosmos3_fast.latents import LatentPreparation, PreparedLatents
from cosmos3_fast.ops import BackendUnavailableError, prepare_latents, prepare_latents_
from cosmos3_fast.vae import ClipEncoder, FrameDecoder, FrameEncoder, UnsupportedVAEError

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailableError",
    "ClipEncoder",
    "FrameDecoder",
    "FrameEncoder",
    "LatentPreparation",
    "PreparedLatents",
    "UnsupportedVAEError",
    "accelerate",
    "prepare_latents",
    "prepare_latents_",
    "refresh",
    "restore",
]
