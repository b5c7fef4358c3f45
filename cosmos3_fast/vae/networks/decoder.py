"""`FrameDecoder` and `ClipDecoder`: normalised latents to pixels, with 2-D convolutions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from cosmos3_fast.arguments import positive_int
from cosmos3_fast.frames import pixel_frames
from cosmos3_fast.ops import unpack_pixels
from cosmos3_fast.vae.compatibility import probe_decoder
from cosmos3_fast.vae.networks.base import FoldedNetwork, temporal_form, without_autocast
from cosmos3_fast.vae.networks.causal import (
    CausalConv,
    Memory,
    NormSiLU,
    Sum,
    Temporal,
    Terms,
    is_writable,
)
from cosmos3_fast.vae.networks.graphs import Captures, Graphs
from cosmos3_fast.vae.networks.layers import (
    Attention,
    DecoderStage,
    ResidualBlock,
    frames_at_once,
    run,
)
from cosmos3_fast.vae.topology import DecoderTopology

_OUTPUTS = ("float", "uint8")

# Fewer than in the encoder: the wide stages of a decoder see small images. For Cosmos3 at 256x448
# it leaves out the 10 convolutions of the lowest resolution, whose packed weights would be 1.5 GB.
_WINOGRAD_TILES = 64

# Latent frames that go through the lowest level together, at most.
_LATENT_FRAMES = 16
# Pixel frames that `ClipDecoder.frames` gives at once, at most.
_PIXEL_FRAMES = 16


class _Decoder(FoldedNetwork):
    """The decoder as one tree of layers, for single frames and, with `temporal`, for clips."""

    topology_type = DecoderTopology

    def __init__(
        self,
        topology: DecoderTopology,
        dtype: torch.dtype,
        device: torch.device | str | int | None,
        temporal: Temporal | None = None,
    ) -> None:
        super().__init__(topology, dtype, temporal)
        of_stream = None if temporal is None else Temporal(1, dtype)
        of_lowest = None if temporal is None else temporal.of_small_images
        with torch.device(torch.get_default_device() if device is None else device):
            z_dim, width = topology.z_dim, topology.stages[0].in_channels
            # Two ways in, for latents with and without normalisation.
            self.denormalize = nn.Conv2d(z_dim, z_dim, 1)
            self.post_quant = nn.Conv2d(z_dim, z_dim, 1)
            self.conv_in = CausalConv(z_dim, width, None, of_stream)
            self.middle = nn.ModuleList(
                [
                    ResidualBlock(width, width, None, of_lowest),
                    Attention(width),
                    ResidualBlock(width, width, None, of_lowest),
                ]
            )
            self.stages = nn.ModuleList(
                DecoderStage(
                    stage, topology.residual, _WINOGRAD_TILES, temporal if i else of_lowest
                )
                for i, stage in enumerate(topology.stages)
            )
            width = topology.stages[-1].out_channels
            self.norm_out = NormSiLU(width)
            self.conv_out = CausalConv(width, topology.out_channels, None, temporal)
        self._finish()

    def _decode_frames(
        self, entry: nn.Conv2d, latents: Tensor, as_bytes: bool, memory: Memory | None = None
    ) -> Iterator[Tensor]:
        """Single latent frames, or those of a clip that come next, to pixels.

        What is done when: the lowest level takes all frames. What it gives goes on in parts of
        `frames_at_once`, one after the other through all levels above (depth first), so that of
        the largest level no more than one part is held.

        Args:
            entry: `denormalize` or `post_quant`.
            latents: [F·B, z, h, w] on the decoder's device.
            as_bytes: see `unpack_pixels`.
            memory: of the clip.

        Yields:
            [n·B, 3, H, W], or bytes [n·B, H, W, 3].
        """
        x = latents.to(self.dtype, memory_format=torch.channels_last)
        _, terms = self.conv_in.after(None, Sum(entry(x)), memory)
        terms = run(self.middle, terms, memory)
        yield from self._rest(0, terms, as_bytes, memory)

    def _rest(
        self, level: int, terms: Terms, as_bytes: bool, memory: Memory | None
    ) -> Iterator[Tensor]:
        """The stages from `level` on."""
        stages: Any = self._modules["stages"]
        if level == len(stages):
            x = self.conv_out.after(self.norm_out, terms, memory)[1].total()
            yield unpack_pixels(x, self.topology.patch_size, as_bytes)
            return
        stage = stages[level]
        terms = stage(terms, memory)
        if memory is None or memory.first or stage.upsample is None:
            yield from self._rest(level + 1, terms, as_bytes, memory)
            return
        assert isinstance(terms, Sum)
        assert self._temporal is not None
        batch, x = memory.batch, terms.x
        # A CPU is filled by one block where images are large, on the last two levels.
        on_cpu = 1 if level + 3 >= len(stages) else 2
        block = max(2, self._temporal.block)
        size = batch * frames_at_once(batch * x.shape[2] * x.shape[3], x.device, block, on_cpu)
        if x.shape[0] <= size:
            del x
            yield from self._rest(level + 1, terms, as_bytes, memory)
            return
        frames = terms.total()
        del terms, x
        for part in frames.split(size):
            yield from self._rest(level + 1, Sum(part), as_bytes, memory)

    def _check_output(self, output: str) -> bool:
        """Whether it is bytes."""
        if output not in _OUTPUTS:
            raise ValueError(f"output must be one of {list(_OUTPUTS)}, got {output!r}")
        return output == "uint8"

    def _checked_latents(self, latents: Tensor, frames: str = "T") -> Tensor:
        """[B, z_dim, T, h, w], floating point; `frames` is how messages call T."""
        shape = list(latents.shape)
        if latents.dim() not in (4, 5):
            raise ValueError(
                f"latents must have shape [B, {self.z_dim}, h, w] or "
                f"[B, {self.z_dim}, {frames}, h, w], got {shape}"
            )
        if shape[1] != self.z_dim:
            raise ValueError(f"latents must have {self.z_dim} channels, got shape {shape}")
        if latents.dim() == 4:
            latents = latents.unsqueeze(2)
        if min(shape[-2:]) < 1:
            raise ValueError(f"latents must have height and width of at least 1, got shape {shape}")
        if not latents.is_floating_point():
            raise ValueError(f"latents must be floating point, got {latents.dtype}")
        if latents.device != self.device:
            raise ValueError(
                f"latents must be on the decoder's device, {self.device}, got {latents.device}"
            )
        return latents


class FrameDecoder(Captures, _Decoder):
    """The decoder of a Wan-family VAE (the one of Cosmos3) for single frames.

    `decoder(latents)` equals `vae.decode(latents * latents_std + latents_mean)` for one latent
    frame, computed without 3-D convolutions (`cosmos3_fast.vae.fold` has the algebra). The
    result is that of the *untiled* VAE: a VAE's tiling switch, which changes results at tile
    borders, is ignored.

    Use `from_vae`, `from_pretrained` or `from_state_dict`; the constructor gives a network with
    initial weights, to receive a `state_dict()` of the same topology.

    Parameters do not require gradients; gradients to the latents flow. On a GPU, `capture()` has
    calls replayed as CUDA graphs.

    Memory, for the VAE of Cosmos3: 197 M parameters in float32 (790 MB) and 214 M otherwise (427 MB
    in bfloat16; `layers.Upsample` says why), where the VAE's decoder has 555 M. In float32 on the
    CPU, large images add transformed weights of 4 times the size of their kernels and a copy of
    these (`causal.WinogradConv`): 1.6 GB at 256x448.

    Args:
        topology: the structure.
        dtype: of the parameters and of the pixels: float32, bfloat16, float16 or float64.
        device: of the parameters.

    Attributes:
        topology: the `DecoderTopology`.
        z_dim: latent channels.
        spatial_factor: pixels per latent cell along height and width.
    """

    def __init__(
        self,
        topology: DecoderTopology,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__(topology, dtype, device)

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
        as_bytes = self._check_output(output)
        clip = self._checked_latents(latents, frames="1")
        if clip.shape[2] != 1:
            raise ValueError(
                f"latents must have 1 frame, got {clip.shape[2]} in shape {list(latents.shape)}"
            )
        frame = clip[:, :, 0]
        if frame.shape[0] == 0:
            height, width = (size * self.spatial_factor for size in frame.shape[2:])
            shape = (0, height, width, 3) if as_bytes else (0, 3, 1, height, width)
            dtype = torch.uint8 if as_bytes else self.dtype
            return torch.empty(shape, dtype=dtype, device=frame.device)

        def run(frame: Tensor) -> Tensor:
            (pixels,) = self._decode_frames(entry, frame, as_bytes)
            return pixels if as_bytes else pixels.unsqueeze(2)

        with without_autocast(frame.device):
            return self._replayed(run, frame, entry is self.denormalize, as_bytes)

    def _probe(self, vae: Any) -> None:
        probe_decoder(vae, self)


class ClipDecoder(_Decoder):
    """The decoder of a Wan-family VAE (the one of Cosmos3) for clips.

    `decoder(latents)` equals `vae.decode(latents * latents_std + latents_mean)` for T latent
    frames, which are 1 + 4(T - 1) pixel frames. The first frame is that of a `FrameDecoder`, bit
    for bit. The frames after it are taken in blocks of four along time: six 2-D convolutions give
    four frames, where a direct convolution takes twelve (`cosmos3_fast.vae.networks.causal`). Where
    products are no finer than the frames, they are blocks of two, which round less. The result is
    that of the *untiled* VAE.

    Three ways to decode: `decoder(latents)` gives all frames; `decoder.frames(latents)` gives them
    as they come, in memory that does not grow with T; `decoder.stream()` takes latents one after
    the other.

    In a bfloat16 network the products and what they are made of are float16 (eight times finer),
    scaled so that none can overflow (`cosmos3_fast.vae.fold.fitted`); frames between layers are
    bfloat16. The error against float64 of the same weights is then no larger than the VAE's own.

    Memory, for the VAE of Cosmos3: 1.1 G parameters, of which 214 M are those of a `FrameDecoder`
    (2.2 GB in bfloat16; 0.6 G in float32, 2.5 GB); with `direct` 571 M.

    Use `from_vae`, `from_pretrained` or `from_state_dict`; the constructor gives a network with
    initial weights, to receive a `state_dict()` of the same topology. Parameters do not require
    gradients; gradients to the latents flow. Calls share no state.

    Args:
        topology: the structure; its temporal factor must be 4.
        dtype: of the parameters and of the pixels: float32, bfloat16, float16 or float64.
        device: of the parameters.
        products: dtype of the products along time: `dtype` or float16. Default: float16 in a
            bfloat16 network, else `dtype`. float16 in a float32 network halves its time on a GPU,
            for an error of about a bfloat16 VAE's seventh.
        direct: the three taps instead of blocks: half the memory, twice the products.

    Attributes:
        topology: the `DecoderTopology`.
        z_dim: latent channels.
        spatial_factor: pixels per latent cell along height and width.

    Raises:
        UnsupportedVAEError: another temporal factor, or float16 kernels that lose their values.
    """

    takes_clips = True

    def __init__(
        self,
        topology: DecoderTopology,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | int | None = None,
        *,
        products: torch.dtype | None = None,
        direct: bool = False,
    ) -> None:
        super().__init__(topology, dtype, device, temporal_form(dtype, products, direct))

    def forward(self, latents: Tensor, output: str = "float") -> Tensor:
        """Decode a clip per batch entry.

        Args:
            latents: normalised, [B, z_dim, T, h, w] with T >= 1, or [B, z_dim, h, w] of one frame;
                floating point (cast to `dtype`), any strides; on the decoder's device. B may be 0,
                h and w may not.
            output: "float" or "uint8".

        Returns:
            With H, W = h, w times `spatial_factor` and F = 1 + 4(T - 1), "float":
            [B, 3, F, H, W], clamped to [-1, 1] as the VAE does, contiguous, in `dtype`. "uint8":
            [B, F, H, W, 3], the same pixels as `round(255 (x / 2 + 1/2))`, computed in float32;
            without gradient.

        Raises:
            ValueError: wrong rank, channels, frames, size, dtype or device, or unknown output.
        """
        return self._decode(self.denormalize, latents, output)

    def decode_unnormalized(self, latents: Tensor, output: str = "float") -> Tensor:
        """`forward` for latents on the VAE's own scale, as `vae.decode` takes them."""
        return self._decode(self.post_quant, latents, output)

    def frames(
        self, latents: Tensor, output: str = "float", normalized: bool = True
    ) -> Iterator[Tensor]:
        """The frames of `forward` as they come.

        Arguments and errors are those of `forward`; errors come with the call, not with the first
        frame. What a clip's frames are made of is held by the iterator alone, and goes with it.
        Without `normalized` they are those of `decode_unnormalized`.

        Yields:
            The first frame by itself, then up to 16 at a time: [B, 3, n, H, W] or bytes
            [B, n, H, W, 3].
        """
        as_bytes = self._check_output(output)
        clip = self._checked_clip(latents)
        entry = self.denormalize if normalized else self.post_quant
        return self._computed(clip, self._frames(entry, clip, as_bytes))

    def _computed(self, clip: Tensor, parts: Iterator[Tensor]) -> Iterator[Tensor]:
        """`parts`, without autocast while they are computed, whatever the caller has between."""
        while True:
            with without_autocast(self.device), self._undisturbed(clip):
                part = next(parts, None)
            if part is None:
                return
            yield part
            del part

    def stream(self, output: str = "float", capture: int | None = None) -> ClipStream:
        """A decoder of one clip whose latent frames come one after the other.

        Args:
            output: "float" or "uint8".
            capture: on a GPU, replay steps as CUDA graphs, from the third on, which takes the host
                out of their time: graphs held at most, the least recently used dropped first. The
                stream then holds the activations of a step. Latents that require gradients, and
                whatever else `FrameDecoder.capture` names, go without. None: no graphs.

        Raises:
            ValueError: unknown output, or `capture` is no positive integer.
        """
        as_bytes = self._check_output(output)
        graphs = None if capture is None else Graphs(positive_int("capture", capture))
        return ClipStream(self, as_bytes, graphs)

    def _decode(self, entry: nn.Conv2d, latents: Tensor, output: str) -> Tensor:
        as_bytes = self._check_output(output)
        clip = self._checked_clip(latents)
        batch, _, count, *cells = clip.shape
        height, width = (size * self.spatial_factor for size in cells)
        frames = pixel_frames(count)
        shape = (batch, frames, height, width, 3) if as_bytes else (batch, 3, frames, height, width)
        parts = self._frames(entry, clip, as_bytes)
        with without_autocast(clip.device), self._undisturbed(clip):
            if torch.is_grad_enabled() and clip.requires_grad and not as_bytes:
                return torch.cat(list(parts), 2)
            dtype = torch.uint8 if as_bytes else self.dtype
            pixels = torch.empty(shape, dtype=dtype, device=clip.device)
            done, time = 0, 1 if as_bytes else 2
            for part in parts:
                size = part.shape[time]
                pixels.narrow(time, done, size).copy_(part)
                done += size
            return pixels

    def _frames(self, entry: nn.Conv2d, clip: Tensor, as_bytes: bool) -> Iterator[Tensor]:
        memory = Memory(clip.shape[0])
        for latents in (clip[:, :, :1], *clip[:, :, 1:].split(_LATENT_FRAMES, 2)):
            if latents.shape[2]:
                yield from self._next(entry, latents, as_bytes, memory)

    def _next(
        self, entry: nn.Conv2d, latents: Tensor, as_bytes: bool, memory: Memory
    ) -> Iterator[Tensor]:
        """[B, z, n, h, w], the clip's first frame alone → [B, 3, n', H, W] or [B, n', H, W, 3]."""
        if latents.shape[0] == 0:
            height, width = (size * self.spatial_factor for size in latents.shape[3:])
            count = latents.shape[2] * (1 if memory.first else 4)
            shape = (0, count, height, width, 3) if as_bytes else (0, 3, count, height, width)
            memory.first = False
            dtype = torch.uint8 if as_bytes else self.dtype
            yield torch.empty(shape, dtype=dtype, device=latents.device)
            return
        frames = latents.movedim(2, 0).flatten(0, 1)
        for pixels in self._decode_frames(entry, frames, as_bytes, memory):
            for part in memory.by_frame(pixels).split(_PIXEL_FRAMES):
                yield part.movedim(0, 1 if as_bytes else 2)
        memory.first = False

    def _checked_clip(self, latents: Tensor) -> Tensor:
        clip = self._checked_latents(latents)
        if clip.shape[2] < 1:
            raise ValueError(f"latents must have at least 1 frame, got shape {list(clip.shape)}")
        return clip

    def _probe(self, vae: Any) -> None:
        # Four frames reach every state there is: from the third on, each convolution looks back
        # on two frames.
        probe_decoder(vae, self, frames=4)


