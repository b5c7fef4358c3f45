"""`cosmos3::rms_norm_silu`, `add_rms_norm_silu` and `add_pad` against the VAE's sums, norm and SiLU
in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from op_inputs import DTYPES, IMAGE_LAYOUTS, image
from torch import Tensor

from cosmos3_fast import ops
from cosmos3_fast.ops import registry
from cosmos3_fast.ops.rms_norm_silu import (
    add_pad_reference,
    add_rms_norm_silu_reference,
    rms_norm_silu_reference,
)
from cosmos3_fast.vae.networks.layers import average_shortcut

OPS = torch.ops.cosmos3


@pytest.fixture(params=registry.BACKENDS)
def backend(request: pytest.FixtureRequest, device: str) -> str:
    error = registry.backend_error(request.param, device, "rms_norm_silu")
    if error:
        pytest.skip(error)
    return request.param


# Channel counts on both sides of every vector width, and the encoder's own.
CHANNELS = (1, 3, 15, 16, 17, 31, 48, 160, 640)


def exact_norm(x: Tensor, weight: Tensor | None, silu: bool) -> Tensor:
    """The VAE's expression (diffusers' WanRMS_norm, then SiLU) in float64."""
    y = F.normalize(x.double(), dim=1)
    if weight is not None:
        y = y * x.shape[1] ** 0.5 * weight.double().view(-1, 1, 1)
    return F.silu(y) if silu else y


def bounds(wanted: Tensor, dtype: torch.dtype, backend: str, device: str) -> Tensor:
    """One rounding to the dtype (half a unit, a whole one where Triton's interpreter truncates),
    and a few units of float32 arithmetic."""
    truncates = (backend, device, dtype) == ("triton", "cpu", torch.bfloat16)
    rounding = torch.finfo(dtype).eps * (1.0 if truncates else 0.5)
    arithmetic = 8 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    return (rounding + arithmetic) * wanted.abs() + arithmetic


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", IMAGE_LAYOUTS)
def test_norm_equals_the_vae_s(
    layout: str, dtype: torch.dtype, backend: str, device: str, poison: None
):
    for channels in CHANNELS:
        x = 3 * image(2, channels, 3, 5, dtype=dtype, layout=layout, device=device)
        weight = image(1, channels, 1, 1, device=device).flatten()
        for w, silu in ((weight, True), (weight.to(dtype), False), (None, True), (None, False)):
            got = ops.rms_norm_silu(x, w, silu, backend=backend)
            wanted = exact_norm(x, w, silu)
            assert got.dtype == dtype
            assert got.is_contiguous(memory_format=torch.channels_last)
            bound = bounds(wanted, dtype, backend, device)
            assert ((got.double() - wanted).abs() <= bound).all()


# (channels, t, s of the residual), on both sides of every vector width, and the encoder's own.
AVERAGES = ((3, 1, 1), (16, 1, 2), (34, 2, 1), (160, 1, 1), (640, 2, 2), (6, 3, 3))


@pytest.mark.parametrize(("layout", "dtype"), [*zip(IMAGE_LAYOUTS, DTYPES, strict=True)])
def test_sums_are_the_vae_s(
    layout: str, dtype: torch.dtype, backend: str, device: str, poison: None
):
    for channels, t, s in AVERAGES:
        x = 3 * image(2, channels, 3, 5, dtype=dtype, layout=layout, device=device)
        weight, bias = image(2, channels, 1, 1, device=device).flatten(1)
        shape = (2, channels // t, 3 * s, 5 * s)
        residual = image(*shape, dtype=dtype, layout=layout, device=device)
        average = average_shortcut(residual.double(), channels, t, s)
        biased = bias.double().view(-1, 1, 1)
        for b, r, total in (
            (bias.to(dtype), None, x.double() + biased.to(dtype).double()),
            (None, residual, x.double() + average),
            (bias, residual, x.double() + biased + average),
        ):
            activated = exact_norm(total, weight, True)
            padded = F.pad(total, (0, 1, 0, 1))
            both = ops.add_rms_norm_silu(x, weight, True, b, r, backend=backend)
            for got, wanted in (
                (ops.rms_norm_silu(x, weight, True, b, r, backend=backend), activated),
                (both[0], total),
                (both[1], activated),
                (ops.add_pad(x, b, r, backend=backend), padded),
                (ops.add_pad(x, b, r, False, backend=backend), total),
            ):
                assert got.dtype == dtype
                assert got.shape == wanted.shape
                assert got.is_contiguous(memory_format=torch.channels_last)
                bound = bounds(wanted, dtype, backend, device)
                assert ((got.double() - wanted).abs() <= bound).all()
            assert torch.equal(both[1], ops.rms_norm_silu(x, weight, True, b, r, backend=backend))


def test_results_are_no_views(device: str):
    x = image(2, 16, 3, 5, layout="channels_last", device=device)
    for op in (OPS.add_rms_norm_silu, ops.add_rms_norm_silu):
        assert op(x, None)[0].data_ptr() != x.data_ptr()
    assert OPS.add_pad(x, pad=False).data_ptr() != x.data_ptr()
    torch.testing.assert_close(OPS.add_pad(x, pad=False), x, rtol=0, atol=0)


def test_norm_of_extremes(backend: str, device: str, poison: None):
    x = torch.zeros(1, 32, 1, 6, device=device)
    x[0, :, 0, 1] = 1e-30  # below the clamp
    x[0, :, 0, 2] = 1e15
    x[0, 0, 0, 3] = -1e15  # SiLU far on its flat side
    x[0, :, 0, 4] = float("nan")
    x[0, :, 0, 5] = -3.0
    weight = torch.full((32,), 40.0, device=device)
    got = ops.rms_norm_silu(x, weight, True, backend=backend)
    wanted = exact_norm(x, weight, True)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-30, equal_nan=True)
    assert (got[0, :, 0, 0] == 0).all()
    assert got[0, :, 0, 4].isnan().all()


@pytest.mark.parametrize("shape", [(0, 3, 2, 2), (2, 0, 2, 2), (2, 3, 0, 2)])
def test_norm_without_elements(shape: tuple[int, ...], backend: str, device: str):
    x, weight = torch.empty(shape, device=device), torch.ones(shape[1], device=device)
    assert ops.rms_norm_silu(x, weight, backend=backend).shape == shape
    assert OPS.rms_norm_silu(x, weight).shape == shape
    for residual in (x, x.repeat(1, 1, 2, 2)):
        for each in ops.add_rms_norm_silu(x, weight, True, weight, residual, backend=backend):
            assert each.shape == shape
        got = ops.add_pad(x, weight, residual, backend=backend)
        assert got.shape == (*shape[:2], shape[2] + 1, shape[3] + 1)
        assert not got.any()


def leaves(t: int, s: int, device: str) -> list[Tensor]:
    """x, weight, bias and residual in float64, with gradients."""
    shapes = ((2, 6, 3, 2), (6, 1, 1, 1), (6, 1, 1, 2), (2, 6 // t, 3 * s, 2 * s))
    made = [image(*shape, dtype=torch.float64, device=device) for shape in shapes]
    made[1:3] = made[1].flatten(), made[2][..., 1].flatten()
    return [each.detach().requires_grad_() for each in made]


@pytest.mark.parametrize(("t", "s"), [(1, 1), (2, 2), (3, 1), (1, 3)])
def test_gradients_of_sums(t: int, s: int, device: str):
    x, weight, bias, residual = leaves(t, s, device)
    for op, arguments in (
        (lambda *a: OPS.rms_norm_silu(*a[:2], True, *a[2:]), (x, weight, bias, residual)),
        (lambda *a: OPS.add_rms_norm_silu(*a[:2], True, *a[2:]), (x, weight, bias, residual)),
        (lambda a, r: OPS.add_rms_norm_silu(a, None, False, None, r), (x, residual)),
        (OPS.add_pad, (x, bias, residual)),
        (lambda a, r: OPS.add_pad(a, None, r, False), (x, residual)),
    ):
        assert torch.autograd.gradcheck(op, arguments, fast_mode=True)
        assert torch.autograd.gradgradcheck(op, arguments, fast_mode=True)


def test_norm_gradients(device: str):
    scales = image(1, 6, 1, 1, dtype=torch.float64, device=device).flatten().requires_grad_()
    for weight in (scales, None):
        for silu in (True, False):
            x = image(2, 6, 3, 2, dtype=torch.float64, device=device).requires_grad_()
            assert torch.autograd.gradcheck(
                lambda a, b, s=silu: OPS.rms_norm_silu(a, b, s), (x, weight)
            )
            assert torch.autograd.gradgradcheck(
                lambda a, b, s=silu: OPS.rms_norm_silu(a, b, s), (x, weight), fast_mode=True
            )


@pytest.mark.parametrize(
    ("layout", "dtype"),
    # Layouts and dtypes are checked apart in the op: each of both, not their product.
    [*zip(IMAGE_LAYOUTS, DTYPES, strict=True), *((x, torch.float32) for x in IMAGE_LAYOUTS[1:])],
)
def test_opcheck_norm(layout: str, dtype: torch.dtype, device: str):
    x = image(2, 20, 3, 4, dtype=dtype, layout=layout, device=device)
    weight = torch.rand(20, device=device)
    torch.library.opcheck(OPS.rms_norm_silu.default, (x, weight, True))
    torch.library.opcheck(OPS.rms_norm_silu.default, (x, None, False))
    if dtype.itemsize > 2:
        leaves = (x.detach().requires_grad_(), weight.requires_grad_(), True)
        torch.library.opcheck(OPS.rms_norm_silu.default, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_sums(dtype: torch.dtype, device: str):
    x = image(2, 20, 3, 4, dtype=dtype, device=device)
    weight, bias = torch.rand(2, 20, device=device)
    residual = image(2, 10, 6, 8, dtype=dtype, device=device)
    for op, arguments in (
        (OPS.rms_norm_silu.default, (x, weight, True, bias, residual)),
        (OPS.add_rms_norm_silu.default, (x, weight, True, bias, x)),
        (OPS.add_pad.default, (x, bias, residual, True)),
    ):
        torch.library.opcheck(op, arguments)
    tracked = [a.detach().requires_grad_() for a in (x, bias, residual)]
    torch.library.opcheck(OPS.add_pad.default, tuple(tracked))


def test_sums_are_compiled_for_sizes_that_vary(device: str):
    def block(x: Tensor, residual: Tensor, bias: Tensor) -> Tensor:
        total, activated = ops.add_rms_norm_silu(x, bias, True, bias, residual)
        return ops.add_pad(activated, None, total)

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    bias = torch.rand(8, device=device)
    for height, width in ((3, 5), (4, 7), (6, 2)):
        x = image(1, 8, height, width, device=device)
        residual = image(1, 4, 2 * height, 2 * width, device=device)
        assert torch.equal(compiled(x, residual, bias), block(x, residual, bias))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_norm_properties(data: st.DataObject):
    shape = [data.draw(st.integers(0, limit)) for limit in (2, 70, 4, 5)]
    x = image(*shape, layout=data.draw(st.sampled_from(IMAGE_LAYOUTS)))
    weight = data.draw(st.sampled_from([None, torch.rand(shape[1])]))
    silu = data.draw(st.booleans())
    got, wanted = OPS.rms_norm_silu(x, weight, silu), rms_norm_silu_reference(x, weight, silu)
    torch.testing.assert_close(got, wanted, rtol=2e-6, atol=2e-6)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_sum_properties(data: st.DataObject):
    t, s = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    batch, few, height, width = (data.draw(st.integers(0, limit)) for limit in (2, 30, 4, 5))
    layouts = st.sampled_from(IMAGE_LAYOUTS)
    x = image(batch, few * t, height, width, layout=data.draw(layouts))
    residual = image(batch, few, height * s, width * s, layout=data.draw(layouts))
    weight, bias = torch.rand(2, few * t)
    r = data.draw(st.sampled_from([None, residual]))
    b = data.draw(st.sampled_from([None, bias]))
    total, activated = OPS.add_rms_norm_silu(x, weight, True, b, r)
    wanted_total, wanted = add_rms_norm_silu_reference(x, weight, True, b, r)
    assert torch.equal(total, wanted_total)  # one order of additions
    torch.testing.assert_close(activated, wanted, rtol=2e-6, atol=2e-6)
    pad = data.draw(st.booleans())
    assert torch.equal(OPS.add_pad(x, b, r, pad), add_pad_reference(x, b, r, pad))


@pytest.mark.parametrize("low", [-120.0, -90.0, -1.0])
def test_silu_has_torchs_tail(device, low):
    """Where e^x leaves float32, from x = -88.7 on, SiLU is zero, as torch's is."""
    x = torch.full((1, 1, 1, 1), -1.0, device=device)
    weights = torch.linspace(-low, -low - 30, 301)
    got = torch.stack([ops.rms_norm_silu(x, w.view(1).to(device)).flatten()[0] for w in weights])
    wanted = F.silu(-weights)
    # Two units in the last place of the exponential, and the divisions.
    assert ((got.cpu() - wanted).abs() <= 8 * 2**-24 * wanted.abs()).all()
