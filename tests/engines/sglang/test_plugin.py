"""Found and applied by SGLang's own plugin loader."""

from __future__ import annotations

import pytest
import torch
from sglang.multimodal_gen.runtime.platforms import plugins
from sglang.multimodal_gen.runtime.platforms.plugins import HookRegistry
from sglang_engine import (
    HOOKED,
    Cosmos3LatentPreparationStage,
    make_batch,
    make_stage,
    make_vae,
    run,
    unpatch,
    write_metadata,
)

from cosmos3_fast.engines import sglang as engine


@pytest.fixture
def clean(monkeypatch):
    """SGLang's plugin loading as in a new process; the stage as it was afterwards."""
    before = dict(vars(Cosmos3LatentPreparationStage))
    monkeypatch.delenv("COSMOS3_FAST", raising=False)
    plugins._reset_lifecycle_for_tests()
    HookRegistry.reset()
    yield before
    plugins._reset_lifecycle_for_tests()
    unpatch({name: before.get(name) for name in HOOKED})


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The metadata that installing this package leaves, made from pyproject.toml."""
    write_metadata(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


def load() -> None:
    """The two calls of SGLang's worker_bootstrap."""
    plugins.load_plugins()
    plugins.apply_plugin_hooks()


def hooked() -> set[str]:
    return {
        name
        for name in HOOKED
        if hasattr(vars(Cosmos3LatentPreparationStage).get(name), "__wrapped__")
    }


@pytest.mark.parametrize(
    ("mode", "hooks"),
    [
        (None, {"__init__", "forward"}),
        ("exact", {"__init__", "forward"}),
        (" FAST ", set(HOOKED)),
        ("off", set()),
    ],
)
def test_the_engines_loader_finds_and_applies_it(clean, installed, monkeypatch, mode, hooks):
    if mode is not None:
        monkeypatch.setenv("COSMOS3_FAST", mode)
    load()
    assert hooked() == hooks
    if not hooks:
        assert dict(vars(Cosmos3LatentPreparationStage)) == clean


def test_loaded_this_way_it_works(clean, installed, monkeypatch):
    stage = make_stage(make_vae(base_dim=8))
    lines: list[str] = []
    monkeypatch.setattr(type(stage), "log_info", lambda _, message, *args: lines.append(message))
    load()
    make_stage(stage.vae)
    run(stage, make_batch(video=torch.zeros(1, 3, 17, 32, 48)))
    assert "cosmos3_fast (exact) encoded 5 of 17 pixel frames" in lines


def test_a_misspelt_mode_is_reported_and_hooks_nothing(clean, installed, monkeypatch, caplog):
    monkeypatch.setenv("COSMOS3_FAST", "quick")
    load()
    assert hooked() == set()
    assert "got 'quick'" in caplog.text


def test_registering_again_changes_nothing(clean):
    engine.register()
    engine.register()
    assert [len(hooks) for hooks in HookRegistry._hooks.values()] == [1, 1]
