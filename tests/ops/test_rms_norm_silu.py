"""`cosmos3::rms_norm_silu` against the VAE's norm and SiLU in float64."""

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
from cosmos3_fast.ops.rms_norm_silu import rms_norm_silu_reference

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
            # One rounding to the dtype (half a unit, a whole one where Triton's interpreter
            # truncates), and a few units of float32 arithmetic.
            truncates = (backend, device, dtype) == ("triton", "cpu", torch.bfloat16)
            rounding = torch.finfo(dtype).eps * (1.0 if truncates else 0.5)
            arithmetic = 8 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
            bound = (rounding + arithmetic) * wanted.abs() + arithmetic
            assert ((got.double() - wanted).abs() <= bound).all()


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


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_norm_properties(data: st.DataObject):
    shape = [data.draw(st.integers(0, limit)) for limit in (2, 70, 4, 5)]
    x = image(*shape, layout=data.draw(st.sampled_from(IMAGE_LAYOUTS)))
    weight = data.draw(st.sampled_from([None, torch.rand(shape[1])]))
    silu = data.draw(st.booleans())
    got, wanted = OPS.rms_norm_silu(x, weight, silu), rms_norm_silu_reference(x, weight, silu)
    torch.testing.assert_close(got, wanted, rtol=2e-6, atol=2e-6)
