"""What a call costs the host, counted."""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks import host


def test_counts() -> None:
    def twice(x: int) -> int:
        return sum(map(abs, (x, x)))

    assert host.python_calls(lambda: twice(1)) == 2
    assert host.instructions(lambda: None) < host.instructions(lambda: twice(1))


@pytest.mark.parametrize(
    ("name", "calls", "instructions"), [("encode", 400, 7600), ("decode", 590, 12600)]
)
def test_an_eager_call(name: str, calls: int, instructions: int) -> None:
    """At most half the 16831 and 25272 instructions of the same layers where each op asks."""
    run = host.eager_calls()[name]
    with torch.no_grad(), host.as_on_a_gpu():
        run()
        assert host.python_calls(run) <= calls
        if sys.version_info[:2] == (3, 11):
            assert host.instructions(run) <= instructions


def test_the_seam() -> None:
    """A look at all modules was 1763 calls, of C too, when it was Python's."""
    pytest.importorskip("diffusers")
    for each in host.seam_calls().values():
        each["seam"]()
        assert host.python_calls(each["seam"]) <= 105
        if sys.version_info[:2] == (3, 11):
            assert host.instructions(each["seam"]) <= 3700
        assert host.microseconds(each["result"], 2, 1).median > 0
