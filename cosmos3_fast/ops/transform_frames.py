"""`cosmos3::transform_frames`: all that lies between two convolutions along time.

A causal 3x3x3 convolution takes m frames at a time as m + 2 convolutions in two dimensions, by
Winograd's F(m, 3) *along time* (`ops/cook_toom.py` has the matrices and their source). With the
window d = x[t - 2], ..., x[t + m - 1] and the kernel's three taps w, the frames y[t], ...,
y[t + m - 1] are `A^T [conv2d((B^T d)[j], (G w)[j]) for j in 0 .. m + 1]`. This op is what stands
between the products of one such convolution and the transformed frames `B^T d` of the next one.
Kernels: `csrc/cpu/transform_frames.cpp` and `csrc/cuda/transform_frames.cu`; eager torch serves a
GPU for which the library was not built.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cosmos3_fast.ops.checks import check_device, check_dtype, check_rank
from cosmos3_fast.ops.cook_toom import POINTS, Rows, cook_toom
from cosmos3_fast.ops.registry import call, example_tensor, register, register_autograd, select
from cosmos3_fast.ops.rms_norm_silu import check_channels, normalized

# Frames of a convolution's products that belong together, by how many products there are.
BLOCKS = {1: 1, 3: 1, **{m + 2: m for m in POINTS}}
# What `to` may be: nothing, the plain window, or the m of the next convolution.
TARGETS = (0, 1, *POINTS)


def transform_frames(
    products: list[Tensor],
    frames: int,
    *,
    to: int = 0,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    silu: bool = True,
    past: Tensor | None = None,
    scales: list[float] | None = None,
    keep_sum: bool = True,
    sum_dtype: torch.dtype | None = None,
    frames_dtype: torch.dtype | None = None,
    point: float = 1.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """From the products of one convolution along time to what the next one reads, in one pass.

    Everything is computed in float32 (float64 for float64) and each result rounded once. Results
    [..., C, H, W] and what is read fastest have their channels last in memory.

    Args:
        products: P tensors [N, C, H, W] of one dtype. P = 1 (the frames themselves) or 3 (one
            product for each tap): N = frames·B, of frame t and batch entry b at t·B + b. P = m + 2
            for m = 2 or 4: N = K·B with K = ⌈frames/m⌉, block k at k·B + b, which gives the frames
            k·m, ..., k·m + m - 1; of the last block those from `frames` on are dropped.
        frames: how many there are, at least 1.
        to: 0: only the sum. 1: plain frames. 2 or 4: frames transformed for F(to, 3).
        bias: [C], any of the dtypes.
        residual: [frames, B, C, H, W] in `sum_dtype`.
        weight: [C], any of the dtypes: of the RMS norm over channels (`rms_norm_silu`). None:
            neither norm nor SiLU, frames leave as their sums.
        silu: apply SiLU after the norm.
        past: [2, B, C, H, W] in `frames_dtype`, the two frames before; None: zeros.
        scales: P numbers, by which the products are multiplied first.
        keep_sum: False: the first result is empty.
        sum_dtype, frames_dtype: of the first result, and of the other two; that of the products
            unless given. float64 only together with float64.
        point: F(2, 3) is on the points 0, ±`point` and infinity: with 3/4 it can share kernels with
            F(4, 3) (`cook_toom.SHARED`). Positive; of no effect where there is no F(2, 3).
        backend: as in `prepare_latents`.

    Returns:
        The sums y [frames, B, C, H, W]: the products' frames + bias + residual.
        What the next convolution reads of the frames a, which are `act(norm(y) * (√C * weight))` of
        y before it is rounded. `to` = 1: past and a, [frames + 2, B, C, H, W], of which tap i reads
        [i : i + frames]. `to` = m: [m + 2, K, B, C, H, W] with K = ⌈frames/m⌉, `B^T d` of each
        block k's window d of past and a; frames from `frames` on are zeros.
        The last two of past and a, [2, B, C, H, W]: `past` of the next call.
        With `to` = 0 the second and third are empty, [0].

    Raises:
        RuntimeError, ValueError, BackendUnavailableError: as `prepare_latents`.
    """
    arguments = FrameArguments(
        *(list(products), frames, to, bias, residual, weight, silu, past, scales),
        *(keep_sum, sum_dtype, frames_dtype, point),
    )
    if not products:
        check_transform(*arguments)  # without a tensor there is no device to ask
    if backend is None:
        return call("transform_frames", *arguments)
    return select("transform_frames", backend, products[0].device)(*arguments)


class FrameArguments(NamedTuple):
    """The op's arguments as they are registered: in this order, with these defaults."""

    products: list[Tensor]
    frames: int
    to: int = 0
    bias: Tensor | None = None
    residual: Tensor | None = None
    weight: Tensor | None = None
    silu: bool = True
    past: Tensor | None = None
    scales: list[float] | None = None
    keep_sum: bool = True
    sum_dtype: torch.dtype | None = None
    frames_dtype: torch.dtype | None = None
    point: float = 1.0

    @property
    def first(self) -> Tensor:
        return self.products[0]

    @property
    def m(self) -> int:
        """Frames of a block of the products."""
        return BLOCKS[len(self.products)]

    @property
    def blocks(self) -> int:
        """Blocks of the products."""
        return _blocks(self.frames, self.m)

    @property
    def image(self) -> list[int]:
        """[B, C, H, W] of a frame."""
        return [self.first.shape[0] // self.blocks, *self.first.shape[1:]]

    @property
    def dtype_of_sum(self) -> torch.dtype:
        return self.sum_dtype or self.first.dtype

    @property
    def dtype_of_frames(self) -> torch.dtype:
        return self.frames_dtype or self.first.dtype


def transformed_bytes(
    products: int,
    to: int,
    frames: int,
    elements: int,
    *,
    product_size: int = 2,
    sum_size: int = 2,
    frames_size: int = 2,
    residual: bool = True,
    keep_sum: bool = True,
    past: bool = True,
) -> int:
    """Bytes that `transform_frames` moves, each value once: bias, weight and scales left out.

    Args:
        products, to, frames: P, `to` and how many frames.
        elements: B·C·H·W, those of one frame.
        product_size, sum_size, frames_size: bytes of a value of the products, of the sum and the
            residual, and of the transformed frames and the past.
        residual, keep_sum, past: whether they are there.
    """
    read = products * _blocks(frames, BLOCKS[products]) * product_size
    read += (frames * residual + frames * keep_sum) * sum_size
    if to:
        written = frames + 2 if to == 1 else (to + 2) * _blocks(frames, to)
        read += (written + 2 + 2 * past) * frames_size
    return read * elements


def _blocks(frames: int, m: int) -> int:
    return -(-frames // m)


def _combine(rows: Rows, terms: Sequence[Tensor]) -> list[Tensor]:
    """`rows @ terms`, from left to right; what a zero stands before may be infinite."""
    combined = []
    for row in rows:
        total: Tensor | None = None
        for factor, term in zip(row, terms, strict=True):
            if factor == 0.0:
                continue
            product = term if factor == 1.0 else factor * term
            total = product if total is None else total + product
        assert total is not None
        combined.append(total)
    return combined


def _on_unit_points(window: list[Tensor], point: float) -> list[Tensor]:
    """With `x'[j] = point^(2-j) x[j]` and `w'[k] = point^(k-2) w[k]` the points ±`point` become ±1,
    and frame i is `point^i` times that of x' and w'."""
    factors = (point * point, point, 1.0, 1 / point)
    return [x * factor for x, factor in zip(window, factors, strict=True)]


def _sums(given: FrameArguments) -> Tensor:
    """y [frames, B, C, H, W] in float32, or float64 for float64."""
    compute = torch.promote_types(given.first.dtype, torch.float32)
    terms = [product.to(compute) for product in given.products]
    if given.scales is not None:
        terms = [term * scale for term, scale in zip(terms, given.scales, strict=True)]
    m, blocks, image = given.m, given.blocks, given.image
    rows = cook_toom(m).inverse if m > 1 else ((1.0,) * len(terms),)
    made = _combine(rows, terms)
    if m == 2:  # see `_on_unit_points`
        made[1] = made[1] * given.point
    y = torch.stack(made).view(m, blocks, *image).transpose(0, 1)
    y = y.reshape(blocks * m, *image)[: given.frames]
    if given.bias is not None:
        y = y + given.bias.to(compute).view(-1, 1, 1)
    return y if given.residual is None else y + given.residual.to(compute)


def _stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy [..., C, H, W] whose channels are last in memory."""
    x = x.movedim(-3, -1).to(dtype, copy=True, memory_format=torch.contiguous_format)
    return x.movedim(-1, -3)


def transform_frames_reference(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Sum up, normalize, transform `FrameArguments`, as `transform_frames` says, step by step."""
    given = FrameArguments(*arguments)
    frames, to, past, weight = given.frames, given.to, given.past, given.weight
    y = _sums(given)
    sum_dtype, frames_dtype = given.dtype_of_sum, given.dtype_of_frames
    total = _stored(y, sum_dtype) if given.keep_sum else y.new_empty(0, dtype=sum_dtype)
    if to == 0:
        return total, y.new_empty(0, dtype=frames_dtype), y.new_empty(0, dtype=frames_dtype)
    shape = y.shape[1:]
    a = y if weight is None else normalized(y.flatten(0, 1), weight, given.silu).view(y.shape)
    before = y.new_zeros(2, *shape) if past is None else past.to(y.dtype)
    window = torch.cat([before, a])
    last = _stored(window[-2:], frames_dtype)
    if to == 1:
        return total, _stored(window, frames_dtype), last
    blocks = _blocks(frames, to)
    window = torch.cat([window, y.new_zeros(blocks * to - frames, *shape)])
    terms = [window[i::to][:blocks] for i in range(to + 2)]
    if to == 2:
        terms = _on_unit_points(terms, given.point)
    transformed = torch.stack(_combine(cook_toom(to).inputs, terms))
    return total, _stored(transformed, frames_dtype), last


OP = "transform_frames"


def _check_frames(argument: str, tensor: Tensor, dtype: torch.dtype, of: str, shape: list[Any],
                  letters: str, first: Tensor) -> None:  # fmt: skip
    check_rank(OP, argument, tensor, 5, letters)
    torch._check(
        tensor.dtype == dtype,
        lambda: f"{OP}: {argument} must have {of}, {dtype}, got {tensor.dtype}",
    )
    check_device(OP, argument, tensor, "products", first)
    for got, wanted in zip(tensor.shape, shape, strict=True):  # one by one: sizes may be symbols
        torch._check(
            got == wanted,
            lambda: f"{OP}: {argument} must have shape {shape}, got {list(tensor.shape)}",
        )


def check_transform(*arguments: Any) -> None:
    """Raises RuntimeError unless `FrameArguments` fit each other."""
    given = FrameArguments(*arguments)
    frames, to, scales, count = given.frames, given.to, given.scales, len(given.products)
    torch._check(
        count in BLOCKS, lambda: f"{OP}: products must be 1, 3, 4 or 6 tensors, got {count}"
    )
    torch._check(to in TARGETS, lambda: f"{OP}: to must be 0, 1, 2 or 4, got {to}")
    torch._check(frames >= 1, lambda: f"{OP}: frames must be at least 1, got {frames}")
    first = given.first
    check_rank(OP, "products", first, 4, "[N, C, H, W]")
    check_dtype(OP, "products", first.dtype)
    for each in given.products[1:]:
        _check_alike(each, first)
    torch._check(
        first.shape[1] >= 1,
        lambda: f"{OP}: products must have channels, got {list(first.shape)}",
    )
    torch._check(
        first.shape[0] % given.blocks == 0,
        lambda: (
            f"{OP}: products must have N a multiple of {given.blocks}, for {frames} frames in "
            f"blocks of {given.m}, got {list(first.shape)}"
        ),
    )
    torch._check(
        scales is None or len(scales) == count,
        lambda: f"{OP}: scales must be {count} numbers, got {len(scales or ())}",
    )
    torch._check(
        0 < given.point < math.inf,
        lambda: f"{OP}: point must be positive and finite, got {given.point:g}",
    )
    _check_target("sum_dtype", given.dtype_of_sum, first)
    _check_target("frames_dtype", given.dtype_of_frames, first)
    check_channels(OP, "bias", given.bias, first, "products")
    check_channels(OP, "weight", given.weight, first, "products")
    if given.residual is not None:
        _check_frames("residual", given.residual, given.dtype_of_sum, "sum_dtype",
                      [frames, *given.image], "[frames, B, C, H, W]", first)  # fmt: skip
    if given.past is not None:
        _check_frames("past", given.past, given.dtype_of_frames, "frames_dtype",
                      [2, *given.image], "[2, B, C, H, W]", first)  # fmt: skip


def _check_alike(each: Tensor, first: Tensor) -> None:
    torch._check(
        each.dtype == first.dtype,
        lambda: f"{OP}: products must have one dtype, {first.dtype}, got {each.dtype}",
    )
    check_device(OP, "products", each, "the first of them", first)
    fits = [a == b for a, b in zip(each.shape, first.shape, strict=False)]
    for same in (each.dim() == first.dim(), *fits):  # one by one: sizes may be symbols
        torch._check(
            same,
            lambda: (
                f"{OP}: products must have one shape, {list(first.shape)}, got {list(each.shape)}"
            ),
        )


def _check_target(argument: str, dtype: torch.dtype, first: Tensor) -> None:
    check_dtype(OP, argument, dtype)
    torch._check(
        (dtype == torch.float64) == (first.dtype == torch.float64),
        lambda: (
            f"{OP}: {argument} must be float64 where the products are, and only there "
            f"({first.dtype}), got {dtype}"
        ),
    )


def _example(device: str) -> tuple[Any, ...]:
    products = [example_tensor(device, 2, 3, 2, 2) * (i + 1) for i in range(6)]
    weight, past = example_tensor(device, 3), example_tensor(device, 2, 1, 3, 2, 2)
    residual = example_tensor(device, 5, 1, 3, 2, 2)
    return products, 5, 4, weight, residual, weight, True, past


register(
    "transform_frames(Tensor[] products, int frames, int to=0, Tensor? bias=None, "
    "Tensor? residual=None, Tensor? weight=None, bool silu=True, Tensor? past=None, "
    "float[]? scales=None, bool keep_sum=True, ScalarType? sum_dtype=None, "
    "ScalarType? frames_dtype=None, float point=1.) "
    "-> (Tensor sum, Tensor transformed, Tensor last)",
    check_transform,
    eager=transform_frames_reference,
    example=_example,
)


@torch.library.register_fake("cosmos3::transform_frames")
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    check_transform(*arguments)
    given = FrameArguments(*arguments)
    frames, to = given.frames, given.to
    batch, channels, height, width = given.image

    def images(dtype: torch.dtype, *leading: int) -> Tensor:
        x = given.first.new_empty(*leading, batch, height, width, channels, dtype=dtype)
        return x.movedim(-1, -3)

    def nothing(dtype: torch.dtype) -> Tensor:
        return given.first.new_empty(0, dtype=dtype)

    of_sum, of_frames = given.dtype_of_sum, given.dtype_of_frames
    total = images(of_sum, frames) if given.keep_sum else nothing(of_sum)
    if to == 0:
        return total, nothing(of_frames), nothing(of_frames)
    leading = (frames + 2,) if to == 1 else (to + 2, _blocks(frames, to))
    return total, images(of_frames, *leading), images(of_frames, 2)


# Where bias, residual, weight and past stand among the arguments.
_TENSORS = (3, 4, 5, 7)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    products, *rest = inputs
    ctx.save_for_backward(*products, *(inputs[i] for i in _TENSORS))
    ctx.count = len(products)
    ctx.rest = [None if isinstance(x, Tensor) else x for x in rest]


def _gradients(
    reached: list[tuple[Tensor, Tensor]], asked: list[Any], twice: bool
) -> Sequence[Tensor | None]:
    if not reached:
        return [None] * len(asked)
    results, gradients = zip(*reached, strict=True)
    return torch.autograd.grad(results, asked, gradients, create_graph=twice, allow_unused=True)


def _backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
    count = ctx.count
    of_products, of_rest = ctx.needs_input_grad[:count], ctx.needs_input_grad[count:]
    needed = [*of_products, *(of_rest[i - 1] for i in _TENSORS)]
    twice = torch.is_grad_enabled()
    with torch.enable_grad():
        # A name of its own for each, since a tensor may be several arguments.
        leaves = [None if x is None else x.view_as(x) for x in ctx.saved_tensors]
        arguments = [leaves[:count], *ctx.rest]
        for position, leaf in zip(_TENSORS, leaves[count:], strict=True):
            arguments[position] = leaf
        results = transform_frames_reference(*arguments)
        reached = [(y, g) for y, g in zip(results, gradients, strict=True) if y.requires_grad]
        asked = [x for x, is_needed in zip(leaves, needed, strict=True) if is_needed]
        found = iter(_gradients(reached, asked, twice))
    given = [next(found) if is_needed else None for is_needed in needed]
    of_others: list[Any] = [None] * len(ctx.rest)
    for position, gradient in zip(_TENSORS, given[count:], strict=True):
        of_others[position - 1] = gradient
    return *given[:count], *of_others


register_autograd(OP, _backward, _setup, transform_frames_reference, signature=FrameArguments)
