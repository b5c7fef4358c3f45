"""The encoder's own ops: norm and SiLU, pixel packing, Winograd convolution."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cosmos3_fast import ops
from cosmos3_fast.ops import registry
from cosmos3_fast.ops.rms_norm_silu import rms_norm_silu_reference
from cosmos3_fast.ops.winograd import winograd_pack_reference
from cosmos3_fast.vae.layers import Conv3x3

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OPS = torch.ops.cosmos3


def backends_of(op: str) -> list[str]:
    return [b for b in registry.BACKENDS if registry.backend_error(b, "cpu", op) is None]


def image(*shape: int, dtype: torch.dtype = torch.float32, layout: str = "contiguous") -> Tensor:
    b, c, h, w = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def randn(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype)

    match layout:
        case "contiguous":
            return randn(b, c, h, w)
        case "channels_last":
            return randn(b, h, w, c).permute(0, 3, 1, 2)
        case "sliced":
            return randn(b, h + 1, w + 2, c + 3).permute(0, 3, 1, 2)[:, 2 : c + 2, 1:, :w]
        case "expanded":
            return randn(b, c, 1, w).expand(b, c, h, w)
    raise ValueError(layout)


LAYOUTS = ("contiguous", "channels_last", "sliced", "expanded")
# Channel counts on both sides of every vector width, and the encoder's own.
CHANNELS = (1, 3, 15, 16, 17, 31, 48, 160, 640)


def exact_norm(x: Tensor, weight: Tensor | None, silu: bool) -> Tensor:
    """The VAE's expression (diffusers' WanRMS_norm, then SiLU) in float64."""
    y = F.normalize(x.double(), dim=1)
    if weight is not None:
        y = y * x.shape[1] ** 0.5 * weight.double().view(-1, 1, 1)
    return F.silu(y) if silu else y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", registry.BACKENDS)
def test_norm_equals_the_vae_s(backend: str, layout: str, dtype: torch.dtype, poison: None):
    if (error := registry.backend_error(backend, "cpu", "rms_norm_silu")) is not None:
        pytest.skip(error)
    for channels in CHANNELS:
        x = 3 * image(2, channels, 3, 5, dtype=dtype, layout=layout)
        weight = image(1, channels, 1, 1).flatten()
        for w, silu in ((weight, True), (weight.to(dtype), False), (None, True), (None, False)):
            got = ops.rms_norm_silu(x, w, silu, backend=backend)
            wanted = exact_norm(x, w, silu)
            assert got.dtype == dtype
            assert got.is_contiguous(memory_format=torch.channels_last)
            # One rounding to the dtype (half a unit, a whole one where Triton's interpreter
            # truncates), and a few units of float32 arithmetic.
            truncates = backend == "triton" and dtype == torch.bfloat16
            rounding = torch.finfo(dtype).eps * (1.0 if truncates else 0.5)
            arithmetic = 8 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
            bound = (rounding + arithmetic) * wanted.abs() + arithmetic
            assert ((got.double() - wanted).abs() <= bound).all()


@pytest.mark.parametrize("backend", backends_of("rms_norm_silu"))
def test_norm_of_extremes(backend: str, poison: None):
    x = torch.zeros(1, 32, 1, 6)
    x[0, :, 0, 1] = 1e-30  # below the clamp
    x[0, :, 0, 2] = 1e15
    x[0, 0, 0, 3] = -1e15  # SiLU far on its flat side
    x[0, :, 0, 4] = float("nan")
    x[0, :, 0, 5] = -3.0
    weight = torch.full((32,), 40.0)
    got = ops.rms_norm_silu(x, weight, True, backend=backend)
    wanted = exact_norm(x, weight, True)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-30, equal_nan=True)
    assert (got[0, :, 0, 0] == 0).all()
    assert got[0, :, 0, 4].isnan().all()


@pytest.mark.parametrize("shape", [(0, 3, 2, 2), (2, 0, 2, 2), (2, 3, 0, 2)])
def test_norm_without_elements(shape: tuple[int, ...]):
    x = torch.empty(shape)
    for backend in (None, *backends_of("rms_norm_silu")):
        assert ops.rms_norm_silu(x, torch.ones(shape[1]), backend=backend).shape == shape


def test_norm_gradients():
    for weight in (image(1, 6, 1, 1, dtype=torch.float64).flatten().requires_grad_(), None):
        for silu in (True, False):
            x = image(2, 6, 3, 2, dtype=torch.float64).requires_grad_()
            assert torch.autograd.gradcheck(
                lambda a, b, s=silu: OPS.rms_norm_silu(a, b, s), (x, weight)
            )
            assert torch.autograd.gradgradcheck(
                lambda a, b, s=silu: OPS.rms_norm_silu(a, b, s), (x, weight), fast_mode=True
            )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_norm(layout: str, dtype: torch.dtype):
    x, weight = image(2, 20, 3, 4, dtype=dtype, layout=layout), torch.rand(20)
    torch.library.opcheck(OPS.rms_norm_silu.default, (x, weight, True))
    torch.library.opcheck(OPS.rms_norm_silu.default, (x, None, False))
    if dtype.itemsize > 2:
        leaves = (x.detach().requires_grad_(), weight.requires_grad_(), True)
        torch.library.opcheck(OPS.rms_norm_silu.default, leaves)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_norm_properties(data: st.DataObject):
    shape = [data.draw(st.integers(0, limit)) for limit in (2, 70, 4, 5)]
    x = image(*shape, layout=data.draw(st.sampled_from(LAYOUTS)))
    weight = data.draw(st.sampled_from([None, torch.rand(shape[1])]))
    silu = data.draw(st.booleans())
    got, wanted = OPS.rms_norm_silu(x, weight, silu), rms_norm_silu_reference(x, weight, silu)
    torch.testing.assert_close(got, wanted, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("backend", registry.BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("patch_size", [1, 2, 3])
def test_bytes_are_packed_as_the_engines_normalise_them(
    patch_size: int, dtype: torch.dtype, backend: str, poison: None
):
    if (error := registry.backend_error(backend, "cpu", "pack_pixels")) is not None:
        pytest.skip(error)
    if backend == "triton" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter truncates where the kernel rounds")
    every_byte = torch.arange(256, dtype=torch.uint8).repeat(27).view(1, 48, 48, 3)
    for pixels in (every_byte, every_byte[:, 6:-6, ::2], every_byte.transpose(1, 2)):
        normalised = 2.0 * (pixels.permute(0, 3, 1, 2).to(torch.float32) / 255.0) - 1.0
        wanted = F.pixel_unshuffle(normalised.to(dtype), patch_size)
        got = ops.pack_pixels(pixels, patch_size, dtype, backend=backend)
        assert torch.equal(got, wanted)
        assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", registry.BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("source", DTYPES)
def test_floats_are_packed(layout: str, source: torch.dtype, backend: str, poison: None):
    if (error := registry.backend_error(backend, "cpu", "pack_pixels")) is not None:
        pytest.skip(error)
    pixels = image(2, 3, 6, 12, dtype=source, layout=layout)
    for dtype in DTYPES:
        if backend == "triton" and dtype == torch.bfloat16 and source != torch.bfloat16:
            continue  # Triton's interpreter truncates where the kernel rounds
        wanted = F.pixel_unshuffle(pixels.to(dtype), 2)
        assert torch.equal(ops.pack_pixels(pixels, 2, dtype, backend=backend), wanted)


def test_pack_without_elements():
    for backend in (None, *backends_of("pack_pixels")):
        packed = ops.pack_pixels(torch.empty(0, 3, 4, 4), 2, torch.float32, backend=backend)
        assert packed.shape == (0, 12, 2, 2)


def test_pack_gradients_and_opcheck():
    pixels = image(1, 3, 4, 6, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: OPS.pack_pixels(p, 2, torch.float64), (pixels,))
    torch.library.opcheck(OPS.pack_pixels.default, (pixels, 2, torch.float64))
    for dtype in DTYPES:
        torch.library.opcheck(
            OPS.pack_pixels.default, (torch.zeros(1, 4, 6, 3, dtype=torch.uint8), 2, dtype)
        )
        torch.library.opcheck(OPS.pack_pixels.default, (image(1, 3, 4, 6).to(dtype), 2, torch.half))


CONVOLUTIONS = [
    (1, 16, 32, 4, 4),
    (1, 16, 64, 1, 1),
    (2, 32, 32, 5, 7),  # tiles cut off at the right and below
    (3, 48, 96, 9, 2),
    (1, 160, 160, 13, 21),
    (1, 640, 640, 30, 52),
]


def convolution(
    batch: int, channels: int, out: int, height: int, width: int, layout: str = "channels_last"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = image(batch, channels, height, width, layout=layout)
    weight = image(out, channels, 3, 3) / (9 * channels) ** 0.5
    return x, weight, image(1, out, 1, 1).flatten(), image(batch, out, height, width, layout=layout)


@pytest.mark.parametrize("backend", ["cpp", "eager"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", CONVOLUTIONS)
def test_winograd_equals_convolution(
    shape: tuple[int, int, int, int, int], layout: str, backend: str, poison: None
):
    if (error := registry.backend_error(backend, "cpu", "winograd_conv3x3")) is not None:
        pytest.skip(error)
    x, weight, bias, residual = convolution(*shape, layout=layout)
    packed = ops.winograd_pack(weight, backend=backend)
    convolved = F.conv2d(x.double(), weight.double(), padding=1)
    for b, r in ((bias, residual), (None, residual), (bias, None), (None, None)):
        got = ops.winograd_conv3x3(x, packed, b, r, backend=backend)
        wanted = convolved if b is None else convolved + b.double().view(-1, 1, 1)
        wanted = wanted if r is None else wanted + r.double()
        assert got.is_contiguous(memory_format=torch.channels_last)
        # Inputs and outputs pass through transforms whose entries reach 27/8 and whose rows sum
        # to up to 7.3, on top of the 9 Cin products' own float32 rounding: 1e-5 of the largest
        # output was measured at 640 channels.
        assert (got.double() - wanted).abs().max() <= 2e-5 * wanted.abs().max()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3), st.sampled_from([16, 48]), st.sampled_from([32, 64]),
    st.integers(1, 14), st.integers(1, 14), st.sampled_from(LAYOUTS),
)  # fmt: skip
def test_winograd_properties(batch, channels, out, height, width, layout):
    x, weight, bias, residual = convolution(batch, channels, out, height, width, layout)
    got = OPS.winograd_conv3x3(x, OPS.winograd_pack(weight), bias, residual)
    wanted = F.conv2d(x.double(), weight.double(), bias.double(), padding=1) + residual.double()
    assert (got.double() - wanted).abs().max() <= 2e-5 * wanted.abs().max()


def test_winograd_pack_equals_its_reference():
    _, weight, _, _ = convolution(1, 48, 64, 1, 1)
    torch.testing.assert_close(OPS.winograd_pack(weight), winograd_pack_reference(weight))
    strided = weight.flip(3)[:, :, :, ::1].transpose(2, 3)
    torch.testing.assert_close(OPS.winograd_pack(strided), winograd_pack_reference(strided))


def test_winograd_opcheck_and_empty():
    x, weight, bias, residual = convolution(1, 16, 32, 5, 6)
    packed = OPS.winograd_pack(weight)
    torch.library.opcheck(OPS.winograd_pack.default, (weight,))
    torch.library.opcheck(OPS.winograd_conv3x3.default, (x, packed, bias, residual))
    torch.library.opcheck(OPS.winograd_conv3x3.default, (x, packed))
    assert OPS.winograd_conv3x3(x[:0], packed).shape == (0, 32, 5, 6)


def test_winograd_refuses_gradients():
    x, weight, _, _ = convolution(1, 16, 32, 5, 6)
    with pytest.raises(RuntimeError, match="winograd_conv3x3: no argument may require a gradient"):
        OPS.winograd_conv3x3(x.requires_grad_(), OPS.winograd_pack(weight))


def test_compiled_in_one_graph():
    def encode(pixels: Tensor, weight: Tensor) -> Tensor:
        packed = torch.ops.cosmos3.pack_pixels(pixels, 2, torch.float32)
        return torch.ops.cosmos3.rms_norm_silu(packed, weight) * 2

    weight = torch.rand(12)
    compiled = torch.compile(encode, fullgraph=True, dynamic=True)
    for height, width in ((4, 6), (8, 10), (12, 6)):
        pixels = torch.randint(0, 256, (1, height, width, 3), dtype=torch.uint8)
        torch.testing.assert_close(compiled(pixels, weight), encode(pixels, weight), rtol=0, atol=0)


@pytest.fixture
def conv() -> Conv3x3:
    torch.manual_seed(0)
    return Conv3x3(16, 32).requires_grad_(False)


def large() -> Tensor:
    return image(1, 16, 64, 64, layout="channels_last")


needs_library = pytest.mark.skipif(
    ("winograd_conv3x3", "cpu") not in registry.LIBRARY_KERNELS, reason="no compiled library"
)


def assert_convolves(conv: Conv3x3, x: Tensor) -> None:
    wanted = F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)
    assert (conv(x).double() - wanted).abs().max() <= 2e-5 * wanted.abs().max()


@needs_library
def test_conv_packs_once_and_again_after_a_change(conv: Conv3x3):
    assert_convolves(conv, large())
    packed = conv._packed
    conv(large())
    assert conv._packed is packed
    with torch.no_grad():
        conv.weight.mul_(2)
    assert_convolves(conv, large())
    conv.load_state_dict({k: v + 1 for k, v in conv.state_dict().items()})
    assert_convolves(conv, large())
    conv.load_state_dict({k: v - 3 for k, v in conv.state_dict().items()}, assign=True)
    assert_convolves(conv, large())


@needs_library
def test_conv_copies_do_not_share_packed_weights(conv: Conv3x3):
    conv(large())
    for twin in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):
        with torch.no_grad():
            twin.weight.add_(1)
        assert_convolves(twin, large())
        assert_convolves(conv, large())
    assert "packed" not in " ".join(conv.state_dict())
    assert conv.to(torch.bfloat16)._packed is None


@needs_library
def test_conv_takes_winograd_only_where_it_serves(conv: Conv3x3):
    conv(image(1, 16, 8, 8))  # too few tiles
    conv.to(torch.bfloat16)(large().bfloat16())
    conv.to(torch.float32)(large().requires_grad_()).sum().backward()
    Conv3x3(12, 32).requires_grad_(False)(image(1, 12, 64, 64))
    assert conv._packed is None
    torch.compile(conv, backend="eager", fullgraph=True)(large())
    assert conv._packed is None
    with torch.inference_mode():
        conv(large())
    assert conv._packed is not None
