"""Graphs of a live VAE's folded networks, with a stand-in for a graph."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cosmos3_fast import accelerate
from cosmos3_fast.vae.live.patch import ATTRIBUTE
from cosmos3_fast.vae.live.seam import last_encoding
from cosmos3_fast.vae.networks.graphs import Graphs
from cosmos3_fast.vae.synthetic import COSMOS3_VAE_CONFIG, synthetic_vae

pytest.importorskip("diffusers")


class Recorded:
    """Computes what a graph would replay, and counts."""

    replayed = 0

    def __init__(self, run: Callable[[Tensor], Tensor], given: Tensor, state: object) -> None:
        self._run = run

    @staticmethod
    def serves(given: Tensor) -> bool:
        return True

    def __call__(self, given: Tensor) -> Tensor:
        Recorded.replayed += 1
        return self._run(given).clone()


@pytest.fixture
def vae() -> Any:
    made: Any = synthetic_vae({**COSMOS3_VAE_CONFIG, "base_dim": 8, "z_dim": 8}, decoder_base_dim=8)
    return made.requires_grad_(False).eval()


def networks(vae: Any) -> list[Any]:
    state = vars(vae)[ATTRIBUTE]
    return [part._frame._snapshot.network for part in (state.encoder, state.decoder)]


def both(vae: Any) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(1, 3, 1, 32, 32, generator=generator)
    latents = torch.randn(1, 8, 1, 2, 2, generator=generator)
    return vae.encode(pixels).latent_dist.parameters, vae.decode(latents).sample


def test_calls_are_replayed_on_request(vae: Any) -> None:
    wanted = both(accelerate(vae))
    assert all(network._graphs is None for network in networks(vae))
    accelerate(vae, graphs=True)
    assert all(map(torch.equal, both(vae), wanted))  # on a CPU, as without
    for network in networks(vae):
        network._graphs = Graphs(2, Recorded)
    Recorded.replayed = 0
    for _ in range(2):
        assert all(map(torch.equal, both(vae), wanted))
        assert last_encoding(vae).path == "fast"
    assert Recorded.replayed == 4
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.mul_(1.01)
    assert not torch.equal(both(vae)[0], wanted[0])
    assert Recorded.replayed == 4  # folded anew
    assert all(network._graphs.keep == 4 for network in networks(vae))
    accelerate(vae)
    both(vae)
    both(other := copy.deepcopy(vae))
    assert all(network._graphs is not None for network in (*networks(vae), *networks(other)))
    both(accelerate(vae, graphs=False))
    assert all(network._graphs is None for network in networks(vae))
    with pytest.raises(TypeError, match="graphs must be True, False or None, got 'yes'"):
        accelerate(vae, graphs="yes")  # type: ignore[arg-type]
