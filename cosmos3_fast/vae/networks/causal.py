"""A causal 3x3x3 convolution as convolutions in two dimensions, and what it remembers.

On the frames x of a clip it computes `y[t] = W2 x[t] + W1 x[t-1] + W0 x[t-2] + b`, zeros in place
of frames before the first. Of the first frame only the last tap W2 acts: one 2-D convolution, all
that a network for single frames has. The frames after it are taken in blocks of m by Winograd's
F(m, 3) *along time*: `y = A^T [(G W) * (B^T x)]`, m + 2 convolutions where 3m taps act
(`ops.cook_toom` has the matrices and their source), so six give four frames. The last row of G is
W2 itself. One or two frames are a block of two, which takes four of the six kernels. With m = 1 the
taps are three convolutions; or one of three frames side by side, where that is less to read and
write.

Between two such convolutions one kernel does the rest (`ops.transform_frames`): from the products
to the frames, bias, residual, RMS norm, SiLU, and the next transformed frames.

What every call reads of a layer, it reads from `_parameters` and `_modules`: as an attribute each
is a call of Python, and an eager encode is bound by the host.

Activations are [N, C, H, W] in channels_last memory; of a clip of B videos side by side, frame t of
video b stands at t·B + b.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosmos3_fast.ops import (
    add_pad,
    add_rms_norm_silu,
    rms_norm_silu,
    takes_winograd,
    transform_frames,
    winograd_conv3x3,
    winograd_pack,
)
from cosmos3_fast.ops.cook_toom import SHARED, SHARED_POINT, SHARED_SCALES
from cosmos3_fast.ops.registry import is_differentiated
from cosmos3_fast.ops.winograd import same_bits

TAPS = 3
# From here a product in space saves more than it takes to pack its kernel for it.
TILES_WORTH_PACKING = 48


def is_writable(x: Tensor) -> bool:
    """Whether `x` may be written to in any mode, and no gradient needs its values."""
    return not (x.requires_grad or x.is_inference())


class Memory:
    """What the layers of a network remember of a clip while it goes through them.

    It belongs to one call: two calls share nothing, and what it holds goes with it.

    Args:
        batch: videos side by side.

    Attributes:
        batch: as given.
        first: the frame under way is the clip's first.
        in_place: what is kept replaces the values of what was, which a CUDA graph has the place of.
    """

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.first = True
        self.in_place = False
        self._past: dict[nn.Module, Tensor] = {}
        self._made: dict[nn.Module, Any] = {}

    def past(self, layer: nn.Module) -> Tensor | None:
        """What `layer` kept, [frames, B, C, H, W]; None: nothing yet."""
        return self._past.get(layer)

    def keep(self, layer: nn.Module, frames: Tensor) -> None:
        held = self._past.get(layer)
        if self.in_place and held is not None and is_writable(held):
            held.copy_(frames)
        else:
            self._past[layer] = frames

    @property
    def kept(self) -> list[Tensor]:
        """All that is."""
        return [*self._past.values()]

    def once(self, layer: nn.Module, make: Callable[[], Any]) -> Any:
        """What `make` gives for `layer`, made at the first call."""
        if layer not in self._made:
            self._made[layer] = make()
        return self._made[layer]

    def by_frame(self, x: Tensor) -> Tensor:
        """[frames·B, C, H, W] as [frames, B, C, H, W]."""
        return x.unflatten(0, (x.shape[0] // self.batch, self.batch))


class Sum(NamedTuple):
    """`x + bias + residual`, in the order of the ops' arguments (see `ops.rms_norm_silu`).

    On a GPU, torch adds a convolution's bias in a launch of its own, which reads and writes the
    whole result. So between layers an activation is a sum, whose terms the kernel adds up that
    reads it.
    """

    x: Tensor
    bias: Tensor | None = None
    residual: Tensor | None = None

    def total(self, pad: bool = False) -> Tensor:
        """The sum; with `pad`, a row of zeros below and a column of them to the right."""
        if not pad and self.bias is None and self.residual is None:
            return self.x
        return add_pad(self.x, self.bias, self.residual, pad)

    def normalized(self, weight: Tensor | None, silu: bool) -> Tensor:
        """`rms_norm_silu` of the sum."""
        return rms_norm_silu(self.x, weight, silu, self.bias, self.residual)

    def with_normalized(self, weight: Tensor | None, silu: bool) -> tuple[Tensor, Tensor]:
        """The sum, and its norm."""
        if self.bias is None and self.residual is None:
            return self.x, rms_norm_silu(self.x, weight, silu)
        return add_rms_norm_silu(self.x, weight, silu, self.bias, self.residual)

    def products(self, memory: Memory) -> Products:
        """The same as the plain form of `transform_frames`."""
        x, bias, residual = self
        if residual is not None and residual.shape != x.shape:  # an average shortcut's
            x, bias, residual = self.total(), None, None
        frames = x.shape[0] // memory.batch
        return Products([x], frames, memory.batch, x.dtype, None, bias, residual)


class Products(NamedTuple):
    """The frames that a convolution's products stand for, `+ bias + residual`.

    They are read once: then the parts are let go, which callers would else hold while the next
    convolution makes as many.

    Attributes:
        parts: as `transform_frames` takes them.
        frames: how many there are, of each video.
        batch: videos side by side.
        dtype: of the frames.
        scales: of the parts, or None.
        point: of the parts, as `transform_frames` takes it.
        bias: [C], or None.
        residual: [frames·B, C, H, W], or None.
    """

    parts: list[Tensor]
    frames: int
    batch: int
    dtype: torch.dtype
    scales: list[float] | None
    bias: Tensor | None
    residual: Tensor | None
    point: float = 1.0

    def transformed(
        self,
        to: int,
        weight: Tensor | None,
        past: Tensor | None,
        dtype: torch.dtype | None,
        keep_sum: bool,
        point: float = 1.0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`transform_frames`; the sum as [frames·B, C, H, W]. Of blocks of two that follow each
        other the points are the same."""
        residual = self.residual
        if residual is not None:
            residual = residual.unflatten(0, (self.frames, self.batch))
        plain = len(self.parts) == 1 and self.bias is None and residual is None
        total, frames, past = transform_frames(
            self.parts,
            self.frames,
            to=to,
            bias=self.bias,
            residual=residual,
            weight=weight,
            past=past,
            scales=self.scales,
            keep_sum=keep_sum and not plain,  # which is the sum itself
            sum_dtype=self.dtype,
            frames_dtype=dtype,
            point=point if to == 2 else self.point,
        )
        if plain:
            total = self.parts[0]
        elif keep_sum:
            total = total.flatten(0, 1)
        self.parts.clear()
        return total, frames, past

    def total(self, pad: bool = False) -> Tensor:
        """As `Sum.total`."""
        total, _, _ = self.transformed(0, None, None, None, True)
        return add_pad(total) if pad else total

    def with_normalized(self, weight: Tensor | None, silu: bool) -> tuple[Tensor, Tensor]:
        """As `Sum.with_normalized`."""
        return Sum(self.total()).with_normalized(weight, silu)


