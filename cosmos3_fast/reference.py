"""The eager formulas: the specification that every kernel is tested against.

`formula` is what the engines write today (SGLang's `Cosmos3LatentPreparationStage`, diffusers'
`Cosmos3OmniPipeline.prepare_latents`). The other functions are the ops' own contract in plain
torch, and serve as the `eager` backend.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def formula(
    cond_latent: Tensor, noise: Tensor, condition_frames: Sequence[int] = (0,)
) -> tuple[Tensor, Tensor]:
    """The engines' expression. A NaN leaks from the operand that is multiplied by zero."""
    cond_latent = cond_latent.to(noise.dtype)
    num_frames = noise.shape[2]
    condition_mask = noise.new_zeros(1, 1, num_frames, 1, 1)
    condition_latents = torch.zeros_like(noise)
    for frame in condition_frames:
        source = frame if cond_latent.shape[2] > 1 else 0
        condition_latents[:, :, frame] = cond_latent[:, :, source]
        condition_mask[:, :, frame] = 1.0
    latents = condition_mask * condition_latents + (1.0 - condition_mask) * noise
    return latents, 1.0 - condition_mask


def prepare_latents_(
    cond_latent: Tensor, noise: Tensor, condition_frames: Sequence[int] = (0,)
) -> Tensor:
    """Writes the conditioned frames into `noise`; returns the velocity mask [1, 1, T, 1, 1]."""
    velocity_mask = noise.new_ones(1, 1, noise.shape[2], 1, 1)
    for frame in condition_frames:
        source = frame if cond_latent.shape[2] > 1 else 0
        noise[:, :, frame] = cond_latent[:, :, source]
        velocity_mask[:, :, frame] = 0.0
    return velocity_mask


def prepare_latents(
    cond_latent: Tensor, noise: Tensor, condition_frames: Sequence[int] = (0,)
) -> tuple[Tensor, Tensor]:
    """Selects per frame: `latents[:, :, t]` is `cond_latent` for t in condition_frames, else noise.

    Equal (==) to `formula` for finite inputs.
    """
    latents = noise.clone(memory_format=torch.contiguous_format)
    return latents, prepare_latents_(cond_latent, latents, condition_frames)


def prepare_latents_mask(
    cond_latent: Tensor, noise: Tensor, condition_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """`m * cond + (1 - m) * noise` in float32 (float64 for float64 noise), rounded once."""
    compute = torch.float64 if noise.dtype == torch.float64 else torch.float32
    mask = condition_mask.to(compute)
    cond = cond_latent.to(compute)
    if cond.shape[2] > 1:
        cond = cond[:, :, : noise.shape[2]]
    latents = mask * cond + (1.0 - mask) * noise.to(compute)
    return latents.to(noise.dtype).contiguous(), (1.0 - mask).to(noise.dtype).contiguous()
