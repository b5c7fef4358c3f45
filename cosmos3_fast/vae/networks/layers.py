"""The layers of the networks: what they make of the next frames, of a clip or single ones.

A layer takes an activation as terms (`causal.Sum`, `causal.Products`) and, of a clip, the `Memory`
of what came before; layers without a view of other frames ignore it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosmos3_fast.ops import winograd_conv3x3
from cosmos3_fast.ops.registry import is_differentiated, is_unobserved
from cosmos3_fast.vae.networks.causal import (
    TAPS,
    TILES_WORTH_PACKING,
    CausalConv,
    Memory,
    NormSiLU,
    Sum,
    Temporal,
    Terms,
    WinogradConv,
    deferred,
    defers_bias,
    side_by_side,
)
from cosmos3_fast.vae.topology import Stage, UpStage

# Of an up-sampling, Winograd saves less than of another convolution, and needs as much memory.
_UPSAMPLE_TILES = 1024
# A `min_tiles` that no image has.
NO_TILES = sys.maxsize


class ResidualBlock(nn.Module):
    """norm, SiLU, 3x3, norm, SiLU, 3x3, plus the input: [N, Cin, H, W] → [N, Cout, H, W].

    A shortcut convolution has no bias of its own: it is part of `conv2`'s.

    Args:
        in_channels, out_channels: widths.
        min_tiles, temporal: see `CausalConv`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        min_tiles: int | None = None,
        temporal: Temporal | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = NormSiLU(in_channels)
        self.conv1 = CausalConv(in_channels, out_channels, min_tiles, temporal)
        self.norm2 = NormSiLU(out_channels)
        self.conv2 = CausalConv(out_channels, out_channels, min_tiles, temporal)
        self.shortcut = (
            nn.Conv2d(in_channels, out_channels, 1, bias=False)
            if in_channels != out_channels
            else None
        )

    def forward(self, terms: Terms, memory: Memory | None = None) -> Terms:
        return self.with_sum(terms, memory)[1]

    def with_sum(self, terms: Terms, memory: Memory | None = None) -> tuple[Tensor, Terms]:
        """The block's input as a sum, and its result."""
        own: dict[str, Any] = self._modules
        x, y = own["conv1"].after(own["norm1"], terms, memory, None, True)
        convolve = own.get("shortcut")
        shortcut = x if convolve is None else convolve(x)
        return x, own["conv2"].after(own["norm2"], y, memory, shortcut)[1]


class Attention(nn.Module):
    """Single-head self-attention over all H·W positions, plus the input.

    The norm's scale, that of the scores and the output projection live in `qkv`
    (`fold.attention`). In channels_last memory, [B, H·W, C] is a view, so no copy is made on the
    way in or out.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(channels, 3 * channels)

    def forward(self, terms: Terms, memory: Memory | None = None) -> Sum:
        x, normalized = terms.with_normalized(None, silu=False)
        height, width = x.shape[2:]
        tokens = normalized.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).unsqueeze(1).chunk(3, dim=-1)
        y = attend(q, k, v).squeeze(1)
        return Sum(y.transpose(1, 2).unflatten(2, (height, width)), None, x)


# Of a batch's scores: 256 MB, less than the activations of such images take.
_MOST_SCORES = 1 << 26


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T) v of one wide head, [B, 1, N, C] each.

    `q` holds the scale of the scores (`fold.attention`). For more than 256 channels torch has no
    quick kernel on a GPU: at 640 its own took 162 us on an H100, the kernels of two products with
    the scores in float32 between them 30 on an H200 (`benchmarks/results/gpu`).
    """
    tokens = q.shape[2]
    if (
        q.device.type != "cuda"
        or q.dtype not in (torch.bfloat16, torch.float16)
        or q.shape[0] * tokens**2 > _MOST_SCORES
        or (torch.is_grad_enabled() and q.requires_grad)  # the product has no derivative
        or torch.compiler.is_compiling()
    ):
        return F.scaled_dot_product_attention(q, k, v, scale=1.0)
    scores = torch.bmm(q[:, 0], k[:, 0].transpose(1, 2), out_dtype=torch.float32)
    return torch.bmm(scores.softmax(-1).to(v.dtype), v[:, 0]).unsqueeze(1)