Terms = Sum | Products
"""An activation between two layers."""


def defers_bias(x: Tensor) -> bool:
    """Whether convolving `x` leaves the bias to the next kernel: a CPU adds it for nothing."""
    return x.is_cuda


def deferred(conv: nn.Conv2d, x: Tensor, residual: Tensor | None = None) -> Sum:
    """`conv(x) + residual`."""
    if defers_bias(x):
        held: dict[str, Any] = conv._parameters
        y = F.conv2d(x, held["weight"], None, conv.stride, conv.padding)
        return Sum(y, held["bias"], residual)
    return Sum(conv(x), None, residual)


def side_by_side(frames: Tensor, step: int) -> Tensor:
    """Windows of three frames as one frame of three times the channels.

    Args:
        frames: [T, B, C, H, W], channels last in memory.
        step: frames from one window to the next.

    Returns:
        [n·B, 3·C, H, W] with n = 1 + (T - 3) // step, channels-last.
    """
    count = 1 + (frames.shape[0] - TAPS) // step
    last = frames.movedim(2, -1)
    taps = [last[tap : tap + step * (count - 1) + 1 : step] for tap in range(TAPS)]
    return torch.cat(taps, -1).flatten(0, 1).movedim(-1, 1)


class NormSiLU(nn.Module):
    """RMS norm over channels, then SiLU: [N, C, H, W] → the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, terms: Sum) -> Tensor:
        return terms.normalized(self._parameters["weight"], True)

    def with_sum(self, terms: Sum) -> tuple[Tensor, Tensor]:
        """The sum too, first."""
        return terms.with_normalized(self._parameters["weight"], True)


class WinogradConv(nn.Conv2d):
    """A 3x3 convolution of stride 1 and padding 1 that `cosmos3::winograd_conv3x3` may compute.

    In float32 on the CPU, large images go through that op. A network for single frames keeps the
    transformed weights, and makes them again whenever the weights differ from those they were made
    of. Every call compares the bits, which takes about a hundredth of the convolution: version
    counters do not see a write through `.data` or to an inference tensor. A clip's are made when
    they are used.

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
        # A copy of the weights and what was packed from that copy, which no thread sees apart.
        self._packed: tuple[Tensor, Tensor] | None = None

    def _takes_winograd(
        self, x: Tensor, kernel: Tensor, scale: int = 1, min_tiles: int | None = None
    ) -> bool:
        return (
            self.winograd
            and x.dtype == torch.float32  # by itself, for the sake of the others
            and takes_winograd(x, kernel, min_tiles or self._min_tiles, scale)
        )

    def _packed_weight(self, keep: bool) -> Tensor:
        if not keep:
            return winograd_pack(self.weight.detach())
        # `.to()` in another thread changes what the parameter holds, not this.
        weight, packed = self.weight.detach(), self._packed
        if packed is None or not same_bits(packed[0], weight):
            copy = weight.clone()
            packed = self._packed = copy, winograd_pack(copy)
        return packed[1]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WinogradConv:
        self._packed = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}


