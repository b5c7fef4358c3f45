"""`FrameEncoder`: one frame of pixels to normalised latents, as a 2-D network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cosmos3_fast.ops import pack_pixels
from cosmos3_fast.ops._torch import has_memory
from cosmos3_fast.vae.compatibility import probe_encoder, probe_posterior
from cosmos3_fast.vae.fold import Read, fold_encoder
from cosmos3_fast.vae.networks.base import FoldedNetwork
from cosmos3_fast.vae.networks.layers import (
    NO_TILES,
    Attention,
    Conv3x3,
    EncoderStage,
    NormSiLU,
    ResidualBlock,
)
from cosmos3_fast.vae.topology import EncoderTopology, PosteriorTopology


class FrameEncoder(FoldedNetwork):
    """The encoder of a Wan-family VAE (the one of Cosmos3) for single frames.

    `encoder(pixels)` equals `(vae.encode(pixels).mode() - latents_mean) / latents_std` for one
    frame, computed without 3-D convolutions: a causal convolution sees only zeros before the
    first frame, so its last temporal tap is all that acts (`cosmos3_fast.vae.fold` has the
    algebra). The result is that of the *untiled* VAE: a VAE's tiling switch, which changes
    results at tile borders, is ignored.

    Use `from_vae`, `from_pretrained` or `from_state_dict`; the constructor gives a network with
    initial weights, to receive a `state_dict()` of the same topology.

    Parameters do not require gradients; gradients to the pixels flow.

    Args:
        topology: the structure.
        dtype: of the parameters and of the latents; fp32, bf16, fp16 or fp64.
        device: of the parameters.

    Attributes:
        topology: the `EncoderTopology`.
        z_dim: latent channels.
        spatial_factor: pixels per latent cell along height and width.
        checks_values: refuse pixels that are not in [-1, 1] by far (on the CPU only); an engine
            switches it off, since its own encode takes any.
    """

    topology_type = EncoderTopology
    checks_values = True

    def __init__(
        self,
        topology: EncoderTopology,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__(topology, dtype)
        with torch.device(torch.get_default_device() if device is None else device):
            width = topology.stages[0].in_channels
            self.conv_in = Conv3x3(topology.packed_channels, width, NO_TILES)
            self.stages = nn.ModuleList(
                EncoderStage(stage, topology.residual) for stage in topology.stages
            )
            width = topology.stages[-1].out_channels
            self.middle = nn.Sequential(
                ResidualBlock(width, width), Attention(width), ResidualBlock(width, width)
            )
            self.norm_out = NormSiLU(width)
            self.conv_out = Conv3x3(width, len(topology.output_statistics[0]))
        self.to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.requires_grad_(False)

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters and of the latents."""
        return self.conv_in.weight.dtype

    @property
    def device(self) -> torch.device:
        """Of the parameters and of the latents."""
        return self.conv_in.weight.device

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode one frame per batch entry.

        Args:
            pixels: [B, 3, H, W] or [B, 3, 1, H, W] in [-1, 1], floating point (cast to `dtype`),
                any strides; or bytes [B, H, W, 3], uint8, normalised here as the engines do
                (`2 (x / 255) - 1`). On the encoder's device; H and W are multiples of
                `spatial_factor`. B may be 0. On the CPU, values that are not finite or beyond ±2
                (pixels in [0, 255]) are refused.

        Returns:
            [B, z_dim, 1, H/spatial_factor, W/spatial_factor], normalised, contiguous, in `dtype`.

        Raises:
            ValueError: wrong rank, channels, frames, size, dtype, device or values.
        """
        frame = self._checked_frame(pixels)
        if self.checks_values:
            check_values(frame)
        kind = frame.device.type
        if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):  # `dtype` is promised, and folded for
                return self._encode(frame)
        return self._encode(frame)

    def _encode(self, frame: Tensor) -> Tensor:
        if frame.shape[0] == 0:
            sizes = frame.shape[1:3] if frame.dtype == torch.uint8 else frame.shape[2:]
            height, width = (size // self.spatial_factor for size in sizes)
            shape = (0, self.conv_out.weight.shape[0], 1, height, width)
            return torch.empty(shape, dtype=self.dtype, device=frame.device)
        topology = self.topology
        packed = pack_pixels(frame, topology.patch_size, self.dtype, topology.packed_channels)
        terms = self.conv_in.deferred(packed)
        for stage in self.stages:
            terms = stage(terms)
        x = self.conv_out(self.norm_out(*self.middle(terms)))
        return x.contiguous(memory_format=torch.contiguous_format).unsqueeze(2)

    def _checked_frame(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] floating point or [B, H, W, 3] bytes."""
        shape = list(pixels.shape)
        is_bytes = pixels.dtype == torch.uint8
        if is_bytes:
            if pixels.dim() != 4 or shape[3] != 3:
                raise ValueError(f"pixels are bytes of shape {shape}, wanted [B, H, W, 3]")
        else:
            if pixels.dim() not in (4, 5):
                raise ValueError(
                    f"pixels has shape {shape}, wanted [B, 3, H, W] or [B, 3, 1, H, W]"
                )
            if shape[1] != 3:
                raise ValueError(f"pixels has {shape[1]} channels in shape {shape}, wanted 3")
            if pixels.dim() == 5:
                if shape[2] != 1:
                    raise ValueError(
                        f"pixels has {shape[2]} frames, wanted 1: clips are encoded by "
                        "ClipEncoder or in exact mode, through a VAE "
                        "(cosmos3_fast.vae.live.exact.encode_exact)"
                    )
                pixels = pixels[:, :, 0]
        factor = self.spatial_factor
        sizes = shape[1:3] if is_bytes else shape[-2:]
        for name, size in zip(("height", "width"), sizes, strict=True):
            if size < factor or size % factor:
                raise ValueError(
                    f"pixels has {name} {size}, wanted a positive multiple of {factor}"
                )
        if not is_bytes and not pixels.is_floating_point():
            raise ValueError(
                f"pixels is {pixels.dtype}, wanted floating point in [-1, 1] or uint8 [B, H, W, 3]"
            )
        if pixels.device != self.device:
            raise ValueError(f"pixels is on {pixels.device}, the encoder on {self.device}")
        return pixels

    def _fold(self, read: Read, read_earlier: Read) -> dict[str, Tensor]:
        return fold_encoder(self.topology, read, self.dtype)

    def _probe(self, vae: Any) -> None:
        probe_encoder(vae, self)


