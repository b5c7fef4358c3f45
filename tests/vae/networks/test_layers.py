"""When convolutions take Winograd, and the weights that they pack for it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from op_inputs import image
from torch import Tensor

from cosmos3_fast.ops import registry
from cosmos3_fast.vae.networks import layers
from cosmos3_fast.vae.networks.causal import CausalConv
from cosmos3_fast.vae.networks.layers import Upsample, duplicated_phase, phase_kernels


@pytest.fixture
def conv() -> CausalConv:
    torch.manual_seed(0)
    return CausalConv(16, 32).requires_grad_(False)


def large() -> Tensor:
    return image(1, 16, 64, 64, layout="channels_last")


needs_library = pytest.mark.skipif(
    ("winograd_conv3x3", "cpu") not in registry.LIBRARY_KERNELS, reason="no compiled library"
)


def assert_convolves(conv: CausalConv, x: Tensor) -> None:
    wanted = F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)
    assert (conv(x).double() - wanted).abs().max() <= 2e-5 * wanted.abs().max()


@needs_library
def test_conv_packs_once_and_again_after_a_change(conv: CausalConv):
    assert_convolves(conv, large())
    packed = conv._packed
    assert packed is not None
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
def test_conv_copies_do_not_share_packed_weights(conv: CausalConv):
    conv(large())
    for twin in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):
        with torch.no_grad():
            twin.weight.add_(1)
        assert_convolves(twin, large())
        assert_convolves(conv, large())
    assert "packed" not in " ".join(conv.state_dict())
    assert not conv.to(torch.bfloat16)._packed


@needs_library
def test_conv_takes_winograd_only_where_it_serves(conv: CausalConv):
    conv(image(1, 16, 8, 8))  # too few tiles
    conv.to(torch.bfloat16)(large().bfloat16())
    conv.to(torch.float32)(large().requires_grad_()).sum().backward()
    CausalConv(12, 32).requires_grad_(False)(image(1, 12, 64, 64))
    assert not conv._packed
    torch.compile(conv, backend="eager", fullgraph=True)(large())
    assert not conv._packed
    with torch.inference_mode():
        conv(large())
    assert conv._packed


@needs_library
@pytest.mark.parametrize("route", ["winograd", "direct", "as on a GPU"])
@pytest.mark.parametrize("factor_t", [None, 1, 2])
def test_upsample(route: str, factor_t: int | None, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(1)
    winograd = route == "winograd"
    if route == "as on a GPU":
        monkeypatch.setattr(layers, "defers_bias", lambda x: True)
    layer = Upsample(16, 32, min_tiles=30).requires_grad_(False)
    layer.winograd = winograd
    for height, width in ((9, 11), (8, 6), (5, 7)):  # 60, 24 and 24 tiles
        x = image(2, 16, height, width, layout="channels_last")
        shortcut = None if factor_t is None else image(2, 16, height, width)[:, :8]
        up = F.interpolate(x.double(), scale_factor=2.0)
        wanted = F.conv2d(up, layer.weight.double(), layer.bias.double(), padding=1)
        if shortcut is not None:
            for phase in range(4):
                added = duplicated_phase(shortcut, 32, factor_t, factor_t - 1, phase)
                wanted[:, :, phase // 2 :: 2, phase % 2 :: 2] += added
        terms = layer(x, shortcut, factor_t or 1)
        assert (terms.bias is not None) == (route == "as on a GPU")
        got = terms.total()
        assert got.is_contiguous(memory_format=torch.channels_last)
        assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()
        assert bool(layer._packed) == (winograd and height == 9)
        layer._packed = None
        differentiable = layer(x.clone().requires_grad_(), shortcut, factor_t or 1).total()
        torch.testing.assert_close(differentiable.detach(), got, rtol=1e-5, atol=1e-5)
        assert differentiable.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_upsample_in_another_dtype_holds_the_phases(dtype: torch.dtype):
    torch.manual_seed(2)
    layer = Upsample(16, 32).requires_grad_(False).to(memory_format=torch.channels_last)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    kernels = torch.cat(phase_kernels(layer.weight.double())).to(dtype)
    moved = copy.deepcopy(layer).to(dtype)
    assert moved.weight is None
    assert torch.equal(moved.phases, kernels)  # rounded once
    assert moved.phases.is_contiguous(memory_format=torch.channels_last)
    assert not moved.phases.requires_grad
    # A state of a float32 layer is taken, and left as it was.
    loaded = Upsample(16, 32).to(dtype)
    given = dict(state)
    loaded.load_state_dict(given)
    assert torch.equal(loaded.phases, kernels)
    assert given.keys() == state.keys()
    x = image(2, 16, 5, 7, layout="channels_last").to(dtype)
    for each in (moved, loaded, copy.deepcopy(moved).to(torch.float64).to(dtype)):
        assert torch.equal(each(x).total(), moved(x).total())
    up = F.interpolate(x.double(), scale_factor=2.0)
    wanted = F.conv2d(up, layer.weight.double(), layer.bias.double(), padding=1)
    # Of the kernels, the frames and the result; in float64 of the sums too.
    eps = max(4 * torch.finfo(dtype).eps, 1e-14)
    assert (moved(x).total().double() - wanted).abs().max() <= eps * wanted.abs().max()
    assert moved.to("meta").phases.is_meta


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 37, 130])
def test_attend(tokens: int, dtype: torch.dtype, device: str):
    """Against float64; scores of some tens, as a peaked softmax has them."""
    generator = torch.Generator().manual_seed(tokens)
    qkv = torch.randn(2, 1, tokens, 3 * 320, generator=generator, dtype=torch.float64)
    q, k, v = qkv.to(device, dtype).chunk(3, dim=-1)
    weights = (q.double() @ k.double().transpose(2, 3)).softmax(-1)
    error = (layers.attend(q, k, v).double() - weights @ v.double()).abs().max()
    scores = 128 * torch.finfo(torch.float32).eps  # an exponent of tens, rounded
    assert error <= (4 * torch.finfo(dtype).eps + scores) * v.abs().max()
    differentiable = layers.attend(q.clone().requires_grad_(), k, v)
    assert differentiable.requires_grad
