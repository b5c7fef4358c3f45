"""`accelerate` and its companions on what has a VAE, whichever engine it comes from."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from cosmos3_fast import UnsupportedVAEError, accelerate, acceleration, refresh, restore
from cosmos3_fast.acceleration import last_encoding
from cosmos3_fast.vae.live.engine import Engine
from cosmos3_fast.vae.live.paths import Choice
from cosmos3_fast.vae.live.seam import engine_of, is_accelerated
from cosmos3_fast.vae.synthetic import COSMOS3_VAE_CONFIG, synthetic_vae

pytest.importorskip("diffusers")


class Pipeline:
    def __init__(self, vae: Any) -> None:
        self.vae = vae


class Cosmos3OmniPipeline(Pipeline):
    """Known by its name."""


@pytest.fixture
def vae() -> Any:
    config = {**COSMOS3_VAE_CONFIG, "base_dim": 8, "z_dim": 4, "num_res_blocks": 1}
    return synthetic_vae(config, 0, decoder_base_dim=8).requires_grad_(False).eval()


def test_a_vae_or_the_pipeline_that_has_it(vae: Any) -> None:
    pipe = Pipeline(vae)
    assert accelerate(pipe) is pipe
    assert is_accelerated(vae)
    assert last_encoding(pipe) is None
    vae.encode(torch.zeros(1, 3, 1, 16, 16))
    assert last_encoding(pipe) is last_encoding(vae)
    assert last_encoding(pipe).path == "fast"
    assert refresh(pipe) is pipe
    assert restore(pipe) is pipe
    assert not is_accelerated(vae)
    assert accelerate(pipe, "off") is pipe
    assert last_encoding(pipe) is None


def test_what_is_neither(vae: Any) -> None:
    with pytest.raises(TypeError, match=r"must be a VAE or a pipeline with one, got builtins\.int"):
        accelerate(3)
    with pytest.raises(UnsupportedVAEError, match="Pipeline has no vae yet"):
        accelerate(Pipeline(None))
    with pytest.raises(ValueError, match="mode must be one of exact, fast, off, got 'quick'"):
        accelerate(vae, "quick")
    module = nn.Linear(1, 1)
    module.encode = lambda x: x
    with pytest.raises(UnsupportedVAEError, match="vae must have an encoder, got Linear without"):
        accelerate(module)


@pytest.mark.parametrize("opens", [False, True])
def test_pipelines_that_announce(vae: Any, opens: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    adapter = SimpleNamespace(announce=lambda pipe, choice: asked.append((pipe, choice)) or opens)
    monkeypatch.setitem(sys.modules, "cosmos3_fast.engines.diffusers", adapter)
    pipe = Cosmos3OmniPipeline(vae)
    assert accelerate(pipe, "exact", clips=False) is pipe
    assert asked == [(pipe, Choice("exact", clips=False))]
    assert is_accelerated(vae) == opens


def test_what_surrounds_an_engines_vae(vae: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = ModuleType("adapter")
    adapter.ENGINE = Engine(is_equivalent=lambda forward: True)
    monkeypatch.setitem(sys.modules, "adapter", adapter)
    monkeypatch.setitem(acceleration._ENGINES, "engine", "adapter")
    accelerate(vae)
    assert engine_of(vae) == Engine()
    restore(vae)
    vae.__class__ = type("Derived", (type(vae),), {"__module__": "engine.models"})
    accelerate(Pipeline(vae))
    assert engine_of(vae) is adapter.ENGINE
    # Whoever changes the mode need not know of it.
    accelerate(vae, "exact")
    assert engine_of(vae) is adapter.ENGINE


def test_no_engine_is_imported_beforehand() -> None:
    script = (
        "import sys, cosmos3_fast.acceleration\n"
        "print([m for m in sys.modules if 'diffusers' in m or 'engines' in m])"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