class Downsample(nn.Module):
    """3x3 convolution of stride 2 that pads below and to the right: H, W → H/2, W/2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, terms: Terms) -> Sum:
        return deferred(self.conv, terms.total(pad=True))


def average_shortcut(x: Tensor, out_channels: int, factor_t: int, factor_s: int) -> Tensor:
    """The VAE's `AvgDown3D` on one frame.

    The 3-D layer lists, for each input channel, the `factor_t·factor_s²` values of a cell (time,
    then row, then column) and averages equal groups of that list. With one frame, the
    `factor_t - 1` earlier frames are zeros *in front*.

    Args:
        x: [B, C, H, W], H and W divisible by `factor_s`.
        out_channels: divides C·factor_t·factor_s².

    Returns:
        [B, out_channels, H/factor_s, W/factor_s].
    """
    area = factor_s**2
    cells = F.pixel_unshuffle(x, factor_s).unflatten(1, (x.shape[1], area))
    cells = F.pad(cells, (0, 0, 0, 0, (factor_t - 1) * area, 0))
    return cells.flatten(1, 2).unflatten(1, (out_channels, -1)).mean(2)


def add_average_shortcut(terms: Terms, x: Tensor, factor_t: int, factor_s: int) -> Sum:
    """`terms` and `average_shortcut(x)`.

    Where a group is exactly one cell (every stage of Cosmos3), the average is a pooling, and the
    zero frames fill whole output channels: pooled channel c belongs to output channel
    `c·factor_t + factor_t - 1`, and nothing is added to the others. That is what the ops make of
    a residual of this shape.
    """
    if terms.residual is not None or not isinstance(terms, Sum):
        terms = Sum(terms.total())
    y, bias, _ = terms
    if y.shape[1] != x.shape[1] * factor_t:
        x = average_shortcut(x, y.shape[1], factor_t, factor_s)
    return Sum(y, bias, x)


def add_pair_average(y: Tensor, first: Tensor, second: Tensor, factor_s: int) -> Tensor:
    """`y` plus the VAE's `AvgDown3D` of pairs of frames; may write into `y`.

    As `average_shortcut`, with a frame in each place. Where a group is one frame of a cell (every
    stage of Cosmos3), it is a pooling, and output channels 2c and 2c + 1 receive the first and the
    second frame of channel c.

    Args:
        y: [N, Cout, H/factor_s, W/factor_s].
        first, second: [N, C, H, W]; Cout divides 2·C·factor_s².
        factor_s: 1 or 2.
    """
    channels = first.shape[1]
    if y.shape[1] == 2 * channels:
        for i, x in enumerate((first, second)):
            y[:, i::2] += F.avg_pool2d(x, factor_s) if factor_s > 1 else x
        return y
    cells = [F.pixel_unshuffle(x, factor_s).unflatten(1, (channels, -1)) for x in (first, second)]
    listed = torch.stack(cells, 2).flatten(1, 3)
    return y + listed.unflatten(1, (y.shape[1], -1)).mean(2)


class EncoderStage(nn.Module):
    """The residual (and attention) blocks of one resolution, its down-sampling and shortcut.

    A temporal down-sampling leaves a clip's first frame as it is. From then on it takes two frames
    for each one it gives, and convolves them and the one before with a kernel of three frames.

    Args:
        stage, residual: its structure.
        temporal: see `CausalConv`.
    """

    def __init__(self, stage: Stage, residual: bool, temporal: Temporal | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        width = stage.in_channels
        for _ in range(stage.num_blocks):
            self.blocks.append(ResidualBlock(width, stage.out_channels, None, temporal))
            if stage.attention:
                self.blocks.append(Attention(stage.out_channels))
            width = stage.out_channels
        self.downsample = Downsample(width) if stage.downsample else None
        halves_time = temporal is not None and stage.factor_t == 2
        # On the window of three frames, side by side.
        self.time_conv = nn.Conv2d(TAPS * width, width, 1) if halves_time else None
        self.residual = residual
        self.factor_t = stage.factor_t
        self.factor_s = 2 if stage.downsample else 1

    def forward(self, terms: Terms, memory: Memory | None = None) -> Terms:
        own: dict[str, Any] = self._modules
        x, y = run_blocks(own["blocks"], terms, memory)
        downsample = own.get("downsample")
        if downsample is not None:
            y = downsample(y)
        if memory is not None and self.time_conv is not None:
            frames = memory.by_frame(y.total())
            past = memory.past(self.time_conv)
            memory.keep(self.time_conv, frames[-1:].clone())
            if past is not None:
                window = torch.cat([past.movedim(2, -1), frames.movedim(2, -1)]).movedim(-1, 2)
                return self._halve_time(window, memory.by_frame(x))
        if self.residual:
            y = add_average_shortcut(y, x, self.factor_t, self.factor_s)
        return y

    def _halve_time(self, window: Tensor, x: Tensor) -> Sum:
        assert self.time_conv is not None
        y = self.time_conv(side_by_side(window, step=2))
        if self.residual:
            first, second = x[0::2].flatten(0, 1), x[1::2].flatten(0, 1)
            y = add_pair_average(y, first, second, self.factor_s)
        return Sum(y)


def run_blocks(blocks: nn.ModuleList, terms: Terms, memory: Memory | None) -> tuple[Tensor, Terms]:
    """The sum, which the first block needs, and what the blocks make of it."""
    first, *rest = blocks
    assert isinstance(first, ResidualBlock)
    x, y = first.with_sum(terms, memory)
    return x, run(rest, y, memory)


def run(layers: Iterable[Callable[..., Terms]], terms: Terms, memory: Memory | None) -> Terms:
    """One layer after the other."""
    for layer in layers:
        terms = layer(terms, memory)
    return terms


# Of a level, how many pixels go through it at once: enough to fill a GPU, few enough to hold.
_PIXELS_AT_ONCE = 1 << 18
# The most frames of any block (`Temporal.block`), and what halving them twice leaves whole.
_BLOCK = 4


def frames_at_once(pixels: int, device: torch.device, block: int = _BLOCK, on_cpu: int = 1) -> int:
    """How many frames of a clip go through a level together, whole blocks of them.

    Args:
        pixels: of one frame at that level, batch included.
        device: a CPU takes the same number for images of any size.
        block: frames of a block.
        on_cpu: how many blocks that is.
    """
    blocks = on_cpu if device.type == "cpu" else _PIXELS_AT_ONCE // (block * pixels)
    return block * max(1, blocks)


def in_chunks(
    layers: Iterable[Callable[..., Terms]], terms: Terms, memory: Memory | None, pixels: int
) -> Terms:
    """The layers of a level, on no more frames of a clip at once than `frames_at_once`.

    Args:
        pixels: of one frame at that level.
    """
    layers = list(layers)
    if memory is not None and not memory.first:
        assert isinstance(terms, Sum)
        size = memory.batch * frames_at_once(memory.batch * pixels, terms.x.device)
        if terms.x.shape[0] > size:
            frames = terms.total()
            made = [run(layers, Sum(x), memory).total() for x in frames.split(size)]
            return Sum(torch.cat(made))
    return run(layers, terms, memory)


class Upsample(WinogradConv):
    """Nearest-neighbour 2x up-sampling and a 3x3 convolution: [B, C, H, W] → [B, C', 2H, 2W].

    Both are four convolutions of 2x2 on the small image, one per row and column of an output cell
    (`phase_kernels`): 16 products instead of 36. Each phase is computed and written where it
    belongs, so that no more than one is held beside the result.

    Where Winograd's convolution pays, it takes the up-sampled image: 9 products. That is in
    float32, in which it therefore holds the 3x3 kernels, and makes those of the phases at each
    call, or on a GPU once for a clip. In other dtypes it holds those of the phases: 16 weights for
    9, 33 MB more for Cosmos3 in bfloat16, and none to make.

    Attributes:
        weight: [C', C, 3, 3] in float32, else None.
        phases: None in float32, else [4·C', C, 2, 2], `phase_kernels` one after the other.
    """

    def __init__(self, in_channels: int, out_channels: int, min_tiles: int | None = None) -> None:
        super().__init__(in_channels, out_channels, min_tiles)
        self.register_parameter("phases", None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Upsample:
        weight: Tensor | None = self.weight
        if weight is not None:
            dtype = fn(torch.empty(0, dtype=weight.dtype, device=weight.device)).dtype
            if dtype != torch.float32:
                phases = torch.cat(phase_kernels(weight.detach().double())).to(dtype)
                self.phases = nn.Parameter(phases, requires_grad=weight.requires_grad)
                self.register_parameter("weight", None)
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if self.weight is None and f"{prefix}weight" in state_dict:  # of a float32 network
            kernels = phase_kernels(state_dict.pop(f"{prefix}weight").double())
            state_dict[f"{prefix}phases"] = torch.cat(kernels).to(self.phases.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        shortcut: Tensor | None = None,
        factor_t: int = 1,
        memory: Memory | None = None,
    ) -> Sum:
        """As the class says, plus the VAE's `DupUp3D` of `shortcut` where there is one.

        The result's bias is left to the next kernel where it is not added for nothing.

        Args:
            x: [F·n·B, C, H, W]. Each of F frames has become n: `factor_t`, or one, the last of
                them, of a clip's first frame.
            shortcut: [F·B, Cin, H, W], or None.
            factor_t: of the `DupUp3D`.
            memory: of the clip.
        """
        times = range(factor_t - 1, factor_t)
        batch = x.shape[0]
        if memory is not None:
            batch = memory.batch
            if not memory.first:
                times = range(factor_t)
        by_time = (-1, len(times), batch)  # of each F·n·B
        copies: list[list[Tensor]] = []
        if shortcut is not None:
            copies = [
                [duplicated_phase(shortcut, self.out_channels, factor_t, t, p) for t in times]
                for p in range(4)
            ]
        bias = self.bias
        # A clip's kernels are packed when they are used, not kept.
        tiles = None if memory is None or memory.first else TILES_WORTH_PACKING
        if self.phases is None and self._takes_winograd(x, self.weight, 2, tiles):
            image = F.interpolate(x, scale_factor=2.0)
            packed = self._packed_weight(keep=memory is None)
            out = winograd_conv3x3(image, packed, bias)
            for phase, copies_of_phase in enumerate(copies):
                row, column = divmod(phase, 2)
                place = out[:, :, row::2, column::2].unflatten(0, by_time)
                for i, copy in enumerate(copies_of_phase):
                    place[:, i] += copy.unflatten(0, (-1, batch))
            return Sum(out)
        height, width = x.shape[2:]
        out = torch.empty(
            (x.shape[0], self.out_channels, 2 * height, 2 * width),
            dtype=x.dtype,
            device=x.device,
            memory_format=torch.channels_last,
        )
        defers = defers_bias(x)
        for phase, kernel in enumerate(self._kernels(memory)):
            row, column = divmod(phase, 2)
            if defers:  # there a pad is a copy of its own, and a row and a column more are not
                y = F.conv2d(x, kernel, padding=1)
                y = y[:, :, row : row + height, column : column + width]
            else:
                y = F.conv2d(F.pad(x, (1 - column, column, 1 - row, row)), kernel, bias)
            place = out[:, :, row::2, column::2]
            if len(times) == 1 or not copies:
                write_sum(place, y, copies[phase][0] if copies else None)
                continue
            places, parts = place.unflatten(0, by_time), y.unflatten(0, by_time)
            for i, copy in enumerate(copies[phase]):
                write_sum(places[:, i], parts[:, i], copy.unflatten(0, (-1, batch)))
        return Sum(out, bias if defers else None)

    def _kernels(self, memory: Memory | None) -> Sequence[Tensor]:
        """Those of the phases."""
        if self.phases is not None:
            return self.phases.chunk(4)
        if memory is None or not self.weight.is_cuda:
            return phase_kernels(self.weight)  # quick on a CPU, which has them not at the peak
        kernels: list[Tensor] = memory.once(self, lambda: phase_kernels(self.weight))
        return kernels


def write_sum(to: Tensor, x: Tensor, y: Tensor | None) -> None:
    """`to[...] = x + y`, in one launch where torch can."""
    if y is None:
        to.copy_(x)
    elif is_unobserved() or not (torch.compiler.is_compiling() or is_differentiated(x, y)):
        torch.add(x, y, out=to)
    else:
        to.copy_(x + y)


def phase_kernels(weight: Tensor) -> list[Tensor]:
    """The 2x2 kernels that a nearest-neighbour 2x up-sampling and a 3x3 convolution are.

    Along one axis, outputs 2i and 2i + 1 of a kernel (w0, w1, w2) on the up-sampled (…, x[i-1],
    x[i-1], x[i], x[i], x[i+1], x[i+1], …) are `w0 x[i-1] + (w1 + w2) x[i]` and
    `(w0 + w1) x[i] + w2 x[i+1]`. Zero padding of the up-sampled image is zero padding of x.

    Args:
        weight: [Cout, Cin, 3, 3].

    Returns:
        [Cout, Cin, 2, 2] in channels_last memory for the phases (row, column) = (0, 0), (0, 1),
        (1, 0), (1, 1); summed in float32 (float64 for float64) and rounded once.
    """
    taps = weight.movedim(1, -1).to(torch.promote_types(weight.dtype, torch.float32))
    out, _, columns, width = taps.shape
    # By tap and phase: w0, w0 + w1, w1 + w2, w2.
    rows = taps.new_empty(out, 4, columns, width)
    write_sum(rows[:, 1:3], taps[:, :2], taps[:, 1:])
    rows[:, ::3].copy_(taps[:, ::2])
    kernels = weight.new_empty(2, 2, out, 2, 2, width)  # phase, then as they lie in memory
    places = kernels.permute(2, 3, 0, 4, 1, 5)  # [Cout, row: tap, phase, column: tap, phase, Cin]
    first, middle, last = rows.unflatten(1, (2, 2)).unbind(3)
    write_sum(places[:, :, :, 0, 0], first, None)
    write_sum(places[:, :, :, 0, 1], first, middle)
    write_sum(places[:, :, :, 1, 0], middle, last)
    write_sum(places[:, :, :, 1, 1], last, None)
    return [kernel.movedim(-1, 1) for kernel in kernels.flatten(0, 1)]


def duplicated_phase(x: Tensor, out_channels: int, factor_t: int, time: int, phase: int) -> Tensor:
    """One time and phase of the VAE's `DupUp3D`, at the resolution of `x`.

    The 3-D layer repeats each input channel so often that output channels of `4·factor_t` values
    (a cell: time, then row, then column) can be cut from the list. On the first chunk only the
    last time of each cell is kept.

    Args:
        x: [N, C, H, W]; C divides `4·factor_t·out_channels`.
        out_channels: of the result.
        factor_t: 1 or 2.
        time: below `factor_t`.
        phase: 2 row + column.

    Returns:
        [N, out_channels, H, W]; a view where a cell is a whole number of repetitions (every stage
        of Cosmos3).
    """
    cell = 4 * factor_t
    repeats = cell * out_channels // x.shape[1]
    value = 4 * time + phase
    if cell % repeats == 0:
        return x[:, value // repeats :: cell // repeats]
    return x.repeat_interleave(repeats, 1)[:, value::cell]


class DecoderStage(nn.Module):
    """The residual blocks of one resolution, its up-sampling and shortcut.

    A temporal up-sampling leaves a clip's first frame as it is and does not remember it. From then
    on a convolution along time, of a frame and the two before, gives two frames for each.

    Args:
        stage, residual: its structure.
        min_tiles: see `takes_winograd`.
        temporal: see `CausalConv`.
    """

    def __init__(
        self,
        stage: UpStage,
        residual: bool,
        min_tiles: int | None = None,
        temporal: Temporal | None = None,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        width = stage.in_channels
        for _ in range(stage.num_blocks):
            self.blocks.append(ResidualBlock(width, stage.out_channels, min_tiles, temporal))
            width = stage.out_channels
        doubles_time = temporal is not None and stage.factor_t == 2
        # On the window of three frames, side by side.
        self.time_conv = nn.Conv2d(TAPS * width, 2 * width, 1) if doubles_time else None
        self.upsample = (
            None
            if stage.up_channels is None
            else Upsample(width, stage.up_channels, _UPSAMPLE_TILES)
        )
        self.residual = residual
        self.factor_t = stage.factor_t

    def forward(self, terms: Terms, memory: Memory | None = None) -> Terms:
        own: dict[str, Any] = self._modules
        x, y = run_blocks(own["blocks"], terms, memory)
        upsample = own.get("upsample")
        if upsample is None:
            return y
        frames = y.total()
        if memory is not None and not memory.first and self.time_conv is not None:
            frames = self._double_time(memory.by_frame(frames), memory)
        made: Sum = upsample(frames, x if self.residual else None, self.factor_t, memory)
        return made

    def _double_time(self, frames: Tensor, memory: Memory) -> Tensor:
        """[F, B, C, H, W] → [2F·B, C, H, W]."""
        assert self.time_conv is not None
        past = memory.past(self.time_conv)
        if past is None:
            past = torch.zeros_like(frames[:1]).expand(2, *frames.shape[1:])
        window = torch.cat([past.movedim(2, -1), frames.movedim(2, -1)]).movedim(-1, 2)
        memory.keep(self.time_conv, window[-2:].clone())
        pairs = memory.by_frame(self.time_conv(side_by_side(window, step=1)))
        halves = pairs.movedim(2, -1).unflatten(-1, (2, -1)).movedim(-2, 1)
        return halves.flatten(0, 2).movedim(-1, 1)
