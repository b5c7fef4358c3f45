"""A short form of `make soak`, and that it sees what it should."""

from __future__ import annotations

from typing import Any

import pytest
import soak
import soak_events
import soak_pair
import torch

from cosmos3_fast.vae.live import weights
from cosmos3_fast.vae.live.content import Content

pytest.importorskip("diffusers")


def test_no_fault() -> None:
    found = [soak.run(seed, 12) for seed in range(1000, 1003)]
    calls, fast = map(sum, zip(*found, strict=True))
    soak.Counts(calls, fast).check()
    with pytest.raises(AssertionError, match="served 1 of 3"):
        soak.Counts(3, 1).check()


def only(monkeypatch: pytest.MonkeyPatch, *events: Any) -> None:
    monkeypatch.setattr(soak, "EVENTS", dict.fromkeys(events, 1))


def run_some() -> None:
    for seed in range(4):
        soak.run(seed, 12)


def test_a_fold_that_is_kept_is_found_with_its_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, soak_events.some_calls, soak_events.write_in_place)
    monkeypatch.setattr(weights, "same_traces", lambda seen, now: True)
    monkeypatch.setattr(Content, "differs", lambda self, weights: False)
    with pytest.raises(AssertionError, match=r"--first \d --count 1 .*\n(.*\n)*  write_in_place"):
        run_some()


@pytest.mark.parametrize("method", list(soak_pair.PARTS))
def test_one_weight_is_late_by_so_many_calls_only(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Content, "differs", lambda self, weights: False)
    with soak_pair.seen():
        pair = soak_pair.Pair("wan22", 0)
        call = soak_pair.Call(method, 1, 1, None, "no_grad", False, False, 0)
        pair.call(call)
        for weight in pair.weights(method)[0]:
            weight.data.mul_(2)
        pair.changed_without_a_trace(method)
        for _ in range(-(-len(pair.weights(method)) // 2)):
            pair.call(call)
        with pytest.raises(AssertionError):
            pair.call(call)
    assert pair.fast == pair.calls


def test_a_sequence_is_its_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[list[str]] = [[], []]
    for each in drawn:

        def note(pair: soak_pair.Pair, each: list[str] = each) -> str:
            each.append(str(soak_pair.Call.drawn(pair.rng)))
            return soak_events.some_calls(pair)

        only(monkeypatch, note)
        soak.run(7, 3)
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) == 3


def test_states_are_taken_back() -> None:
    with soak_pair.seen():
        pair = soak_pair.Pair("qwen", 0)
        forward = type(pair.twin.encoder.norm_out).forward
        for event in soak_events.EVENTS:
            event(pair)
            pair.check_weights()
        while pair.undo:
            soak_events.undo_one(pair)
        assert type(pair.twin.encoder.norm_out).forward is forward
        assert not torch.nn.modules.module._global_forward_hooks
        pair.call(soak_pair.Call("decode", 1, 1, None, "no_grad", False, False, 0))
        assert pair.fast > 0
