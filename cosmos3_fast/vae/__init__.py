"""The VAE encoder of Cosmos3 as 2-D networks, and the exact path through the VAE itself."""

from cosmos3_fast.vae.clip import ClipEncoder
from cosmos3_fast.vae.encoder import FrameEncoder
from cosmos3_fast.vae.topology import UnsupportedVAEError

__all__ = ["ClipEncoder", "FrameEncoder", "UnsupportedVAEError"]
