"""Latent frames and pixel frames: the arithmetic of the causal VAE, and its only home.

The VAE encodes the first pixel frame alone and then `factor` frames at a time, so 1 + factor·k
pixel frames make 1 + k latent frames, and latent frame t depends on pixel frames 0 … factor·t.
"""

from __future__ import annotations

from collections.abc import Iterable

TEMPORAL_FACTOR = 4
"""Pixel frames per latent frame after the first, in Wan 2.1, Wan 2.2 (Cosmos3) and Qwen-Image."""


def latent_frames(pixel_frames: int, factor: int = TEMPORAL_FACTOR) -> int:
    """Latent frames of a clip; pixel frames beyond the last full group are not counted."""
    return 1 + (pixel_frames - 1) // factor


def pixel_frames(latent_frames: int, factor: int = TEMPORAL_FACTOR) -> int:
    """Pixel frames that the first `latent_frames` latent frames, at least one, depend on."""
    return 1 + factor * (latent_frames - 1)


def conditioned_span(condition_frames: Iterable[int]) -> int:
    """Latent frames from the first through the last conditioned one; 0 where none is."""
    return 1 + max(condition_frames, default=-1)


def is_whole(pixel_frames: int, factor: int = TEMPORAL_FACTOR) -> bool:
    """Whether a clip of `pixel_frames`, at least one, is 1 + factor·k frames long."""
    return pixel_frames >= 1 and pixel_frames % factor == 1 % factor
