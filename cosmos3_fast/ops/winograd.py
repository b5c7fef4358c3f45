"""`cosmos3::winograd_conv3x3`: 3x3 convolution in float32 with a quarter of the products.

Winograd's F(4x4, 3x3), of the matrices in `ops/cook_toom.py` along both dimensions.
Kernel: `csrc/cpu/winograd.cpp`.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from cosmos3_fast.ops._torch import PLAIN_TENSORS
from cosmos3_fast.ops.checks import check_device, check_float32, check_rank
from cosmos3_fast.ops.cook_toom import cook_toom_tensors
from cosmos3_fast.ops.registry import (
    LIBRARY_KERNELS,
    call,
    example_tensor,
    is_differentiated,
    refuse_autograd,
    register,
    select,
)


def winograd_pack(weight: Tensor, *, backend: str | None = None) -> Tensor:
    """Transforms float32 [Cout, Cin, 3, 3] kernels, once, for `winograd_conv3x3`.

    Cout must be a multiple of 32 and Cin of 16. Returns [36, Cout/32, Cin, 32], four times the
    size of `weight`. It is not differentiable.
    """
    if backend is None:
        return call("winograd_pack", weight)
    return select("winograd_pack", backend, weight.device)(weight)


def winograd_conv3x3(
    x: Tensor,
    packed_weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Computes `conv2d(x, weight, bias, padding=1) + residual` with a quarter of the products.

    It is Winograd's F(4x4, 3x3), in float32. Its rounding error is a few times that of direct
    convolution (the tests state it). It is not differentiable.

    Args:
        x: [B, Cin, H, W] float32; read fastest in channels-last memory.
        packed_weight: `winograd_pack(weight)`.
        bias: [Cout] float32.
        residual: [B, Cout, H, W] float32, added to the result.
        backend: as in `prepare_latents`.

    Returns:
        [B, Cout, H, W] float32, channels-last.

    Raises:
        RuntimeError, ValueError, BackendUnavailableError: as `prepare_latents`.
    """
    if backend is None:
        return call("winograd_conv3x3", x, packed_weight, bias, residual)
    return select("winograd_conv3x3", backend, x.device)(x, packed_weight, bias, residual)


# Below this many 4x4 output tiles, streaming the four times larger packed weights costs what the
# saved products gain; it also keeps them to 270 MB for the encoder of Cosmos3 at 480x832.
MIN_TILES = 256


