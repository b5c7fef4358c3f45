"""The VAE encoder of Cosmos3 as a 2-D network, and the exact path through the VAE itself."""

from cosmos3_fast.vae.encoder import ConditioningEncoder
from cosmos3_fast.vae.topology import UnsupportedVAEError

__all__ = ["ConditioningEncoder", "UnsupportedVAEError"]
