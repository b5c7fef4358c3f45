"""`cosmos3::winograd_conv3x3` against the convolution in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from op_inputs import IMAGE_LAYOUTS, image
from torch import Tensor

from cosmos3_fast import ops
from cosmos3_fast.ops import registry
from cosmos3_fast.ops.winograd import winograd_pack_reference

OPS = torch.ops.cosmos3


@pytest.fixture(params=["cpp", "eager"])
def backend(request: pytest.FixtureRequest, device: str) -> str:
    error = registry.backend_error(request.param, device, "winograd_conv3x3")
    if error:
        pytest.skip(error)
    return request.param


CONVOLUTIONS = [
    (1, 16, 32, 4, 4),
    (1, 16, 64, 1, 1),
    (2, 32, 32, 5, 7),  # tiles cut off at the right and below
    (3, 48, 96, 9, 2),
    (1, 160, 160, 13, 21),
]
LARGEST = (1, 640, 640, 30, 52)  # the encoder's own, as the encoder lays it out
STREAMED = (1, 16, 96, 150, 153)  # a result of more than 8 MB, tiles cut off


def convolution(
    batch: int,
    channels: int,
    out: int,
    height: int,
    width: int,
    layout: str = "channels_last",
    device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = image(batch, channels, height, width, layout=layout, device=device)
    weight = image(out, channels, 3, 3, device=device) / (9 * channels) ** 0.5
    bias = image(1, out, 1, 1, device=device).flatten()
    return x, weight, bias, image(batch, out, height, width, layout=layout, device=device)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        *itertools.product(CONVOLUTIONS, IMAGE_LAYOUTS),
        (LARGEST, "channels_last"),
        (STREAMED, "channels_last"),
    ],
)
def test_winograd_equals_convolution(
    shape: tuple[int, int, int, int, int], layout: str, backend: str, device: str, poison: None
):
    x, weight, bias, residual = convolution(*shape, layout, device)
    packed = ops.winograd_pack(weight, backend=backend)
    convolved = F.conv2d(x.double(), weight.double(), padding=1)
    for b, r in ((bias, residual), (None, residual), (bias, None), (None, None)):
        got = ops.winograd_conv3x3(x, packed, b, r, backend=backend)
        wanted = convolved if b is None else convolved + b.double().view(-1, 1, 1)
        wanted = wanted if r is None else wanted + r.double()
        assert got.is_contiguous(memory_format=torch.channels_last)
        # Inputs and outputs pass through transforms whose entries reach 27/8 and whose rows sum
        # to up to 7.3, on top of the 9 Cin products' own float32 rounding.
        assert (got.double() - wanted).abs().max() <= 6e-6 * wanted.abs().max()


@pytest.mark.parametrize("channels", [160, 640, 1024])
def test_rounding_does_not_grow_with_the_channels(channels: int):
    """Products are summed in parts; one sum of 1024 of them rounds four times as much (45 eps)."""
    if error := registry.backend_error("cpp", "cpu", "winograd_conv3x3"):
        pytest.skip(error)
    x, weight, _, _ = convolution(1, channels, 64, 24, 28)
    x = F.silu(x)
    got = ops.winograd_conv3x3(x, ops.winograd_pack(weight))
    wanted = F.conv2d(x.double(), weight.double(), padding=1)
    eps = torch.finfo(torch.float32).eps
    assert (got.double() - wanted).abs().max() <= 18 * eps * wanted.abs().max()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3), st.sampled_from([16, 48]), st.sampled_from([32, 64]),
    st.integers(1, 14), st.integers(1, 14), st.sampled_from(IMAGE_LAYOUTS),
)  # fmt: skip
def test_winograd_properties(batch, channels, out, height, width, layout):
    x, weight, bias, residual = convolution(batch, channels, out, height, width, layout)
    got = OPS.winograd_conv3x3(x, OPS.winograd_pack(weight), bias, residual)
    wanted = F.conv2d(x.double(), weight.double(), bias.double(), padding=1) + residual.double()
    assert (got.double() - wanted).abs().max() <= 2e-5 * wanted.abs().max()


def test_winograd_pack_equals_its_reference(device: str):
    _, weight, _, _ = convolution(1, 48, 64, 1, 1, device=device)
    torch.testing.assert_close(OPS.winograd_pack(weight), winograd_pack_reference(weight))
    strided = weight.flip(3)[:, :, :, ::1].transpose(2, 3)
    torch.testing.assert_close(OPS.winograd_pack(strided), winograd_pack_reference(strided))
    # More than 8 MB, as a network has its kernels: some of a larger, channels-last tensor.
    large = image(320, 272, 3, 3, layout="channels_last", device=device)[32:]
    torch.testing.assert_close(OPS.winograd_pack(large), winograd_pack_reference(large))


def test_winograd_opcheck_and_empty(device: str):
    x, weight, bias, residual = convolution(1, 16, 32, 5, 6, device=device)
    packed = OPS.winograd_pack(weight)
    torch.library.opcheck(OPS.winograd_pack.default, (weight,))
    torch.library.opcheck(OPS.winograd_conv3x3.default, (x, packed, bias, residual))
    torch.library.opcheck(OPS.winograd_conv3x3.default, (x, packed))
    assert OPS.winograd_conv3x3(x[:0], packed).shape == (0, 32, 5, 6)


def test_winograd_refuses_gradients(device: str):
    x, weight, _, _ = convolution(1, 16, 32, 5, 6, device=device)
    with pytest.raises(RuntimeError, match="winograd_conv3x3: no argument may require a gradient"):
        OPS.winograd_conv3x3(x.requires_grad_(), OPS.winograd_pack(weight))