class ClipStream:
    """The latent frames of one clip to pixels, as they come; see `ClipDecoder.stream`.

    It holds what the clip's next frames look back on. Latents that are refused change nothing;
    after any other exception it is at its end: what it held has been dropped.

    Args:
        decoder: that decodes.
        as_bytes: "uint8" output.
        graphs: of its steps, of which there are none yet; None: each is launched.
    """

    def __init__(self, decoder: ClipDecoder, as_bytes: bool, graphs: Graphs | None = None) -> None:
        self._decoder = decoder
        self._as_bytes = as_bytes
        self._graphs = graphs
        self._memory: Memory | None = None
        self._steps = 0
        self._ended = False

    def push(self, latents: Tensor) -> Tensor:
        """The pixels of the clip's next latent frames.

        Args:
            latents: [B, z_dim, n, h, w] with n >= 1, or [B, z_dim, h, w] of one frame, as
                `ClipDecoder` takes them. B, h and w are those of the first call.

        Returns:
            [B, 3, F, H, W], or bytes [B, F, H, W, 3]: 4 frames for each latent one, 1 for the
            clip's first.

        Raises:
            ValueError: as `ClipDecoder`, or another batch or size than before.
            RuntimeError: the stream is at its end.
        """
        if self._ended:
            raise RuntimeError("the stream must not have ended, got one that failed or was closed")
        decoder = self._decoder
        clip = decoder._checked_clip(latents)
        shape = (clip.shape[0], *clip.shape[3:])
        if self._memory is None:
            self._memory, self._shape = Memory(clip.shape[0]), shape
        elif shape != self._shape:
            raise ValueError(
                f"latents must have batch, height and width {self._shape} as before, got {shape}"
            )
        memory, time = self._memory, 1 if self._as_bytes else 2
        parts: list[Tensor] = []
        try:
            pieces = clip.split(_LATENT_FRAMES, 2)
            if memory.first:
                pieces = (clip[:, :, :1], *clip[:, :, 1:].split(_LATENT_FRAMES, 2))
            with without_autocast(clip.device), decoder._undisturbed(clip):
                for piece in pieces:
                    if piece.shape[2]:
                        parts.append(self._step(piece, memory))
                return parts[0] if len(parts) == 1 else torch.cat(parts, time)
        except BaseException:
            self.close()
            raise

    def _step(self, latents: Tensor, memory: Memory) -> Tensor:
        """The pixels of up to `_LATENT_FRAMES`, of the clip's first frame alone."""
        decoder, as_bytes = self._decoder, self._as_bytes

        def run(latents: Tensor) -> Tensor:
            parts = decoder._next(decoder.denormalize, latents, as_bytes, memory)
            return torch.cat([*parts], 1 if as_bytes else 2)

        tensors = None
        if self._graphs is not None and latents.shape[0] and not torch.compiler.is_compiling():
            tensors = decoder._read(latents)
        memory.in_place = tensors is not None
        self._steps += 1
        if self._graphs is None or tensors is None:
            return run(latents)
        # What is kept is written to whatever mode a later step comes in.
        with torch.inference_mode(False), torch.no_grad():
            # Two steps make all that is kept: the first frame, and those that look back on it.
            name, state = type(self).__name__, memory.kept
            if self._steps <= 2 or not all(map(is_writable, state)):
                return run(latents)
            latents = latents.contiguous()  # a part of a longer push is as one that came alone
            made: Tensor = self._graphs.call(name, run, latents, tensors, as_bytes, state=state)
            return made

    def close(self) -> None:
        """Drop what is held; the stream is at its end."""
        self._ended, self._memory, self._graphs = True, None, None
