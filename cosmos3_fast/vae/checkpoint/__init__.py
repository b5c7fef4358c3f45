"""A VAE's checkpoint: which files hold it, what its tensors are called, reading what is needed."""

from cosmos3_fast.vae.checkpoint.reading import CheckpointError, open_checkpoint

__all__ = ["CheckpointError", "open_checkpoint"]
