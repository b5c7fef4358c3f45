"""A network that follows weights: one snapshot per call, folded once, never a stale one kept."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from cosmos3_fast.vae.live.obstacles import survey
from cosmos3_fast.vae.live.weights import Following
from cosmos3_fast.vae.topology import UnsupportedVAEError

CPU = torch.device("cpu")


class Network(nn.Linear):
    @property
    def device(self) -> torch.device:
        return self.weight.device


@pytest.fixture
def vae() -> Any:
    return SimpleNamespace(part=nn.Linear(2, 2).requires_grad_(False))


def look(vae: Any) -> Any:
    return survey(vae, ("part",), lambda forward: False)


def fold(vae: Any, device: torch.device) -> Network:
    return Network(2, 2, device=device)


def test_the_same_until_weights_change(vae: Any) -> None:
    following = Following()
    first = following.snapshot(fold, vae, look(vae), CPU)
    assert following.snapshot(fold, vae, look(vae), CPU) is first
    vae.part.weight.mul_(2)
    second = following.snapshot(fold, vae, look(vae), CPU)
    assert second.network is not first.network
    following.forget()
    assert following.snapshot(fold, vae, look(vae), CPU).network is not second.network


def test_another_device_gets_a_copy(vae: Any) -> None:
    following = Following()
    first = following.snapshot(fold, vae, look(vae), CPU)
    moved = following.snapshot(fold, vae, look(vae), torch.device("meta"))
    assert (first.network.device.type, moved.network.device.type) == ("cpu", "meta")


def test_what_is_forgotten_while_it_is_folded_is_not_kept(vae: Any) -> None:
    following = Following()

    def fold_slowly(vae: Any, device: torch.device) -> Network:
        network = fold(vae, device)
        following.forget()
        return network

    first = following.snapshot(fold_slowly, vae, look(vae), CPU)
    assert first.network is not None
    assert following.snapshot(fold, vae, look(vae), CPU).network is not first.network


def test_a_refusal_is_of_the_weights_it_was_made_for(vae: Any) -> None:
    following = Following()
    first = following.snapshot(fold, vae, look(vae), CPU)
    vae.part.weight.mul_(2)
    second = following.snapshot(fold, vae, look(vae), CPU)
    following.refuse(first, "of before")
    assert following.snapshot(fold, vae, look(vae), CPU) is second
    following.refuse(second, "of now")
    with pytest.raises(UnsupportedVAEError, match="of now"):
        following.snapshot(fold, vae, look(vae), CPU)
    vae.part.weight.mul_(2)
    assert following.snapshot(fold, vae, look(vae), CPU).network is not None


def test_what_cannot_be_folded_is_tried_once_for_the_same_weights(vae: Any) -> None:
    following, tried = Following(), []

    def refuse(vae: Any, device: torch.device) -> None:
        tried.append(1)
        raise UnsupportedVAEError("not this one")

    for _ in range(3):
        with pytest.raises(UnsupportedVAEError, match="not this one"):
            following.snapshot(refuse, vae, look(vae), CPU)
    assert len(tried) == 1


def test_threads_fold_once(vae: Any) -> None:
    following, folds = Following(), []
    start = threading.Barrier(4)

    def counting(vae: Any, device: torch.device) -> Network:
        folds.append(1)
        return fold(vae, device)

    def use() -> None:
        start.wait()
        following.snapshot(counting, vae, look(vae), CPU)

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folds) == 1
