"""The transformed weights of `CausalConv` are those of its present weight, however that changed."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cosmos3_fast.ops import registry
from cosmos3_fast.ops.winograd import same_bits
from cosmos3_fast.vae.networks.causal import CausalConv

pytestmark = pytest.mark.skipif(
    ("winograd_conv3x3", "cpu") not in registry.LIBRARY_KERNELS, reason="no compiled library"
)


def weights(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(32, 16, 3, 3, generator=generator),
        "bias": torch.randn(32, generator=generator),
    }


@pytest.fixture
def conv() -> CausalConv:
    conv = CausalConv(16, 32).requires_grad_(False)
    conv.load_state_dict(weights(0))
    return conv


def large(seed: int = 0) -> Tensor:
    x = torch.randn(1, 16, 64, 64, generator=torch.Generator().manual_seed(seed))
    return x.contiguous(memory_format=torch.channels_last)


def assert_convolves(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> None:
    wanted = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    # Winograd's rounding at 16 channels; another weight is off by the size of the result.
    assert (y.double() - wanted).abs().max() <= 2e-5 * wanted.abs().max()


def test_loading_in_inference_mode(conv: CausalConv):
    with torch.inference_mode():
        inner = CausalConv(16, 32).requires_grad_(False)
        for each in (inner, conv):
            each(large())
            each.load_state_dict(weights(1))
            assert_convolves(each(large()), large(), **weights(1))
            assert each._packed
    assert_convolves(inner(large()), large(), **weights(1))


def test_writes_through_data(conv: CausalConv):
    conv(large())
    for name, value in weights(1).items():
        getattr(conv, name).data.copy_(value)
    assert_convolves(conv(large()), large(), **weights(1))
    # What a checksum by exclusive or would not see.
    conv.weight.data.neg_()
    flipped = {"weight": -weights(1)["weight"], "bias": weights(1)["bias"]}
    assert_convolves(conv(large()), large(), **flipped)


def test_replaced_parameters_at_a_reused_address(conv: CausalConv):
    for seed in range(20):
        conv.weight = None
        conv.weight = torch.nn.Parameter(weights(seed)["weight"], requires_grad=False)
        assert_convolves(conv(large()), large(), conv.weight, conv.bias)


def test_functional_call(conv: CausalConv):
    for seed in range(20):
        other = weights(seed)
        y = torch.func.functional_call(conv, other, (large(),))
        assert_convolves(y, large(), **other)
    assert_convolves(conv(large()), large(), **weights(0))


def test_strided_weights(conv: CausalConv):
    conv.to(memory_format=torch.channels_last)
    for _ in range(2):
        assert_convolves(conv(large()), large(), **weights(0))
    packed = conv._packed
    conv(large())
    again = conv._packed
    assert again is packed


def test_a_vmapped_weight_is_convolved(conv: CausalConv):
    x = large()
    stacked = torch.stack([weights(seed)["weight"] for seed in (1, 2)])
    ys = torch.vmap(lambda w: torch.func.functional_call(conv, {"weight": w}, (x,)))(stacked)
    for y, weight in zip(ys, stacked, strict=True):
        assert_convolves(y, x, weight, conv.bias)


def test_calls_that_race_a_change(conv: CausalConv):
    """Every result is that of one of the two weights, and the last that of the last."""
    stop = threading.Event()
    failures: list[str] = []

    def call() -> None:
        while not stop.is_set():
            y = conv(large())
            if not any(
                (y.double() - w).abs().max() <= 2e-5 * w.abs().max() for w in wanted.values()
            ):
                failures.append("a result of neither weight")

    wanted = {
        seed: F.conv2d(
            large().double(), weights(seed)["weight"].double(), conv.bias.double(), padding=1
        )
        for seed in (0, 1)
    }
    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    for turn in range(40):
        # As `Module.to` does: the parameter then holds other memory.
        conv.weight.data = weights(turn % 2)["weight"]
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures
    assert_convolves(conv(large()), large(), weights(1)["weight"], conv.bias)


def test_same_bits():
    a = torch.tensor([[1.0, float("nan")], [0.0, 3.0]])
    assert same_bits(a, a.clone())
    assert same_bits(a, a.T.contiguous().T)
    assert not same_bits(a, a + torch.tensor([[0.0, 0.0], [0.0, 1e-6]]))
    assert not same_bits(torch.zeros(2), -torch.zeros(2))
    assert not same_bits(torch.zeros(2), torch.zeros(2, 1))
    assert not same_bits(torch.zeros(2), torch.zeros(2, dtype=torch.int32))


def test_same_bits_copies_no_weights():
    """Neither layout is copied to be compared, which took longer than comparing."""
    copied = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            if not any(result.data_ptr() == t.data_ptr() for t in (a, b)):
                copied.append(func)
            return result

    for memory_format in (torch.contiguous_format, torch.channels_last):
        a = torch.randn(4, 5, 3, 3).to(memory_format=memory_format)
        b = a.clone()
        with Record():
            assert same_bits(a, b)
        b[3, 4, 2, 2] += 1
        with Record():
            assert not same_bits(a, b)
    assert not copied
