"""`FrameEncoder` and `ClipEncoder`: pixels to normalised latents, with 2-D convolutions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from cosmos3_fast.arguments import as_int, quoted
from cosmos3_fast.frames import TEMPORAL_FACTOR, is_whole, latent_frames, pixel_frames
from cosmos3_fast.ops import pack_pixels
from cosmos3_fast.ops._torch import has_memory
from cosmos3_fast.vae.compatibility import probe_encoder, probe_posterior
from cosmos3_fast.vae.networks.base import FoldedNetwork, temporal_form, without_autocast
from cosmos3_fast.vae.networks.causal import CausalConv, Memory, NormSiLU, Sum, Temporal, Terms
from cosmos3_fast.vae.networks.graphs import Captures
from cosmos3_fast.vae.networks.layers import (
    NO_TILES,
    Attention,
    EncoderStage,
    ResidualBlock,
    in_chunks,
    run,
)
from cosmos3_fast.vae.topology import EncoderTopology

# Latent frames that go through the small levels together: there a block is full.
_LATENT_FRAMES = 4


class _Encoder(FoldedNetwork):
    """The encoder as one tree of layers, for single frames and, with `temporal`, for clips.

    Attributes:
        checks_values: refuse pixels that are not in [-1, 1] by far (on the CPU only); an engine
            switches it off, since its own encode takes any.
    """

    topology_type = EncoderTopology
    checks_values = True

    def __init__(
        self,
        topology: EncoderTopology,
        dtype: torch.dtype,
        device: torch.device | str | int | None,
        posterior: bool,
        temporal: Temporal | None = None,
    ) -> None:
        if posterior:
            topology = replace(topology, posterior=True)
        super().__init__(topology, dtype, temporal)
        self.checks_values = not topology.posterior
        of_stream = None if temporal is None else Temporal(1, dtype)
        of_lowest = None if temporal is None else temporal.of_small_images
        with torch.device(torch.get_default_device() if device is None else device):
            width = topology.stages[0].in_channels
            self.conv_in = CausalConv(topology.packed_channels, width, NO_TILES, of_stream, True)
            lowest = len(topology.stages) - 1
            self.stages = nn.ModuleList(
                EncoderStage(stage, topology.residual, of_lowest if i == lowest else temporal)
                for i, stage in enumerate(topology.stages)
            )
            width = topology.stages[-1].out_channels
            self.middle = nn.ModuleList(
                [
                    ResidualBlock(width, width, None, of_lowest),
                    Attention(width),
                    ResidualBlock(width, width, None, of_lowest),
                ]
            )
            self.norm_out = NormSiLU(width)
            self.conv_out = CausalConv(width, len(topology.output_statistics[0]), None, of_lowest)
        self._finish()

    def _encode_frames(self, frames: Tensor, memory: Memory | None = None) -> Tensor:
        """Single frames, or those of a clip that come next, to latent frames.

        Of a clip's later frames, each level takes `frames_at_once`, and the next one what that gave
        in all, so that the large levels hold few and the blocks of the small levels are full.

        Args:
            frames: [F·B, 3, H, W] or bytes [F·B, H, W, 3]; F is 1, or after a clip's first frame a
                multiple of 4.
            memory: of the clip.

        Returns:
            [F'·B, z or 2z, h, w].
        """
        topology = self.topology

        def enter(terms: Terms, memory: Memory | None) -> Terms:
            packed = pack_pixels(
                terms.total(), topology.patch_size, self.dtype, topology.packed_channels
            )
            return self.conv_in.after(None, Sum(packed), memory)[1]

        edges = frames.shape[1:3] if frames.dtype == torch.uint8 else frames.shape[2:]
        pixels = edges[0] * edges[1] // topology.patch_size**2
        terms: Terms = Sum(frames)
        for i, stage in enumerate(self.stages):
            layers: list[Callable[..., Terms]] = [enter, stage] if i == 0 else [stage]
            terms = in_chunks(layers, terms, memory, pixels)
            pixels //= 4 if topology.stages[i].downsample else 1
        terms = run(self.middle, terms, memory)
        return self.conv_out.after(self.norm_out, terms, memory)[1].total()

    def _checked_frame(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] floating point or [B, H, W, 3] bytes."""
        shape = list(pixels.shape)
        is_bytes = pixels.dtype == torch.uint8
        if is_bytes:
            if pixels.dim() != 4 or shape[3] != 3:
                raise ValueError(f"pixels must as bytes have shape [B, H, W, 3], got {shape}")
        else:
            if pixels.dim() not in (4, 5):
                raise ValueError(
                    f"pixels must have shape [B, 3, H, W] or [B, 3, 1, H, W], got {shape}"
                )
            if shape[1] != 3:
                raise ValueError(f"pixels must have 3 channels, got {shape[1]} in shape {shape}")
            if pixels.dim() == 5:
                if shape[2] != 1:
                    raise ValueError(
                        f"pixels must have 1 frame, got {shape[2]}: clips are encoded by "
                        "ClipEncoder or in exact mode, through a VAE "
                        "(cosmos3_fast.vae.live.exact.encode_exact)"
                    )
                pixels = pixels[:, :, 0]
        factor = self.spatial_factor
        sizes = shape[1:3] if is_bytes else shape[-2:]
        for name, size in zip(("height", "width"), sizes, strict=True):
            if size < factor or size % factor:
                raise ValueError(
                    f"pixels must have a {name} that is a positive multiple of {factor}, got {size}"
                )
        if not is_bytes and not pixels.is_floating_point():
            raise ValueError(
                "pixels must be floating point in [-1, 1] or uint8 [B, H, W, 3], "
                f"got {pixels.dtype}"
            )
        if pixels.device != self.device:
            raise ValueError(
                f"pixels must be on the encoder's device, {self.device}, got {pixels.device}"
            )
        return pixels

    def _empty(self, frame: Tensor, latents: int) -> Tensor:
        """The result for a batch of none."""
        sizes = frame.shape[1:3] if frame.dtype == torch.uint8 else frame.shape[2:]
        height, width = (size // self.spatial_factor for size in sizes)
        shape = (0, self.conv_out.weight.shape[0], latents, height, width)
        return torch.empty(shape, dtype=self.dtype, device=frame.device)


class FrameEncoder(Captures, _Encoder):
    """The encoder of a Wan-family VAE (the one of Cosmos3) for single frames.

    `encoder(pixels)` equals `(vae.encode(pixels).mode() - latents_mean) / latents_std` for one
    frame, computed without 3-D convolutions: a causal convolution sees only zeros before the
    first frame, so its last temporal tap is all that acts (`cosmos3_fast.vae.fold` has the
    algebra). The result is that of the *untiled* VAE: a VAE's tiling switch, which changes
    results at tile borders, is ignored.

    Use `from_vae`, `from_pretrained` or `from_state_dict`; the constructor gives a network with
    initial weights, to receive a `state_dict()` of the same topology.

    Parameters do not require gradients; gradients to the pixels flow. On a GPU, `capture()` has
    calls replayed as CUDA graphs.

    Args:
        topology: the structure.
        dtype: of the parameters and of the latents: float32, bfloat16, float16 or float64.
        device: of the parameters.
        posterior: the result has the parameters of the posterior, as `vae.encode` makes them: mean
            and log-variance, [B, 2·z_dim, 1, h, w], not normalised, the log-variance not clamped.

    Attributes:
        topology: the `EncoderTopology`.
        z_dim: latent channels.
        spatial_factor: pixels per latent cell along height and width.
    """

    def __init__(
        self,
        topology: EncoderTopology,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | int | None = None,
        *,
        posterior: bool = False,
    ) -> None:
        super().__init__(topology, dtype, device, posterior)

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
        with without_autocast(frame.device):
            return self._encode(frame)

    def _encode(self, frame: Tensor) -> Tensor:
        if frame.shape[0] == 0:
            return self._empty(frame, 1)
        return self._replayed(self._latent, frame)

    def _latent(self, frame: Tensor) -> Tensor:
        x = self._encode_frames(frame)
        return x.contiguous(memory_format=torch.contiguous_format).unsqueeze(2)

    def _probe(self, vae: Any) -> None:
        if self.topology.posterior:
            probe_posterior(vae, self)
        else:
            probe_encoder(vae, self)


class ClipEncoder(_Encoder):
    """The encoder of a Wan-family VAE (the one of Cosmos3) for clips of 1 + 4k frames.

    `encoder(pixels)` equals `(vae.encode(pixels).mode() - latents_mean) / latents_std`, and
    `encoder(pixels, n)` its first n latent frames up to rounding, for which only the first 4n - 3
    pixel frames are read. The first latent frame is that of a `FrameEncoder`, bit for bit. As
    there, the VAE's tiling is ignored.

    The frames after the first are taken in blocks of four (`causal` has the algebra): half the
    products of any direct convolution. One or two frames, as the small levels of a clip of five
    have, are a block of two, with four of the same six kernels.

    Use `from_vae`, `from_pretrained` or `from_state_dict`; the constructor gives a network with
    initial weights, to receive a `state_dict()` of the same topology. Parameters do not require
    gradients; gradients to the pixels flow. Calls share no state.

    Args:
        topology: the structure; its temporal factor must be 4.
        dtype: of the parameters and of the latents: float32, bfloat16, float16 or float64.
        device: of the parameters.
        posterior: as for `FrameEncoder`.
        products, direct: as for `ClipDecoder`.

    Attributes:
        topology, z_dim, spatial_factor: as `FrameEncoder`'s.

    Raises:
        UnsupportedVAEError: another temporal factor.
    """

    takes_clips = True

    def __init__(
        self,
        topology: EncoderTopology,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | int | None = None,
        *,
        posterior: bool = False,
        products: torch.dtype | None = None,
        direct: bool = False,
    ) -> None:
        temporal = temporal_form(dtype, products, direct)
        super().__init__(topology, dtype, device, posterior, temporal)

    @property
    def first(self) -> FrameEncoder:
        """A `FrameEncoder` of the same parameters, which are shared."""
        frame = FrameEncoder(self.topology, self.dtype, "meta")
        own = self.state_dict()
        state = {name: own[name] for name in frame.state_dict()}
        frame.load_state_dict(state, assign=True)
        return frame.requires_grad_(False)

    def forward(self, pixels: Tensor, num_latent_frames: int | None = None) -> Tensor:
        """Encode the beginning of a clip.

        Args:
            pixels: [B, 3, T, H, W] in [-1, 1] with T = 1 + 4k, floating point (cast to `dtype`),
                any strides; or bytes [B, T, H, W, 3], uint8, normalised here as the engines do
                (`2 (x / 255) - 1`). Single frames without T as for `FrameEncoder`. On the
                encoder's device; H and W are multiples of `spatial_factor`. B may be 0.
            num_latent_frames: n in 1 … 1 + k; None: all of them. Pixel frames from 4n - 3 on are
                not read.

        Returns:
            [B, z_dim, n, H/spatial_factor, W/spatial_factor], normalised, contiguous, in `dtype`.

        Raises:
            ValueError: wrong rank, channels, frames, size, dtype or device.
        """
        clip, wanted = self._checked_clip(pixels, num_latent_frames)
        if self.checks_values:
            check_values(clip)
        with without_autocast(clip.device), self._undisturbed(clip):
            return self._encode(clip, wanted)

    def _encode(self, clip: Tensor, wanted: int) -> Tensor:
        """[T, B, 3, H, W] or bytes [T, B, H, W, 3], T = 4·wanted - 3."""
        if clip.shape[1] == 0:
            return self._empty(clip[0], wanted)
        latents = torch.cat(list(self._latents(clip)))
        return latents.unflatten(0, (wanted, -1)).permute(1, 2, 0, 3, 4).contiguous()

    def _latents(self, clip: Tensor) -> Iterator[Tensor]:
        """The latent frames [n·B, z, h, w] as they come: the first, then up to four at a time."""
        memory = Memory(clip.shape[1])
        yield self._encode_frames(clip[0], memory)
        memory.first = False
        for start in range(1, clip.shape[0], _LATENT_FRAMES * TEMPORAL_FACTOR):
            frames = clip[start : start + _LATENT_FRAMES * TEMPORAL_FACTOR]
            yield self._encode_frames(frames.flatten(0, 1), memory)

    def _checked_clip(self, pixels: Tensor, num_latent_frames: int | None) -> tuple[Tensor, int]:
        """The pixel frames to encode, frames first, and the number of latent frames they give."""
        is_bytes = pixels.dtype == torch.uint8
        if pixels.dim() not in (4, 5):
            layout = "[B, T, H, W, 3]" if is_bytes else "[B, 3, T, H, W]"
            raise ValueError(f"pixels must have shape {layout}, got {list(pixels.shape)}")
        time = 1 if is_bytes else 2
        clip = (pixels if pixels.dim() == 5 else pixels.unsqueeze(time)).movedim(time, 0)
        total = clip.shape[0]
        if not is_whole(total):
            raise ValueError(f"pixels must have 1 + 4k frames, got {total}")
        available = latent_frames(total)
        wanted = available if num_latent_frames is None else as_int(num_latent_frames)
        if wanted is None or not 1 <= wanted <= available:
            raise ValueError(
                f"num_latent_frames must be in 1 to {available} for {total} pixel frames, "
                f"got {quoted(num_latent_frames)}"
            )
        self._checked_frame(clip[0])  # they have one shape, dtype and device
        return clip[: pixel_frames(wanted)], wanted

    def _probe(self, vae: Any) -> None:
        # Nine frames reach every state there is: from the third chunk on, each convolution looks
        # back on two frames.
        if self.topology.posterior:
            probe_posterior(vae, self, frames=9)
        else:
            probe_encoder(vae, self, frames=9)


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
