"""The VAE of Cosmos3 as networks of 2-D convolutions, and the exact path through the VAE itself."""

from cosmos3_fast.vae.config import UnsupportedVAEError
from cosmos3_fast.vae.networks.decoder import ClipDecoder, FrameDecoder
from cosmos3_fast.vae.networks.encoder import ClipEncoder, FrameEncoder

__all__ = ["ClipDecoder", "ClipEncoder", "FrameDecoder", "FrameEncoder", "UnsupportedVAEError"]
