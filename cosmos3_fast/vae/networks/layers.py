"""The layers of the 2-D networks. Activations are [B, C, H, W] in channels_last memory.

On a GPU, torch adds a convolution's bias in a launch of its own, which reads and writes the whole
result. So between layers an activation is a `Sum`, whose terms the kernel adds up that reads it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosmos3_fast.ops import (
    add_pad,
    add_rms_norm_silu,
    rms_norm_silu,
    takes_winograd,
    winograd_conv3x3,
    winograd_pack,
)
from cosmos3_fast.ops.registry import is_differentiated
from cosmos3_fast.ops.winograd import same_bits
from cosmos3_fast.vae.decoder_topology import UpStage
from cosmos3_fast.vae.topology import Stage

# Of an up-sampling, Winograd saves less than of another convolution, and needs as much memory.
_UPSAMPLE_TILES = 1024
# A `min_tiles` that no image has.
NO_TILES = sys.maxsize


class Sum(NamedTuple):
    """`x + bias + residual`, in the order of the ops' arguments (see `ops.rms_norm_silu`)."""

    x: Tensor
    bias: Tensor | None = None
    residual: Tensor | None = None

    def total(self, pad: bool = False) -> Tensor:
        """The sum; with `pad`, a row of zeros below and a column of them to the right."""
        if not pad and self.bias is None and self.residual is None:
            return self.x
        return add_pad(self.x, self.bias, self.residual, pad)


def defers_bias(x: Tensor) -> bool:
    """Whether convolving `x` leaves the bias to the next kernel: a CPU adds it for nothing."""
    return x.device.type == "cuda"


def deferred(conv: nn.Conv2d, x: Tensor, residual: Tensor | None = None) -> Sum:
    """`conv(x) + residual`."""
    if defers_bias(x):
        y = F.conv2d(x, conv.weight, None, conv.stride, conv.padding)
        return Sum(y, conv.bias, residual)
    return Sum(conv(x), None, residual)


class WinogradConv(nn.Conv2d):
    """A 3x3 convolution of stride 1 and padding 1 that `cosmos3::winograd_conv3x3` may compute.

    In float32 on the CPU, large images go through that op; the transformed weights are made at the
    first such call and again whenever the weights differ from those they were made of. Every call
    compares the bits, which takes about a hundredth of the convolution: version counters do not
    see a write through `.data` or to an inference tensor.

    Args:
        in_channels, out_channels: widths.
        min_tiles: see `takes_winograd`.

    Attributes:
        winograd: whether that route may be taken; False gives direct convolutions everywhere.
    """

    winograd = True

    def __init__(self, in_channels: int, out_channels: int, min_tiles: int | None = None) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)
        self._min_tiles = min_tiles
        # A copy of the weight and what was packed from that copy, which no thread sees apart.
        self._packed: tuple[Tensor, Tensor] | None = None

    def _takes_winograd(self, x: Tensor, scale: int = 1) -> bool:
        return self.winograd and takes_winograd(x, self.weight, self._min_tiles, scale)

    def _convolve_winograd(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        # `.to()` in another thread changes what the parameter holds, not this.
        weight = self.weight.detach()
        packed = self._packed
        if packed is None or not same_bits(packed[0], weight):
            copy = weight.clone()
            packed = self._packed = copy, winograd_pack(copy)
        return winograd_conv3x3(x, packed[1], self.bias, residual)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WinogradConv:
        self._packed = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}


