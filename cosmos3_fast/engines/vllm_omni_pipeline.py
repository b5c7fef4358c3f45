"""vLLM-Omni's Cosmos3 pipeline with single frames encoded by the folded 2-D encoder.

A module of its own because it imports vLLM-Omni: `cosmos3_fast.engines.vllm_omni` registers it by
name, and the engine imports it where it serves Cosmos3. The processing functions are the
engine's; its registry looks for them beside the class.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from vllm_omni.diffusion.models.cosmos3 import pipeline_cosmos3
from vllm_omni.diffusion.models.cosmos3.pipeline_cosmos3 import (
    get_cosmos3_ir_op_priority_func,
    get_cosmos3_post_process_func,
    get_cosmos3_pre_process_func,
)

from cosmos3_fast.engines.common import FoldedVAE
from cosmos3_fast.vae import FrameEncoder, UnsupportedVAEError

__all__ = [
    "Cosmos3OmniDiffusersPipeline",
    "get_cosmos3_ir_op_priority_func",
    "get_cosmos3_post_process_func",
    "get_cosmos3_pre_process_func",
]

logger = logging.getLogger(__name__)


# vLLM-Omni finds the cache backends of a pipeline by its class's name.
class Cosmos3OmniDiffusersPipeline(pipeline_cosmos3.Cosmos3OmniDiffusersPipeline):
    """The engine's pipeline; an image or a clip of one frame is encoded without 3-D convolutions.

    Image-to-video, policy and forward dynamics, video-to-video conditioned on latent frame 0
    alone, and one-frame transfer controls take the folded encoder, in the VAE's dtype. Its result
    is that of the untiled VAE, also where the VAE is set to tile or to share tiles among ranks:
    each rank then encodes the whole frame, and no rank waits for another.

    The engine's own encode serves clips, sizes that are not whole latent cells, and, after one
    warning, a VAE that cannot be folded.
    """

    # The VAE, and its folded encoder or, where it cannot be folded, None. A tuple, because a module
    # assigned to an attribute would become a part of this one.
    _cosmos3_fast: tuple[Any, FoldedVAE | None] | None = None

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """The engine's; what was folded before is folded again at the next use."""
        self._cosmos3_fast = None
        return super().load_weights(weights)

    def _encode_conditioning_image_latent(self, image_tensor: Tensor) -> Tensor:
        if image_tensor.ndim == 4:
            latent = self._encode_frame(image_tensor.unsqueeze(2), pin_cpu=True)
            if latent is not None:
                return latent.to(self.dtype)
        return super()._encode_conditioning_image_latent(image_tensor)

    def _encode_video_tensor(self, video_tensor: Tensor, image_size: Any | None = None) -> Tensor:
        video = video_tensor.unsqueeze(0) if video_tensor.ndim == 4 else video_tensor
        if video.ndim == 5 and video.shape[0] == 1:
            latent = self._encode_frame(video)
            if latent is not None:
                return self._crop_latent_to_image_size(latent, image_size).to(self.dtype)
        return super()._encode_video_tensor(video_tensor, image_size)

    def _encode_frame(self, pixels: Tensor, pin_cpu: bool = False) -> Tensor | None:
        """Normalised latents [B, C, 1, h, w] of pixels [B, 3, 1, H, W] in the VAE's dtype.

        None where the engine has to encode.
        """
        if pixels.shape[1:3] != (3, 1):
            return None
        encoder = self._folded_encoder()
        if encoder is None or any(size % encoder.spatial_factor for size in pixels.shape[3:]):
            return None
        with torch.no_grad():
            return encoder(self._to_vae_device(pixels, pin_cpu=pin_cpu))

    def _folded_encoder(self) -> FrameEncoder | None:
        if self._cosmos3_fast is None or self._cosmos3_fast[0] is not self.vae:
            self._cosmos3_fast = self.vae, FoldedVAE(self.vae)
            logger.info("cosmos3_fast folds the VAE's encoder for single frames")
        folded = self._cosmos3_fast[1]
        if folded is None:
            return None
        try:
            return folded.encoder(self.device)
        except UnsupportedVAEError as error:
            self._cosmos3_fast = self.vae, None
            logger.warning("cosmos3_fast leaves every frame to the engine's VAE: %s", error)
            return None
