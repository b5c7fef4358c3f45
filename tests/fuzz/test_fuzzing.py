"""A short form of `make fuzz`, and that it sees what it should."""

from __future__ import annotations

import math

import fuzzing
import numpy as np
import pytest
import torch

from cosmos3_fast import ops


@pytest.mark.parametrize(("kind", "count"), [("ops", 1500), ("images", 60), ("checkpoints", 10)])
def test_no_fault(kind: str, count: int) -> None:
    assert fuzzing.run(kind, 1_000_000, count, math.inf) == count


def test_a_wrong_value_is_found_with_its_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.unpack_pixels
    monkeypatch.setattr(ops, "unpack_pixels", lambda *args: right(*args) ^ 1)
    with pytest.raises(AssertionError, match="--kind ops --first 2 --count 1"):
        fuzzing.run("ops", 0, 3, math.inf)


@pytest.mark.parametrize("at", [0, fuzzing.GUARD - 1, -1])
def test_a_write_beside_a_tensor_is_found(at: int) -> None:
    given = fuzzing.guarded(np.ones((2, 3), np.float32), np.random.default_rng(0))
    given.check()
    given.buffer[at] = 0
    for may_change in (False, True):
        with pytest.raises(AssertionError, match="memory outside"):
            given.check(may_change)


def test_a_changed_input_is_found() -> None:
    given = fuzzing.guarded(np.ones((2, 3), np.float32), np.random.default_rng(0))
    given.tensor.add_(1)
    given.check(may_change=True)
    with pytest.raises(AssertionError):
        given.check()


def test_a_case_is_its_seed() -> None:
    one, other = (fuzzing.damaged(b"0123456789" * 9, np.random.default_rng(5)) for _ in range(2))
    assert one == other
    assert torch.equal(
        *(fuzzing.guarded(np.arange(6.0), np.random.default_rng(3)).buffer for _ in range(2))
    )
