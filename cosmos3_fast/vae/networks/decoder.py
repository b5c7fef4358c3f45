"""`FrameDecoder`: normalised latents of one frame to pixels, as a 2-D network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cosmos3_fast.ops import unpack_pixels
from cosmos3_fast.vae.compatibility import probe_decoder
from cosmos3_fast.vae.decoder_fold import fold_decoder
from cosmos3_fast.vae.decoder_topology import DecoderTopology
from cosmos3_fast.vae.fold import Read
from cosmos3_fast.vae.networks.base import FoldedNetwork
from cosmos3_fast.vae.networks.layers import (
    Attention,
    Conv3x3,
    DecoderStage,
    NormSiLU,
    ResidualBlock,
)

_OUTPUTS = ("float", "uint8")

# Fewer than in the encoder: the wide stages of a decoder see small images. For Cosmos3 at 256x448
# it leaves out the 10 convolutions of the lowest resolution, whose packed weights would be 1.5 GB.
_WINOGRAD_TILES = 64


class FrameDecoder(FoldedNetwork):
    """The decoder of a Wan-family VAE (the one of Cosmos3) for single frames.

    `decoder(latents)` equals `vae.decode(latents * latents_std + latents_mean)` for one latent
    frame, computed without 3-D convolutions (`cosmos3_fast.vae.decoder_fold` has the algebra). The
    result is that of the *untiled* VAE: a VAE's tiling switch, which changes results at tile
    borders, is ignored.

    Use `from_vae`, `from_pretrained` or `from_state_dict`; the constructor gives a network with
    initial weights, to receive a `state_dict()` of the same topology.

    Parameters do not require gradients; gradients to the latents flow.

    Memory, for the VAE of Cosmos3: 197 M parameters (395 MB in bf16, 790 MB in fp32), where the
    VAE's decoder has 555 M. In fp32 on the CPU, large images add transformed weights of 4 times
    the size of their kernels and a copy of these (`layers.WinogradConv`): 1.6 GB at 256x448.

    Args:
        topology: the structure.
        dtype: of the parameters and of the pixels; fp32, bf16, fp16 or fp64.
        device: of the parameters.

    Attributes:
        topology: the `DecoderTopology`.
        z_dim: latent channels.
        spatial_factor: pixels per latent cell along height and width.
    """

    topology_type = DecoderTopology

    def __init__(
        self,
        topology: DecoderTopology,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__(topology, dtype)
        with torch.device(torch.get_default_device() if device is None else device):
            z_dim, width = topology.z_dim, topology.stages[0].in_channels
            # Two ways in, for latents with and without normalisation.
            self.denormalize = nn.Conv2d(z_dim, z_dim, 1)
            self.post_quant = nn.Conv2d(z_dim, z_dim, 1)
            self.conv_in = Conv3x3(z_dim, width)
            self.middle = nn.Sequential(
                ResidualBlock(width, width), Attention(width), ResidualBlock(width, width)
            )
            self.stages = nn.ModuleList(
                DecoderStage(stage, topology.residual, _WINOGRAD_TILES) for stage in topology.stages
            )
            width = topology.stages[-1].out_channels
            self.norm_out = NormSiLU(width)
            self.conv_out = Conv3x3(width, topology.out_channels)
        self.to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.requires_grad_(False)

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters and of the pixels."""
        return self.conv_in.weight.dtype

    @property
    def device(self) -> torch.device:
        """Of the parameters and of the pixels."""
        return self.conv_in.weight.device

    def forward(self, latents: Tensor, output: str = "float") -> Tensor:
        """Decode one latent frame per batch entry.

        Args:
            latents: normalised, [B, z_dim, h, w] or [B, z_dim, 1, h, w], floating point (cast to
                `dtype`), any strides; on the decoder's device. B may be 0, h and w may not.
            output: "float" or "uint8".

        Returns:
            With H, W = h, w times `spatial_factor`, "float": [B, 3, 1, H, W], clamped to [-1, 1]
            as the VAE does, contiguous, in `dtype`. "uint8": [B, H, W, 3], the same pixels as
            `round(255 (x / 2 + 1/2))`, computed in float32; without gradient.

        Raises:
            ValueError: wrong rank, channels, frames, size, dtype or device, or unknown output.
        """
        return self._decode(self.denormalize, latents, output)

    def decode_unnormalized(self, latents: Tensor, output: str = "float") -> Tensor:
        """`forward` for latents on the VAE's own scale, as `vae.decode` takes them."""
        return self._decode(self.post_quant, latents, output)

    def _decode(self, entry: nn.Conv2d, latents: Tensor, output: str) -> Tensor:
        if output not in _OUTPUTS:
            raise ValueError(f"output must be one of {list(_OUTPUTS)}, got {output!r}")
        frame = self._checked_frame(latents)
        as_bytes = output == "uint8"
        if frame.shape[0] == 0:
            height, width = (size * self.spatial_factor for size in frame.shape[2:])
            shape = (0, height, width, 3) if as_bytes else (0, 3, 1, height, width)
            dtype = torch.uint8 if as_bytes else self.dtype
            return torch.empty(shape, dtype=dtype, device=frame.device)
        x = frame.to(self.dtype, memory_format=torch.channels_last)
        terms = self.middle(self.conv_in.deferred(entry(x)))
        for stage in self.stages:
            terms = stage(terms)
        x = self.conv_out(self.norm_out(*terms))
        pixels = unpack_pixels(x, self.topology.patch_size, as_bytes)
        return pixels if as_bytes else pixels.unsqueeze(2)

    def _checked_frame(self, latents: Tensor) -> Tensor:
        """[B, z_dim, h, w], floating point."""
        shape = list(latents.shape)
        if latents.dim() not in (4, 5):
            raise ValueError(
                f"latents must have shape [B, {self.z_dim}, h, w] or [B, {self.z_dim}, 1, h, w], "
                f"got {shape}"
            )
        if shape[1] != self.z_dim:
            raise ValueError(f"latents must have {self.z_dim} channels, got shape {shape}")
        if latents.dim() == 5:
            if shape[2] != 1:
                raise ValueError(f"latents must have 1 frame, got {shape[2]} in shape {shape}")
            latents = latents[:, :, 0]
        if min(shape[-2:]) < 1:
            raise ValueError(f"latents must have height and width of at least 1, got shape {shape}")
        if not latents.is_floating_point():
            raise ValueError(f"latents must be floating point, got {latents.dtype}")
        if latents.device != self.device:
            raise ValueError(
                f"latents must be on the decoder's device, {self.device}, got {latents.device}"
            )
        return latents

    def _fold(self, read: Read, read_earlier: Read) -> dict[str, Tensor]:
        return fold_decoder(self.topology, read, self.dtype)

    def _probe(self, vae: Any) -> None:
        probe_decoder(vae, self)
