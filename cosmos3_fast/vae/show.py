"""One latent frame as a picture, or an error where it makes none."""

from __future__ import annotations

import torch
from torch import Tensor

from cosmos3_fast.arguments import dtype_name
from cosmos3_fast.vae.networks.decoder import FrameDecoder


@torch.no_grad()
def decoded_picture(decoder: FrameDecoder, latents: Tensor, name: str) -> Tensor:
    """What `decoder(latents, output="uint8")` gives; of NaN, which is black there, an error.

    Args:
        latents: normalized, [1, z, 1, h, w], on any device.
        name: what messages call them.

    Returns:
        uint8 [H, W, 3], on the CPU.

    Raises:
        ValueError: the latents or their pixels are not finite.
    """
    if not latents.isfinite().all():
        raise ValueError(f"{name} must hold finite values, got NaN or infinity")
    pixels = decoder(latents.to(decoder.device))[0, :, 0].float()
    if not pixels.isfinite().all():
        raise ValueError(
            f"{name} must decode to finite pixels, got NaN or infinity: the weights, or the dtype "
            f"{dtype_name(decoder.dtype)} in which they are computed, do not serve these latents"
        )
    # As the decoder makes bytes.
    picture = (pixels / 2 + 0.5).mul_(255).round_().to(torch.uint8)
    return picture.permute(1, 2, 0).contiguous().cpu()