def takes_winograd(x: Tensor, weight: Tensor, min_tiles: int | None = None, scale: int = 1) -> bool:
    """Tells whether `conv2d(x, weight, padding=1)` is better done by `winograd_conv3x3`.

    It is on a CPU with a compiled kernel, in float32, where nothing is differentiated, for channels
    that the kernel takes and images of enough tiles.

    Args:
        x: [B, Cin, H, W].
        weight: [Cout, Cin, 3, 3].
        min_tiles: the least number of 4x4 output tiles in the batch; default: `MIN_TILES`.
        scale: by how much `x` will be larger along height and width when it is convolved.
    """
    if torch.compiler.is_compiling() or type(x) is not Tensor or x.device.type != "cpu":
        return False
    # The packed weight is made of the weight's memory, which only a plain tensor has.
    if type(weight) not in PLAIN_TENSORS or is_differentiated(x, weight):
        return False
    tiles = x.shape[0] * -(-x.shape[2] * scale // 4) * -(-x.shape[3] * scale // 4)
    return (
        tiles >= (MIN_TILES if min_tiles is None else min_tiles)
        and x.dtype == weight.dtype == torch.float32
        and weight.shape[1] > 0
        and weight.shape[1] % 16 == 0
        and weight.shape[0] % 32 == 0
        and ("winograd_conv3x3", "cpu") in LIBRARY_KERNELS
    )


@functools.cache
def _memcmp() -> Callable[[int, int, int], int]:
    function = ctypes.CDLL(None).memcmp
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    return function


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Tells whether two CPU tensors agree in dtype, shape and every bit.

    It is several times faster than `torch.equal`, and a NaN equals itself.
    """
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if all(t.is_contiguous(memory_format=torch.channels_last) for t in (a, b)):
        a, b = a.permute(0, 2, 3, 1), b.permute(0, 2, 3, 1)  # else both would be copied
    a, b = a.contiguous(), b.contiguous()
    return _memcmp()(a.data_ptr(), b.data_ptr(), a.numel() * a.element_size()) == 0


def winograd_pack_reference(weight: Tensor) -> Tensor:
    """Computes `G g G^T` of every 3x3 kernel g of [Cout, Cin, 3, 3], as [36, Cout/32, Cin, 32]."""
    in_channels = weight.shape[1]
    _, kernel, _ = cook_toom_tensors(4, weight)
    points = (kernel @ weight.double() @ kernel.T).to(weight.dtype).flatten(2)
    return points.permute(2, 1, 0).reshape(36, in_channels, -1, 32).transpose(1, 2).contiguous()


def winograd_conv3x3_reference(
    x: Tensor, packed_weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """Runs Winograd's F(4x4, 3x3), whose own specification is `conv2d(x, weight, bias, padding=1)`.

    Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks" (2015): with 6x6 input tiles
    d, the 4x4 outputs are `A^T [(G g G^T) ⊙ (B^T d B)] A`.
    """
    batch, channels, height, width = x.shape
    out_channels = packed_weight.shape[1] * 32
    if batch * height * width * out_channels == 0:
        return x.new_empty(batch, out_channels, height, width)
    inverse, _, inputs = (m.to(x.dtype) for m in cook_toom_tensors(4, x))
    tall, wide = -(-height // 4), -(-width // 4)
    padded = torch.nn.functional.pad(x, (1, 4 * wide - width + 1, 1, 4 * tall - height + 1))
    tiles = padded.unfold(2, 6, 4).unfold(3, 6, 4)  # [B, C, tall, wide, 6, 6]
    points = (inputs @ tiles @ inputs.T).permute(4, 5, 0, 2, 3, 1).reshape(36, -1, channels)
    kernels = packed_weight.transpose(1, 2).reshape(36, channels, -1)
    products = (points @ kernels).reshape(6, 6, batch, tall, wide, -1).permute(2, 5, 3, 4, 0, 1)
    y = (inverse @ products @ inverse.T).transpose(3, 4).reshape(batch, -1, 4 * tall, 4 * wide)
    y = y[:, :, :height, :width]
    if bias is not None:
        y = y + bias.view(-1, 1, 1)
    if residual is not None:
        y = y + residual
    return y.contiguous(memory_format=torch.channels_last)


def check_winograd_weight(weight: Tensor) -> None:
    """Raises RuntimeError unless `weight` can be packed for `winograd_conv3x3`."""
    op = "winograd_pack"
    check_rank(op, "weight", weight, 4, "[Cout, Cin, 3, 3]")
    check_float32(op, "weight", weight)
    out_channels, in_channels, height, width = weight.shape
    torch._check(
        out_channels % 32 == 0 and in_channels % 16 == 0 and height == 3 and width == 3,
        lambda: (
            f"{op}: weight must have shape [Cout, Cin, 3, 3] with Cout a multiple of 32 and Cin of "
            f"16, got {list(weight.shape)}"
        ),
    )
    torch._check(
        in_channels > 0,
        lambda: f"{op}: weight must have input channels, got {list(weight.shape)}",
    )


def check_winograd(
    x: Tensor, packed_weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> None:
    """Raises RuntimeError unless the arguments of `winograd_conv3x3` fit each other."""
    op = "winograd_conv3x3"
    check_rank(op, "x", x, 4, "[B, Cin, H, W]")
    check_float32(op, "x", x)
    check_rank(op, "packed_weight", packed_weight, 4, "[36, Cout/32, Cin, 32]")
    check_float32(op, "packed_weight", packed_weight)
    check_device(op, "packed_weight", packed_weight, "x", x)
    points, panels, in_channels, lanes = packed_weight.shape
    torch._check(
        points == 36 and lanes == 32,
        lambda: _packed_message(op, x, packed_weight),
    )
    torch._check(in_channels == x.shape[1], lambda: _packed_message(op, x, packed_weight))
    # The kernels take input channels by the vector.
    torch._check(
        in_channels > 0 and in_channels % 16 == 0,
        lambda: f"{op}: x must have a positive multiple of 16 channels, got {in_channels}",
    )
    wanted = [x.shape[0], panels * 32, x.shape[2], x.shape[3]]
    for argument, tensor, shape in (("bias", bias, wanted[1:2]), ("residual", residual, wanted)):
        if tensor is not None:
            check_float32(op, argument, tensor)
            check_device(op, argument, tensor, "x", x)
            torch._check(
                list(tensor.shape) == shape,
                lambda: f"{op}: {argument} must have shape {shape}, got {list(tensor.shape)}",  # noqa: B023
            )


def _packed_message(op: str, x: Tensor, packed_weight: Tensor) -> str:
    return (
        f"{op}: packed_weight must have shape [36, Cout/32, Cin, 32] for x {list(x.shape)}, "
        f"got {list(packed_weight.shape)}"
    )


register(
    "winograd_pack(Tensor weight) -> Tensor",
    check_winograd_weight,
    eager=winograd_pack_reference,
    example=lambda device: (example_tensor(device, 32, 16, 3, 3, dtype=torch.float32),),
)
register(
    "winograd_conv3x3(Tensor x, Tensor packed_weight, Tensor? bias=None, Tensor? residual=None) "
    "-> Tensor",
    check_winograd,
    eager=winograd_conv3x3_reference,
    example=lambda device: tuple(
        example_tensor(device, *shape, dtype=torch.float32)
        for shape in ((1, 16, 5, 4), (36, 1, 16, 32), (32,), (1, 32, 5, 4))
    ),
)


@torch.library.register_fake("cosmos3::winograd_pack")
def _(weight: Tensor) -> Tensor:
    check_winograd_weight(weight)
    return weight.new_empty(36, weight.shape[0] // 32, weight.shape[1], 32)


@torch.library.register_fake("cosmos3::winograd_conv3x3")
def _(
    x: Tensor, packed_weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    check_winograd(x, packed_weight, bias, residual)
    batch, _, height, width = x.shape
    return torch.empty(
        (batch, packed_weight.shape[1] * 32, height, width),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )


for _op in ("winograd_pack", "winograd_conv3x3"):
    refuse_autograd(_op, "no argument may require a gradient; use conv2d")
