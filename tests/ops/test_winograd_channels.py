"""Channels and sizes at which `winograd_conv3x3` has to refuse or do nothing, on every backend."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cosmos3_fast import ops
from cosmos3_fast.ops import registry


@pytest.fixture(params=[None, "cpp", "eager"])
def backend(request: pytest.FixtureRequest, device: str) -> str | None:
    error = request.param and registry.backend_error(request.param, device, "winograd_conv3x3")
    if error:
        pytest.skip(error)
    return request.param


@pytest.mark.parametrize("channels", [0, 1, 5, 8, 17, 24, 40])
def test_channels_that_fill_no_vector(channels: int, backend: str | None, device: str):
    message = f"winograd_conv3x3: x must have a positive multiple of 16 channels, got {channels}"
    x, packed = torch.zeros(1, channels, 64, 64), torch.zeros(36, 1, channels, 32)
    with pytest.raises(RuntimeError) as raised:
        ops.winograd_conv3x3(x.to(device), packed.to(device), backend=backend)
    assert str(raised.value) == message
    with FakeTensorMode(), pytest.raises(RuntimeError) as raised:
        ops.winograd_conv3x3(torch.empty(x.shape), torch.empty(packed.shape))
    assert str(raised.value) == message


def test_a_weight_without_channels(backend: str | None, device: str):
    message = "winograd_pack: weight must have input channels, got [32, 0, 3, 3]"
    with pytest.raises(RuntimeError) as raised:
        ops.winograd_pack(torch.zeros(32, 0, 3, 3, device=device), backend=backend)
    assert str(raised.value) == message
    with FakeTensorMode(), pytest.raises(RuntimeError) as raised:
        ops.winograd_pack(torch.empty(32, 0, 3, 3))
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("shape", "out"),
    [((0, 16, 4, 4), 32), ((2, 16, 0, 4), 32), ((2, 16, 4, 0), 32), ((1, 16, 4, 4), 0)],
)
def test_without_elements(shape: tuple[int, ...], out: int, backend: str | None, device: str):
    packed = ops.winograd_pack(torch.zeros(out, 16, 3, 3, device=device), backend=backend)
    y = ops.winograd_conv3x3(torch.zeros(shape, device=device), packed, backend=backend)
    assert y.shape == (shape[0], out, *shape[2:])
