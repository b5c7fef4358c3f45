"""`ClipEncoder`: a clip of 1 + 4k frames to 1 + k normalised latent frames, with 2-D convolutions.

The VAE encodes a clip in chunks: its first frame, then four frames at a time, with what each causal
convolution needs of earlier frames kept from chunk to chunk. How the frames are cut into chunks
changes nothing in the result, so here each frame goes through the network as soon as the one before
has gone: until a temporal down-sampling waits for a second frame, or a latent frame comes out.
Every layer remembers the one or two frames it looks back on, and nothing else is kept.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosmos3_fast.arguments import as_int
from cosmos3_fast.frames import TEMPORAL_FACTOR, is_whole, latent_frames, pixel_frames
from cosmos3_fast.ops import pack_pixels
from cosmos3_fast.vae.compatibility import probe_encoder
from cosmos3_fast.vae.fold import Read, fold_clip
from cosmos3_fast.vae.networks.base import FoldedNetwork
from cosmos3_fast.vae.networks.encoder import FrameEncoder, check_values
from cosmos3_fast.vae.networks.layers import (
    NO_TILES,
    Conv3x3,
    EncoderStage,
    ResidualBlock,
    Sum,
    add_average_shortcut,
)
from cosmos3_fast.vae.topology import EncoderTopology, Stage, UnsupportedVAEError

Memory = dict[nn.Module, list[Tensor]]
"""Per layer, what it remembers of the frames before the present one."""


class CausalConv(nn.Module):
    """A causal 3x3x3 convolution, frame by frame: the two temporal taps before the last one.

    `y[t] = W[2] x[t] + W[1] x[t-1] + W[0] x[t-2] + b`, where frames before the first are zeros and
    their terms left out. W[2] and b belong to the single-frame encoder.

    In half precision the three frames are concatenated by channel, so that one convolution sums all
    products in fp32 and rounds once. Otherwise the taps are three convolutions, each added to the
    one before, without a copy of frames or weights.
    """

    def __init__(self, in_channels: int, out_channels: int, min_tiles: int | None = None) -> None:
        super().__init__()
        self.earlier = nn.ModuleList(
            Conv3x3(in_channels, out_channels, min_tiles) for _ in range(2)
        )
        for tap in self.earlier:
            tap.register_parameter("bias", None)

    def forward(
        self, x: Tensor, last: Conv3x3, memory: Memory, residual: Tensor | None = None
    ) -> Sum:
        past = memory.setdefault(self, [])
        window = [*past, x]
        memory[self] = window[-2:]
        if len(window) == 1:
            return last.deferred(x, residual)
        taps = [*self.earlier, last][-len(window) :]
        if x.dtype in (torch.bfloat16, torch.float16):
            weight = torch.cat([tap.weight for tap in taps], 1)
            y = F.conv2d(torch.cat(window, 1), weight, padding=1)
            return Sum(y, last.bias, residual)
        y = taps[0](window[0], residual)
        for tap, frame in zip(taps[1:], window[1:], strict=True):
            y = tap(frame, y)
        return Sum(y)


class ClipBlock(nn.Module):
    """A `ResidualBlock` on one frame of a clip."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = CausalConv(in_channels, out_channels)
        self.conv2 = CausalConv(out_channels, out_channels)

    def forward(self, terms: Sum, block: ResidualBlock, memory: Memory) -> Sum:
        return self.after_norm(*block.norm1.with_sum(terms), block, memory)

    def after_norm(self, x: Tensor, activated: Tensor, block: ResidualBlock, memory: Memory) -> Sum:
        """The rest, given the block's input and its first norm."""
        y = block.norm2(*self.conv1(activated, block.conv1, memory))
        shortcut = x if block.shortcut is None else block.shortcut(x)
        return self.conv2(y, block.conv2, memory, shortcut)