class PosteriorEncoder(FrameEncoder):
    """A `FrameEncoder` whose result is the posterior's parameters, as `vae.encode` makes them.

    `encoder(pixels)` is [B, 2·z_dim, 1, h, w]: mean and log-variance, not normalised, the
    log-variance not clamped.
    """

    topology_type = PosteriorTopology
    checks_values = False

    def _probe(self, vae: Any) -> None:
        probe_posterior(vae, self)


def check_values(pixels: Tensor) -> None:
    """Refuse float pixels that are not in [-1, 1] by far; on the CPU, where looking costs no sync.

    Traced tensors have no values to look at.

    Raises:
        ValueError: NaN, infinity, or a value beyond ±2: interpolation overshoots by less.
    """
    if (
        pixels.device.type != "cpu"
        or not pixels.is_floating_point()
        or not pixels.numel()
        or torch.compiler.is_compiling()
        or type(pixels) not in (Tensor, nn.Parameter)
        or not has_memory(pixels)
    ):
        return
    low, high = (float(value) for value in pixels.detach().aminmax())
    if not -2.0 <= low <= high <= 2.0:  # also false for NaN
        hint = "; give [0,255] as uint8" if low >= 0.0 else ""
        raise ValueError(f"pixels must be in [-1, 1], got values in [{low:g}, {high:g}]{hint}")