class Temporal(NamedTuple):
    """How causal convolutions take the frames after the first.

    Attributes:
        block: m, the frames of a whole block: 4 or 2; 1: direct taps.
        dtype: of the earlier kernels, the transformed frames and the products.
    """

    block: int
    dtype: torch.dtype

    @property
    def of_small_images(self) -> Temporal:
        """The same for the level of the lowest resolution.

        Its kernels outweigh what they are applied to. In float32 it takes taps, of which there are
        fewer: for Cosmos3 it has a third of all kernels and a twentieth of the products.
        """
        return Temporal(1, self.dtype) if self.dtype == torch.float32 else self

    def block_of(self, frames: int) -> int:
        """The m by which so many frames are taken. At most two would leave half of a block of four
        empty: they are a block of two, which shares its kernels (`ops.cook_toom.SHARED`)."""
        return 2 if self.block == 4 and frames <= 2 else self.block

    @property
    def kernels(self) -> int:
        """Of a convolution, the last tap among them."""
        return TAPS if self.block == 1 else self.block + TAPS - 1


class CausalConv(WinogradConv):
    """A causal 3x3x3 convolution of stride 1, with zero padding in space.

    Args:
        in_channels, out_channels: widths.
        min_tiles: see `takes_winograd`.
        temporal: how frames after the first are taken; None: there are none.
        in_windows: with direct taps, one convolution of three frames side by side instead of three,
            which is less to read and write where `in_channels` are few.

    Attributes:
        weight: [Cout, Cin, 3, 3], the last tap, which is the last kernel too.
        earlier: with `temporal`, the kernels before it one after the other, m + 1 (two taps where
            m is 1) times [Cout, Cin, 3, 3], each times two to the power of its exponent.
        exponents: with `temporal`, by kernel; not 0 only in float16 (`fold.fitted`).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        min_tiles: int | None = None,
        temporal: Temporal | None = None,
        in_windows: bool = False,
    ) -> None:
        super().__init__(in_channels, out_channels, min_tiles)
        self.temporal = temporal
        self._in_windows = in_windows
        self._exponents: list[int] = []
        if temporal is not None:
            shape = ((temporal.kernels - 1) * out_channels, in_channels, 3, 3)
            self.earlier = nn.Parameter(torch.zeros(shape, dtype=temporal.dtype))
            self.register_buffer("exponents", torch.zeros(temporal.kernels, dtype=torch.int64))
            self._exponents = [0] * temporal.kernels

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CausalConv:
        """As any module's, but `earlier` keeps its dtype: a conversion of the whole network to the
        dtype that it has would round float16 kernels to bfloat16."""
        if self.temporal is None:
            super()._apply(fn, recurse)
            return self
        held = self.earlier

        def moved(tensor: Tensor) -> Tensor:
            made = fn(tensor)
            if tensor is not held or made.dtype == tensor.dtype:
                return made
            return torch.empty_like(made, dtype=tensor.dtype).copy_(tensor)

        super()._apply(moved, recurse)
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if self.temporal is not None and f"{prefix}earlier" in state_dict:
            # A convolution whose kernels float16 does not hold has them in the network's dtype.
            dtype = state_dict[f"{prefix}earlier"].dtype
            if dtype != self.earlier.dtype:
                self.temporal = self.temporal._replace(dtype=dtype)
                self.earlier = nn.Parameter(self.earlier.to(dtype), requires_grad=False)
            if f"{prefix}exponents" in state_dict:
                self._exponents = state_dict[f"{prefix}exponents"].tolist()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Of one frame, [N, Cin, H, W] → [N, Cout, H, W]."""
        if self._takes_winograd(x, self.weight):
            packed = self._packed_weight(keep=self.temporal is None)
            return winograd_conv3x3(x, packed, self.bias, residual)
        y = super().forward(x)
        return y if residual is None else y + residual

    def deferred(self, x: Tensor, residual: Tensor | None = None) -> Sum:
        """`forward`, of which the next kernel adds up what this one does not add for nothing."""
        held: dict[str, Any] = self._parameters
        if self._takes_winograd(x, held["weight"]):
            return Sum(self(x, residual))
        if defers_bias(x):
            return Sum(F.conv2d(x, held["weight"], None, 1, 1), held["bias"], residual)
        return deferred(self, x, residual)

    def after(
        self,
        norm: NormSiLU | None,
        terms: Terms,
        memory: Memory | None = None,
        residual: Tensor | None = None,
        keep_sum: bool = False,
    ) -> tuple[Tensor, Terms]:
        """`norm`, if any, and this convolution, of the next frames.

        Args:
            norm: None: the frames are convolved as they are.
            terms: the frames [frames·B, Cin, H, W].
            memory: of the clip they are of; None: they are single frames.
            residual: [frames·B, Cout, H, W], added to the result.
            keep_sum: the sum of `terms` is wanted too.

        Returns:
            That sum, of no use without `keep_sum`, and the result.
        """
        if memory is not None and not memory.first:
            return self._after_first(norm, terms, memory, residual, keep_sum)
        assert isinstance(terms, Sum)
        total = terms.x
        if norm is None:
            total = activated = terms.total()
        elif keep_sum:
            total, activated = norm.with_sum(terms)
        else:
            activated = norm.forward(terms)
        if memory is not None:
            shape, dtype = (2, *activated.movedim(1, -1).shape), self.earlier.dtype
            past = activated.new_empty(shape, dtype=dtype).movedim(-1, 2)
            past[0].zero_()
            past[1].copy_(activated)
            memory.keep(self, past)
        return total, self.deferred(activated, residual)

    def _after_first(
        self,
        norm: NormSiLU | None,
        terms: Terms,
        memory: Memory,
        residual: Tensor | None,
        keep_sum: bool,
    ) -> tuple[Tensor, Terms]:
        """`after` for frames that look back on others."""
        temporal = self.temporal
        assert temporal is not None
        given = terms.products(memory) if isinstance(terms, Sum) else terms
        weight = None if norm is None else norm.weight
        block = temporal.block_of(given.frames)
        shares = block != temporal.block
        point = SHARED_POINT if shares else 1.0
        total, frames, past = given.transformed(
            block, weight, memory.past(self), temporal.dtype, keep_sum, point
        )
        memory.keep(self, past)
        if self._in_windows:
            return total, self._of_windows(side_by_side(frames, step=1), memory, residual)
        if block == 1:
            flat, size = frames.flatten(0, 1), given.frames * memory.batch
            inputs = [flat[tap * memory.batch :][:size] for tap in range(TAPS)]
        else:
            inputs = list(frames.flatten(1, 2))
        numbers = SHARED if shares else range(temporal.kernels)
        parts = [self._product(x, i) for i, x in zip(numbers, inputs, strict=True)]
        exponents, scales = self._exponents, None
        if shares:
            scales = [b * 2.0 ** -exponents[i] for i, b in zip(SHARED, SHARED_SCALES, strict=True)]
        elif any(exponents):
            scales = [2.0**-e for e in exponents]
        made = Products(
            *(parts, given.frames, memory.batch, self.weight.dtype),
            *(scales, self.bias, residual, point),
        )
        return total, made

    def _of_windows(self, x: Tensor, memory: Memory, residual: Tensor | None) -> Sum:
        """The three taps at once, of [frames·B, 3·Cin, H, W]."""

        def kernel() -> Tensor:
            return torch.cat([*self.earlier.chunk(TAPS - 1), self._last_kernel()], 1)

        weight: Tensor = memory.once(self, kernel)
        if self._takes_winograd(x, weight, min_tiles=TILES_WORTH_PACKING):
            return Sum(winograd_conv3x3(x, winograd_pack(weight.detach()), self.bias, residual))
        if defers_bias(x):
            return Sum(F.conv2d(x, weight, None, padding=1), self.bias, residual)
        return Sum(F.conv2d(x, weight, self.bias, padding=1), None, residual)

    def _product(self, x: Tensor, index: int) -> Tensor:
        if index == len(self._exponents) - 1:
            kernel = self._last_kernel()
        else:
            width = self.out_channels
            kernel = self.earlier[index * width : (index + 1) * width]
        # Packed each time: kept, the packed kernels would be four times the network.
        tiles = max(TILES_WORTH_PACKING, self._min_tiles or 0)
        if self._takes_winograd(x, kernel, min_tiles=tiles):
            return winograd_conv3x3(x, winograd_pack(kernel.detach()))
        return F.conv2d(x, kernel, padding=1)

    def _last_kernel(self) -> Tensor:
        """The last tap as `earlier` has the others."""
        exponent, dtype = self._exponents[-1], self.earlier.dtype
        if self.weight.dtype == dtype and exponent == 0:
            return self.weight
        scale = 2.0**exponent
        if torch.compiler.is_compiling() or is_differentiated(self.weight):
            return (self.weight * scale).to(dtype)
        # In one launch: a power of two rounds nothing before the dtype does.
        return torch.mul(self.weight, scale, out=torch.empty_like(self.weight, dtype=dtype))