class ClipStage(nn.Module):
    """An `EncoderStage` on one frame of a clip.

    A temporal down-sampling leaves the first frame as it is. From then on it takes two frames for
    each one it gives, and convolves them and the one before with a kernel of three frames.
    """

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        width = stage.out_channels
        self.blocks = nn.ModuleList(
            ClipBlock(width if j else stage.in_channels, width) for j in range(stage.num_blocks)
        )
        # On the window of three frames, concatenated by channel.
        self.time_conv = nn.Conv2d(3 * width, width, 1) if stage.factor_t == 2 else None

    def forward(self, terms: Sum, stage: EncoderStage, memory: Memory) -> Sum | None:
        """[B, C, H, W] of one frame → [B, C', H', W'], or None where it waits for the next one."""
        first, *rest = stage.blocks
        own_first, *own_rest = self.blocks
        assert isinstance(first, ResidualBlock)
        assert isinstance(own_first, ClipBlock)
        x, activated = first.norm1.with_sum(terms)
        y = own_first.after_norm(x, activated, first, memory)
        own = iter(own_rest)
        for block in rest:
            y = next(own)(y, block, memory) if isinstance(block, ResidualBlock) else block(y)
        if stage.downsample is not None:
            y = stage.downsample(y)
        if self.time_conv is None:
            return add_average_shortcut(y, x, 1, stage.factor_s) if stage.residual else y
        frame = y.total()
        window = [*memory.get(self.time_conv, []), frame]
        inputs = [*memory.get(self, []), x] if stage.residual else []
        if len(window) == 2:
            memory[self.time_conv], memory[self] = window, inputs
            return None
        memory[self.time_conv], memory[self] = [frame], []
        if len(window) == 1:
            return add_average_shortcut(y, x, 2, stage.factor_s) if stage.residual else y
        z = self.time_conv(torch.cat(window, 1))
        return Sum(add_pair_average(z, inputs, stage.factor_s) if stage.residual else z)


def add_pair_average(y: Tensor, pair: list[Tensor], factor_s: int) -> Tensor:
    """`y` plus the VAE's `AvgDown3D` of two frames; may write into `y`.

    The layer lists, for each input channel, the `2·factor_s²` values of a cell (time, then row,
    then column) and averages equal groups of that list. Where a group is one frame of a cell (every
    stage of Cosmos3), it is a pooling, and output channels 2c and 2c + 1 receive the first and the
    second frame of channel c.

    Args:
        y: [B, Cout, H/factor_s, W/factor_s].
        pair: two frames [B, C, H, W]; Cout divides 2·C·factor_s².
        factor_s: 1 or 2.
    """
    channels = pair[0].shape[1]
    if y.shape[1] == 2 * channels:
        for i, x in enumerate(pair):
            y[:, i::2] += F.avg_pool2d(x, factor_s) if factor_s > 1 else x
        return y
    cells = [F.pixel_unshuffle(x, factor_s).unflatten(1, (channels, -1)) for x in pair]
    listed = torch.stack(cells, 2).flatten(1, 3)
    return y + listed.unflatten(1, (y.shape[1], -1)).mean(2)


