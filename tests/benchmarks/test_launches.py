"""How launches are counted, and how many one encode takes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import launches

SIZE = 4 * 16 * 8 * 8


def strided(x: Tensor) -> None:
    x[:, ::2] += x.clone()[:, ::2]


def norm(x: Tensor) -> Tensor:
    return torch.ops.cosmos3.rms_norm_silu(x, None, True)


COUNTED: list[tuple[Callable[[Tensor], object], dict[str, int], int]] = [
    (lambda x: x.flatten(2).transpose(1, 2).chunk(2, -1)[0][:, 1::2].expand(1, 32, 8), {}, 0),
    (torch.empty_like, {}, 0),
    (lambda x: F.conv2d(x, x.new_empty(16, 16, 1, 1)), {"convolutions": 1}, 2 * SIZE + 1024),
    (
        lambda x: F.conv2d(x, x.new_empty(16, 16, 1, 1), x.new_empty(16)),
        {"convolutions": 1, "biases": 1},
        4 * SIZE + 1024 + 64,
    ),
    (lambda x: F.pad(x, (0, 1, 0, 0)), {"pads": 2}, 4 * 16 * 8 * 9 + 2 * SIZE),
    (lambda x: x.add_(x), {"sums": 1}, 3 * SIZE),
    (strided, {"others": 1, "sums": 1}, 2 * SIZE + 3 * SIZE // 2),
    (norm, {"norms": 1}, 2 * SIZE),
    (lambda x: norm(x.mT), {"others": 1, "norms": 1}, 4 * SIZE),
    (lambda x: F.scaled_dot_product_attention(x, x, x), {"attention": 1}, 4 * SIZE),
]


@pytest.mark.parametrize(("call", "kinds", "moved"), COUNTED)
def test_what_a_launch_is(call: Callable[[Tensor], object], kinds: dict[str, int], moved: int):
    with FakeTensorMode():
        x = torch.empty(1, 16, 8, 8, device="cuda", memory_format=torch.channels_last)
        with launches.counting() as counter:
            call(x)
    assert (dict(counter.launches), counter.bytes.total()) == (kinds, moved)


def test_what_is_not_listed_is_refused():
    with FakeTensorMode(), launches.counting():
        x = torch.empty(4, device="cuda")
        with pytest.raises(ValueError, match="aten::sin must be listed"):
            x.sin()


def test_launches_of_one_frame():
    """And that the committed table says what is counted now."""
    counted = launches.count_all()
    fused, alone = counted["encode"]["fused"], counted["encode"]["alone"]
    assert fused.launches.total() <= 61
    # Each bias read and wrote a result.
    assert fused.launches[launches.BIASES] == 0
    assert fused.bytes.total() < 0.7 * alone.bytes.total()
    decode = counted["decode"]
    assert decode["fused"].launches.total() < decode["alone"].launches.total()
    assert decode["fused"].launches.total() <= 99
    clips = launches.count_clips()
    assert launches.COMMITTED.read_text() == launches.report(counted, clips)
    # Half the 592 and 3198 TFLOP of a direct convolution, and what the first frame and the
    # convolutions of plain frames take (`vae/networks/causal.py`).
    assert clips["decode 480×832, 81 frames"][1] <= 305e12
    assert clips["decode 720×1280, 189 frames"][1] <= 1640e12
    assert clips["encode 480×832, 17 frames"][1] <= 12.5e12
    # Where a level has one or two frames, four kernels instead of six.
    assert clips["decode 480×832, 5 frames"][1] <= 19.5e12
    assert clips["encode 480×832, 5 frames"][1] <= 4e12
    # Between two rows of convolutions there is one kernel.
    more, _ = clips["decode 480×832, 16 frames more"]
    assert more.launches[launches.TRANSFORMS] <= 60
    assert more.bytes.total() <= 105e9
