"""The VAE of Cosmos3 as 2-D networks, and the exact path through the VAE itself."""

from cosmos3_fast.vae.networks.clip import ClipEncoder
from cosmos3_fast.vae.networks.decoder import FrameDecoder
from cosmos3_fast.vae.networks.encoder import FrameEncoder
from cosmos3_fast.vae.config import UnsupportedVAEError

__all__ = ["ClipEncoder", "FrameDecoder", "FrameEncoder", "UnsupportedVAEError"]
