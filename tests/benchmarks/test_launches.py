"""How launches are counted, and how many one encode takes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import launches


@pytest.fixture
def x():
    with FakeTensorMode():
        yield torch.empty(1, 16, 8, 8, device="cuda", memory_format=torch.channels_last)


def counted(call) -> tuple[dict[str, int], int]:
    with launches.counting() as counter:
        call()
    return dict(counter.launches), sum(counter.bytes.values())


SIZE = 4 * 16 * 8 * 8


def test_views_and_allocations_are_no_launch(x: torch.Tensor):
    def call() -> None:
        x.flatten(2).transpose(1, 2).unsqueeze(1).chunk(2, -1)[0][:, :, 1::2, 0].expand(3, 1, 32)
        torch.empty_like(x)
        x.contiguous(memory_format=torch.channels_last)

    assert counted(call) == ({}, 0)


def test_the_bias_of_a_convolution_is_a_launch(x: torch.Tensor):
    weight = torch.empty(16, 16, 1, 1, device="cuda")
    bias = torch.empty(16, device="cuda")
    moved = 2 * SIZE + 4 * 256
    assert counted(lambda: F.conv2d(x, weight)) == ({launches.CONVOLUTIONS: 1}, moved)
    found = counted(lambda: F.conv2d(x, weight, bias))
    assert found == ({launches.CONVOLUTIONS: 1, launches.BIASES: 1}, moved + 2 * SIZE + 64)


def test_a_pad_fills_and_copies(x: torch.Tensor):
    found = counted(lambda: F.pad(x, (0, 1, 0, 0)))
    assert found == ({launches.PADS: 2}, 4 * 16 * 8 * 9 + 2 * SIZE)


def test_what_is_written_in_place(x: torch.Tensor):
    y = torch.empty_like(x)
    assert counted(lambda: y.add_(x)) == ({launches.SUMS: 1}, 3 * SIZE)

    def strided() -> None:
        y[:, ::2] += x[:, ::2]

    assert counted(strided) == ({launches.SUMS: 1}, 3 * SIZE // 2)

    def assigned() -> None:
        y[:, ::2] = x[:, ::2]

    assert counted(assigned) == ({launches.OTHERS: 1}, SIZE)


def test_an_op_of_this_package_is_a_launch_and_a_layout_another(x: torch.Tensor):
    def norm(image: torch.Tensor):
        return counted(lambda: torch.ops.cosmos3.rms_norm_silu(image, None, True))

    assert norm(x) == ({launches.NORMS: 1}, 2 * SIZE)
    assert norm(x.mT) == ({launches.OTHERS: 1, launches.NORMS: 1}, 4 * SIZE)


def test_attention_is_a_launch(x: torch.Tensor):
    found = counted(lambda: F.scaled_dot_product_attention(x, x, x))
    assert found == ({launches.ATTENTION: 1}, 4 * SIZE)


def test_what_is_not_listed_is_refused(x: torch.Tensor):
    with pytest.raises(ValueError, match="aten::sin must be listed"):
        counted(x.sin)


def test_launches_of_one_frame(capsys: pytest.CaptureFixture[str]):
    """And that the committed table says what is counted now."""
    counted = launches.count_all()
    with capsys.disabled():
        print(f"\n{launches.report(counted)}")
    encode, decode = counted["encode"], counted["decode"]
    assert encode["after"].launches.total() <= 61
    # Each bias read and wrote a result, but for that of the last convolution.
    assert encode["after"].launches[launches.BIASES] == 1
    assert encode["after"].bytes.total() < 0.7 * encode["before"].bytes.total()
    assert decode["after"].launches.total() < decode["before"].launches.total()
    assert launches.RESULTS.read_text() == launches.report(counted)


def test_attention_with_its_scores_in_memory_is_counted():
    for _, launched, moved, other_launched, other_moved in launches.count_attention():
        assert int(launched) == 1 < int(other_launched)
        assert int(moved) < int(other_moved)
