"""SGLang's Cosmos3 latent preparation, with the op: what its maintainers could write.

The conditioning of `Cosmos3LatentPreparationStage.forward`, from the encoded latents on. In the
engine these are thirteen lines that allocate a mask and two full-size intermediates:

    condition_latents = torch.zeros_like(noise)
    condition_mask = torch.zeros(batch_dim, 1, num_latent_frames, 1, 1, ...)
    for idx in cond_indexes:
        src = min(idx, cond_latent.shape[2] - 1)
        condition_latents[:, :, idx] = cond_latent[:, :, src]
        condition_mask[:, :, idx] = 1.0
    latents = condition_mask * condition_latents + (1.0 - condition_mask) * noise
    velocity_mask = 1.0 - condition_mask

It needs torch and this package alone; `tests/engines/sglang` compares it with the real stage.
"""

from __future__ import annotations

import torch
from torch import Tensor

import cosmos3_fast  # noqa: F401 - registers the op


def condition(
    cond_latent: Tensor, noise: Tensor, cond_indexes: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Conditioned latents, their velocity mask, and the condition latents that are kept beside.

    Args:
        cond_latent: encoded frames [B, C, Tc, H, W], normalised.
        noise: [B, C, T, H, W] in the dtype of the result.
        cond_indexes: conditioned latent frames, each below T. Frames beyond Tc take the last one.

    Returns:
        `latents` [B, C, T, H, W], `velocity_mask` [B, 1, T, 1, 1] and `condition_latents`
        [B, C, T, H, W], all in noise's dtype.
    """
    missing = max(cond_indexes) + 1 - cond_latent.shape[2]
    if missing > 0:
        last = cond_latent[:, :, -1:].expand(-1, -1, missing, -1, -1)
        cond_latent = torch.cat([cond_latent, last], dim=2)
    latents, velocity_mask = torch.ops.cosmos3.prepare_latents(cond_latent, noise, cond_indexes)
    condition_latents = torch.zeros_like(noise)
    torch.ops.cosmos3.prepare_latents_(cond_latent, condition_latents, cond_indexes)
    return latents, velocity_mask.repeat(noise.shape[0], 1, 1, 1, 1), condition_latents


def main() -> None:
    noise = torch.randn(1, 48, 21, 30, 52, dtype=torch.bfloat16)
    encoded = torch.randn(1, 48, 2, 30, 52, dtype=torch.bfloat16)
    latents, velocity_mask, _ = condition(encoded, noise, [0, 1])
    print(f"latents {list(latents.shape)}, velocity mask {velocity_mask.flatten().tolist()}")


if __name__ == "__main__":
    main()
