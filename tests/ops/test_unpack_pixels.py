"""`cosmos3::unpack_pixels`: floats and bytes of an image from its patches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from op_inputs import DTYPES
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cosmos3_fast import ops
from cosmos3_fast.ops import registry

OP = torch.ops.cosmos3.unpack_pixels
LAYOUTS = ("channels_last", "contiguous", "sliced", "expanded", "stepped")


def patches(
    batch: int, patch_size: int, rows: int, columns: int, dtype: torch.dtype, layout: str
) -> Tensor:
    """Random values of which about a third lie outside [-1, 1]."""
    channels = 3 * patch_size**2
    generator = torch.Generator().manual_seed(channels + rows)

    def randn(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype)

    match layout:
        case "channels_last":
            return randn(batch, rows, columns, channels).permute(0, 3, 1, 2)
        case "contiguous":
            return randn(batch, channels, rows, columns)
        case "sliced":
            large = randn(batch, rows + 1, columns + 2, channels + 3).permute(0, 3, 1, 2)
            return large[:, 2 : channels + 2, 1:, :columns]
        case "expanded":
            return randn(batch, channels, 1, columns).expand(-1, -1, rows, -1)
        case "stepped":
            return randn(batch, channels, 2 * rows, 2 * columns + 1)[:, :, ::2, 1::2]
    raise ValueError(layout)


def on(x: Tensor, device: str) -> Tensor:
    """`x` on a device with its strides and offset, which `Tensor.to` may drop."""
    size = x.untyped_storage().nbytes() // x.element_size()
    storage = x.as_strided((size,), (1,), 0).to(device)
    return storage.as_strided(x.shape, x.stride(), x.storage_offset())


def skip_unless_served(backend: str, device: str) -> None:
    if (error := registry.backend_error(backend, device, "unpack_pixels")) is not None:
        pytest.skip(error)


def bytes_of(x: Tensor, patch_size: int) -> Tensor:
    """round(255 (x / 2 + 1/2)) of the clamped image, in float32."""
    pixels = F.pixel_shuffle(x.to(torch.float32).clamp(-1, 1), patch_size).permute(0, 2, 3, 1)
    return (255 * (pixels / 2 + 0.5)).round().to(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", registry.BACKENDS)
def test_equals_shuffle_and_clamp(
    backend: str, layout: str, dtype: torch.dtype, device: str, poison: None
):
    skip_unless_served(backend, device)
    for shape in ((2, 1, 3, 5), (1, 2, 4, 7), (3, 2, 1, 1), (1, 3, 2, 33)):
        x = on(patches(*shape, dtype, layout), device)
        got = ops.unpack_pixels(x, shape[1], backend=backend)
        assert got.dtype == dtype
        assert got.is_contiguous()
        assert torch.equal(got, F.pixel_shuffle(x, shape[1]).clamp(-1, 1))
        got = ops.unpack_pixels(x, shape[1], True, backend=backend)
        assert got.is_contiguous()
        assert torch.equal(got, bytes_of(x, shape[1]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", registry.BACKENDS)
def test_of_extremes(backend: str, dtype: torch.dtype, device: str):
    skip_unless_served(backend, device)
    inf, nan = float("inf"), float("nan")
    values = torch.tensor([-inf, -1.5, -1.0, -0.0, 1.0, 1.5, inf, nan], dtype=dtype, device=device)
    x = values.view(1, 1, 1, 8).expand(1, 3, 1, 8)
    floats = ops.unpack_pixels(x, 1, backend=backend)[0, 2, 0]
    wanted = torch.tensor([-1, -1, -1, -0.0, 1, 1, 1, nan], dtype=dtype, device=device)
    torch.testing.assert_close(floats, wanted, rtol=0, atol=0, equal_nan=True)
    got = ops.unpack_pixels(x, 1, True, backend=backend)[0, 0, :, 1]
    # 127.5 is rounded to the even neighbour; a NaN is black.
    assert got.tolist() == [0, 0, 0, 128, 255, 255, 255, 0]


@pytest.mark.parametrize("backend", registry.BACKENDS)
def test_every_byte_survives_the_round_trip(backend: str, device: str):
    skip_unless_served(backend, device)
    image = torch.arange(256, dtype=torch.uint8, device=device).repeat(27).view(1, 48, 48, 3)
    for patch_size in (1, 2, 3):
        packed = ops.pack_pixels(image, patch_size, torch.float32)
        assert torch.equal(ops.unpack_pixels(packed, patch_size, True, backend=backend), image)


def test_without_elements(device: str):
    for shape in ((0, 12, 2, 3), (2, 12, 0, 3), (2, 12, 2, 0)):
        for backend in (None, *registry.BACKENDS):
            if backend and registry.backend_error(backend, device, "unpack_pixels"):
                continue
            x = torch.empty(shape, device=device)
            batch, _, rows, columns = shape
            got = ops.unpack_pixels(x, 2, backend=backend)
            assert got.shape == (batch, 3, 2 * rows, 2 * columns)
            got = ops.unpack_pixels(x, 2, True, backend=backend)
            assert got.shape == (batch, 2 * rows, 2 * columns, 3)


def test_gradients(device: str):
    # Away from the limits, where the clamp has a kink.
    x = patches(1, 2, 2, 3, torch.float64, "channels_last").to(device)
    x = torch.where((x.abs() - 1).abs() < 0.01, 0.5, x).requires_grad_()
    assert (x.abs() > 1).any()
    assert torch.autograd.gradcheck(lambda a: OP(a, 2), (x,))
    assert torch.autograd.gradgradcheck(lambda a: OP(a, 2), (x,))
    assert not OP(x, 2, True).requires_grad
    limits = torch.tensor([-1.0, 1.0, 1.5], device=device).view(1, 3, 1, 1).requires_grad_()
    OP(limits, 1).sum().backward()
    assert limits.grad is not None
    assert limits.grad.flatten().tolist() == [1, 1, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout: str, dtype: torch.dtype, device: str):
    x = on(patches(2, 2, 3, 4, dtype, layout), device)
    for as_bytes in (False, True):
        torch.library.opcheck(OP.default, (x, 2, as_bytes))
    torch.library.opcheck(OP.default, (x.detach().requires_grad_(), 2, False))


def test_compiled_in_one_graph_for_every_size(device: str):
    def image(x: Tensor) -> tuple[Tensor, Tensor]:
        return OP(2 * x, 2), OP(2 * x, 2, True)

    compiled = torch.compile(image, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows, columns in ((2, 3), (5, 4), (3, 9)):
        x = patches(2, 2, rows, columns, torch.float32, "channels_last").to(device)
        for got, wanted in zip(compiled(x), image(x), strict=True):
            assert torch.equal(got, wanted)


def call(
    shape: tuple[int, ...] = (1, 12, 4, 4),
    dtype: torch.dtype = torch.float32,
    patch_size: int = 2,
) -> Callable[[], tuple[Any, ...]]:
    return lambda: (torch.zeros(shape, dtype=dtype), patch_size, False)


FAULTS = {
    "rank": (call((12, 4, 4)), "x must have shape [B, 3·p², h, w], got [12, 4, 4]"),
    "dtype": (
        call(dtype=torch.uint8),
        "x must be float32, bfloat16, float16 or float64, got torch.uint8",
    ),
    "patch size": (call(patch_size=0), "patch_size must be in 1 … 32768, got 0"),
    "large patch size": (
        call(patch_size=1 << 62),
        f"patch_size must be in 1 … 32768, got {1 << 62}",
    ),
    "channels": (
        call((1, 3, 4, 4)),
        "x must have 3·patch_size² = 12 channels, got [1, 3, 4, 4]",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("backend", [None, *registry.BACKENDS])
def test_each_backend_says_the_same(fault: str, backend: str | None, device: str):
    if backend is not None:
        skip_unless_served(backend, device)
    arguments, message = FAULTS[fault]
    x, *rest = arguments()
    with pytest.raises(RuntimeError) as raised:
        ops.unpack_pixels(x.to(device), *rest, backend=backend)
    assert str(raised.value) == f"unpack_pixels: {message}"


@pytest.mark.parametrize("fault", FAULTS)
def test_the_fake_says_the_same(fault: str, device: str):
    arguments, message = FAULTS[fault]
    x, *rest = arguments()
    with FakeTensorMode(), pytest.raises(RuntimeError) as raised:
        OP(torch.empty(x.shape, dtype=x.dtype, device=device), *rest)
    assert str(raised.value) == f"unpack_pixels: {message}"