class ClipEncoder(FoldedNetwork):
    """The encoder of a Wan-family VAE (the one of Cosmos3) for clips of 1 + 4k frames.

    `encoder(pixels)` equals `(vae.encode(pixels).mode() - latents_mean) / latents_std`, and
    `encoder(pixels, n)` its first n latent frames, for which only the first 4n - 3 pixel frames
    are read. The first latent frame is that of `encoder.first`, bit for bit. As in
    `FrameEncoder`, the VAE's tiling is ignored.

    Memory, for the VAE of Cosmos3: 149 M parameters (298 MB in bf16, 596 MB in fp32), of which
    the 53 M of `first` are the last temporal taps, stored once and used for every frame. In fp32
    on the CPU, large images add transformed weights of 4 times the size of their kernels
    (`layers.WinogradConv`): 0.82 GB at 480x832. While encoding, every convolution keeps the two
    frames it looks back on, as in the VAE; on top of those comes the working memory of one frame,
    where the VAE's is that of four.

    Use `from_vae`, `from_pretrained` or `from_state_dict`; the constructor gives a network with
    initial weights, to receive a `state_dict()` of the same topology. Parameters do not require
    gradients; gradients to the pixels flow. Calls share no state.

    Args:
        topology: the structure; its temporal factor must be 4.
        dtype: of the parameters and of the latents; fp32, bf16, fp16 or fp64.
        device: of the parameters.

    Attributes:
        first: the `FrameEncoder` for the first frame, which can be used on its own.
        topology, z_dim, spatial_factor: as `first`'s.

    Raises:
        UnsupportedVAEError: another temporal factor.
    """

    topology_type = EncoderTopology
    takes_clips = True

    def __init__(
        self,
        topology: EncoderTopology,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__(topology, dtype)
        if topology.temporal_factor != TEMPORAL_FACTOR:
            raise UnsupportedVAEError(
                f"config: temperal_downsample makes one latent frame of {topology.temporal_factor} "
                "pixel frames, wanted 4"
            )
        self.first = FrameEncoder(topology, dtype, device)
        with torch.device(torch.get_default_device() if device is None else device):
            width = topology.stages[0].in_channels
            self.conv_in = CausalConv(topology.packed_channels, width, NO_TILES)
            self.stages = nn.ModuleList(ClipStage(stage) for stage in topology.stages)
            width = topology.stages[-1].out_channels
            self.middle = nn.ModuleList(ClipBlock(width, width) for _ in range(2))
            self.conv_out = CausalConv(width, topology.z_dim)
        self.to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.requires_grad_(False)

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters and of the latents."""
        return self.first.dtype

    @property
    def device(self) -> torch.device:
        """Of the parameters and of the latents."""
        return self.first.device

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
        frames, wanted = self._checked_frames(pixels, num_latent_frames)
        if wanted == 1:
            return self.first(frames[0])
        for frame in frames:
            check_values(frame)
        kind = frames[0].device.type
        if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return self._encode(pixels, frames, wanted)
        return self._encode(pixels, frames, wanted)

    def _encode(self, pixels: Tensor, frames: list[Tensor], wanted: int) -> Tensor:
        if pixels.shape[0] == 0:
            return self.first(frames[0]).repeat(1, 1, wanted, 1, 1)
        memory: Memory = {}
        latents = [self._push(frame, memory) for frame in frames]
        return torch.stack([z for z in latents if z is not None], 2).contiguous()

    def _push(self, frame: Tensor, memory: Memory) -> Tensor | None:
        """The latent frame [B, z_dim, h, w] that this pixel frame completes, if it does."""
        first = self.first
        topology = self.topology
        packed = pack_pixels(frame, topology.patch_size, self.dtype, topology.packed_channels)
        terms: Sum | None = self.conv_in(packed, first.conv_in, memory)
        for clip_stage, stage in zip(self.stages, first.stages, strict=True):
            terms = clip_stage(terms, stage, memory)
            if terms is None:
                return None
        before, attention, after = first.middle
        terms = self.middle[0](terms, before, memory)
        terms = self.middle[1](attention(terms), after, memory)
        return self.conv_out(first.norm_out(*terms), first.conv_out, memory).total()

    def _checked_frames(
        self, pixels: Tensor, num_latent_frames: int | None
    ) -> tuple[list[Tensor], int]:
        """The pixel frames to encode and the number of latent frames they give."""
        is_bytes = pixels.dtype == torch.uint8
        if pixels.dim() not in (4, 5):
            layout = "[B, T, H, W, 3]" if is_bytes else "[B, 3, T, H, W]"
            raise ValueError(f"pixels has shape {list(pixels.shape)}, wanted {layout}")
        time = 1 if is_bytes else 2
        clip = pixels if pixels.dim() == 5 else pixels.unsqueeze(time)
        total = clip.shape[time]
        if not is_whole(total):
            raise ValueError(f"pixels has {total} frames, wanted 1 + 4k")
        available = latent_frames(total)
        wanted = available if num_latent_frames is None else as_int(num_latent_frames)
        if wanted is None or not 1 <= wanted <= available:
            raise ValueError(
                f"num_latent_frames is {num_latent_frames!r}, wanted 1 to {available} for {total} "
                "pixel frames"
            )
        frames = [clip.select(time, t) for t in range(pixel_frames(wanted))]
        # They have one shape, dtype and device.
        frames[0] = self.first._checked_frame(frames[0])
        return frames, wanted

    def _fold(self, read: Read, read_earlier: Read) -> dict[str, Tensor]:
        return fold_clip(self.topology, read, read_earlier, self.dtype)

    def _probe(self, vae: Any) -> None:
        # Nine frames reach every state there is: from the third chunk on, each convolution looks
        # back on two frames.
        probe_encoder(vae, self, frames=9)