class Conv3x3(WinogradConv):
    """3x3 convolution of stride 1 and padding 1, plus an optional residual."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self._takes_winograd(x):
            return self._convolve_winograd(x, residual)
        y = super().forward(x)
        return y if residual is None else y + residual

    def deferred(self, x: Tensor, residual: Tensor | None = None) -> Sum:
        """`forward`, of which the next kernel adds up what this one does not add for nothing."""
        if self._takes_winograd(x):
            return Sum(self(x, residual))
        return deferred(self, x, residual)


class NormSiLU(nn.Module):
    """RMS norm over channels, then SiLU, of a `Sum`: [B, C, H, W] → the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(
        self, x: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        return rms_norm_silu(x, self.weight, True, bias, residual)

    def with_sum(self, terms: Sum) -> tuple[Tensor, Tensor]:
        """The sum too, first."""
        return sum_and_norm(terms, self.weight, silu=True)


def sum_and_norm(terms: Sum, weight: Tensor | None, silu: bool) -> tuple[Tensor, Tensor]:
    """`add_rms_norm_silu`, where there is something to add."""
    x, bias, residual = terms
    if bias is None and residual is None:
        return x, rms_norm_silu(x, weight, silu)
    return add_rms_norm_silu(x, weight, silu, bias, residual)


class ResidualBlock(nn.Module):
    """norm, SiLU, 3x3, norm, SiLU, 3x3, plus the input: [B, Cin, H, W] → [B, Cout, H, W].

    A shortcut convolution has no bias of its own: it is part of `conv2`'s.

    Args:
        in_channels, out_channels: widths.
        min_tiles: see `takes_winograd`.
    """

    def __init__(self, in_channels: int, out_channels: int, min_tiles: int | None = None) -> None:
        super().__init__()
        self.norm1 = NormSiLU(in_channels)
        self.conv1 = Conv3x3(in_channels, out_channels, min_tiles)
        self.norm2 = NormSiLU(out_channels)
        self.conv2 = Conv3x3(out_channels, out_channels, min_tiles)
        self.shortcut = (
            nn.Conv2d(in_channels, out_channels, 1, bias=False)
            if in_channels != out_channels
            else None
        )

    def forward(self, terms: Sum) -> Sum:
        return self.after_norm(*self.norm1.with_sum(terms))

    def after_norm(self, x: Tensor, activated: Tensor) -> Sum:
        """The rest, given the block's input and its first norm."""
        y = self.norm2(*self.conv1.deferred(activated))
        return self.conv2.deferred(y, x if self.shortcut is None else self.shortcut(x))


class Attention(nn.Module):
    """Single-head self-attention over all H·W positions, plus the input.

    The norm's scale, that of the scores and the output projection live in `qkv`
    (`fold.attention`). In channels_last memory, [B, H·W, C] is a view, so no copy is made on the
    way in or out.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(channels, 3 * channels)

    def forward(self, terms: Sum) -> Sum:
        x, normalized = sum_and_norm(terms, None, silu=False)
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

    def forward(self, terms: Sum) -> Sum:
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


def add_average_shortcut(terms: Sum, x: Tensor, factor_t: int, factor_s: int) -> Sum:
    """`terms` and `average_shortcut(x)`.

    Where a group is exactly one cell (every stage of Cosmos3), the average is a pooling, and the
    zero frames fill whole output channels: pooled channel c belongs to output channel
    `c·factor_t + factor_t - 1`, and nothing is added to the others. That is what the ops make of
    a residual of this shape.
    """
    if terms.residual is not None:
        terms = Sum(terms.total())
    y, bias, _ = terms
    if y.shape[1] != x.shape[1] * factor_t:
        x = average_shortcut(x, y.shape[1], factor_t, factor_s)
    return Sum(y, bias, x)


class EncoderStage(nn.Module):
    """The residual (and attention) blocks of one resolution, its down-sampling and shortcut."""

    def __init__(self, stage: Stage, residual: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        width = stage.in_channels
        for _ in range(stage.num_blocks):
            self.blocks.append(ResidualBlock(width, stage.out_channels))
            if stage.attention:
                self.blocks.append(Attention(stage.out_channels))
            width = stage.out_channels
        self.downsample = Downsample(width) if stage.downsample else None
        self.residual = residual
        self.factor_t = stage.factor_t
        self.factor_s = 2 if stage.downsample else 1

    def forward(self, terms: Sum) -> Sum:
        x, y = run_blocks(self.blocks, terms)
        if self.downsample is not None:
            y = self.downsample(y)
        if self.residual:
            y = add_average_shortcut(y, x, self.factor_t, self.factor_s)
        return y


def run_blocks(blocks: nn.ModuleList, terms: Sum) -> tuple[Tensor, Sum]:
    """The sum, which the first block needs, and what the blocks make of it."""
    first, *rest = blocks
    assert isinstance(first, ResidualBlock)
    x, activated = first.norm1.with_sum(terms)
    y = first.after_norm(x, activated)
    for block in rest:
        y = block(y)
    return x, y


class Upsample(WinogradConv):
    """Nearest-neighbour 2x up-sampling and a 3x3 convolution: [B, C, H, W] → [B, C', 2H, 2W].

    Both are four convolutions of 2x2 on the small image, one per row and column of an output cell
    (`phase_kernels`): 16 products instead of 36. Each phase is computed and written where it
    belongs, so that no more than one is held beside the result. The kernels are made at each
    call, which is little work beside theirs: kept, they would be 16 weights for 9.

    Where Winograd's convolution pays, it takes the up-sampled image: 9 products.
    """

    def forward(self, x: Tensor, shortcut: Tensor | None = None, factor_t: int = 1) -> Tensor:
        """As the class says, plus the VAE's `DupUp3D` of `shortcut` where there is one."""
        return self.deferred(x, shortcut, factor_t).total()

    def deferred(self, x: Tensor, shortcut: Tensor | None, factor_t: int) -> Sum:
        """`forward`, of which the next kernel adds up what this one does not add for nothing."""
        if self._takes_winograd(x, scale=2):
            out = self._convolve_winograd(F.interpolate(x, scale_factor=2.0))
            if shortcut is not None:
                for phase in range(4):
                    row, column = divmod(phase, 2)
                    duplicated = duplicated_phase(shortcut, self.out_channels, factor_t, phase)
                    out[:, :, row::2, column::2] += duplicated
            return Sum(out)
        batch, _, height, width = x.shape
        out = torch.empty(
            (batch, self.out_channels, 2 * height, 2 * width),
            dtype=x.dtype,
            device=x.device,
            memory_format=torch.channels_last,
        )
        defers = defers_bias(x)
        for phase, kernel in enumerate(phase_kernels(self.weight)):
            row, column = divmod(phase, 2)
            if defers:  # there a pad is a copy of its own, and a row and a column more are not
                y = F.conv2d(x, kernel, padding=1)
                y = y[:, :, row : row + height, column : column + width]
            else:
                y = F.conv2d(F.pad(x, (1 - column, column, 1 - row, row)), kernel, self.bias)
            added = (
                None
                if shortcut is None
                else duplicated_phase(shortcut, self.out_channels, factor_t, phase)
            )
            write_sum(out[:, :, row::2, column::2], y, added)
        return Sum(out, self.bias if defers else None)


def write_sum(to: Tensor, x: Tensor, y: Tensor | None) -> None:
    """`to[...] = x + y`, in one launch where torch can."""
    if y is None:
        to.copy_(x)
    elif torch.compiler.is_compiling() or is_differentiated(x, y):
        to.copy_(x + y)
    else:
        torch.add(x, y, out=to)


def phase_kernels(weight: Tensor) -> Iterator[Tensor]:
    """The 2x2 kernels that a nearest-neighbour 2x up-sampling and a 3x3 convolution are.

    Along one axis, outputs 2i and 2i + 1 of a kernel (w0, w1, w2) on the up-sampled (…, x[i-1],
    x[i-1], x[i], x[i], x[i+1], x[i+1], …) are `w0 x[i-1] + (w1 + w2) x[i]` and
    `(w0 + w1) x[i] + w2 x[i+1]`. Zero padding of the up-sampled image is zero padding of x.

    Args:
        weight: [Cout, Cin, 3, 3].

    Yields:
        [Cout, Cin, 2, 2] in channels_last memory for the phases (row, column) = (0, 0), (0, 1),
        (1, 0), (1, 1); summed in float32 (float64 for float64) and rounded once.
    """
    taps = weight.to(torch.promote_types(weight.dtype, torch.float32))
    for pair in _phase_sums(*taps.unbind(2)):
        columns = [_phase_sums(*row.unbind(2)) for row in pair]
        for column in range(2):
            kernel = torch.empty_like(weight[:, :, :2, :2], memory_format=torch.channels_last)
            for y in range(2):
                for x in range(2):
                    kernel[:, :, y, x] = columns[y][column][x]
            yield kernel


def _phase_sums(
    first: Tensor, middle: Tensor, last: Tensor
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The two taps along one axis, for the even and for the odd outputs."""
    return (first, middle + last), (first + middle, last)


def duplicated_phase(x: Tensor, out_channels: int, factor_t: int, phase: int) -> Tensor:
    """One phase of the VAE's `DupUp3D` on one frame, at the resolution of `x`.

    The 3-D layer repeats each input channel so often that output channels of `4·factor_t` values
    (a cell: time, then row, then column) can be cut from the list. On the first chunk only the
    last time of each cell is kept.

    Args:
        x: [B, C, H, W]; C divides `4·factor_t·out_channels`.
        out_channels: of the result.
        factor_t: 1 or 2.
        phase: 2 row + column.

    Returns:
        [B, out_channels, H, W]; a view where a cell is a whole number of repetitions (every stage
        of Cosmos3).
    """
    cell = 4 * factor_t
    repeats = cell * out_channels // x.shape[1]
    value = cell - 4 + phase
    if cell % repeats == 0:
        return x[:, value // repeats :: cell // repeats]
    return x.repeat_interleave(repeats, 1)[:, value::cell]


class DecoderStage(nn.Module):
    """The residual blocks of one resolution, its up-sampling and shortcut.

    Args:
        stage, residual: its structure.
        min_tiles: see `takes_winograd`.
    """

    def __init__(self, stage: UpStage, residual: bool, min_tiles: int | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        width = stage.in_channels
        for _ in range(stage.num_blocks):
            self.blocks.append(ResidualBlock(width, stage.out_channels, min_tiles))
            width = stage.out_channels
        self.upsample = (
            None
            if stage.up_channels is None
            else Upsample(width, stage.up_channels, _UPSAMPLE_TILES)
        )
        self.residual = residual
        self.factor_t = stage.factor_t

    def forward(self, terms: Sum) -> Sum:
        x, y = run_blocks(self.blocks, terms)
        if self.upsample is None:
            return y
        return self.upsample.deferred(y.total(), x if self.residual else None, self.factor_t)
