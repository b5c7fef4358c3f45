"""Imported by SGLang as an external model package, for its releases without plugins."""

from __future__ import annotations

import importlib
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
from sglang.multimodal_gen.runtime.post_training import weights_updater
from sglang.multimodal_gen.runtime.utils.external_model_package import load_external_model_package
from sglang_engine import HAS_PLUGINS, HOOKED, UPDATES, Cosmos3LatentPreparationStage, unpatch

PACKAGE = "cosmos3_fast.engines.sglang_package"
VARIABLE = "SGLANG_EXTERNAL_MODEL_PACKAGE"
TESTING = Path(__file__).parents[2] / "support"
PROCESS = """
import sglang_engine, torch
from sglang.multimodal_gen import registry

assert "Cosmos3OmniDiffusersPipeline" in registry.get_registered_pipeline_names()
stage = sglang_engine.make_stage(sglang_engine.make_vae(base_dim=8))
stage.log_info = lambda message, *args: print(message)
sglang_engine.run(stage, sglang_engine.make_batch(video=torch.zeros(1, 3, 17, 32, 48)))
"""

without_plugins = pytest.mark.skipif(HAS_PLUGINS, reason="this release has plugins")


@pytest.fixture
def load(monkeypatch):
    """SGLang's loader as in a new process; the stage as it was afterwards."""
    before = dict(vars(Cosmos3LatentPreparationStage))
    monkeypatch.setenv(VARIABLE, PACKAGE)
    monkeypatch.delenv("COSMOS3_FAST", raising=False)
    monkeypatch.delitem(sys.modules, PACKAGE, raising=False)
    load_external_model_package.cache_clear()
    yield load_external_model_package
    load_external_model_package.cache_clear()
    unpatch({name: before.get(name) for name in HOOKED})


def hooked() -> set[str]:
    owners = [(Cosmos3LatentPreparationStage, name) for name in HOOKED]
    owners.append((weights_updater, UPDATES))
    return {name for owner, name in owners if hasattr(vars(owner).get(name), "__wrapped__")}


def test_before_a_pipeline_is_built_the_stage_is_hooked(tmp_path):
    """In a process that does what SGLang's worker does to look the pipeline up."""
    paths = [str(TESTING), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, VARIABLE: PACKAGE, "PYTHONPATH": os.pathsep.join(paths)}
    environment.pop("COSMOS3_FAST", None)
    command = [sys.executable, "-c", PROCESS]
    process = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    assert "Prepared V2V latents" in process.stdout
    line = "cosmos3_fast (exact) encoded 5 of 17 pixel frames"
    assert (line in process.stdout) == (not HAS_PLUGINS)


@without_plugins
@pytest.mark.parametrize("mode", [None, "exact", " FAST "])
def test_the_engines_loader_applies_it(load, monkeypatch, mode):
    if mode is not None:
        monkeypatch.setenv("COSMOS3_FAST", mode)
    load()
    assert hooked() == {"__init__", "forward", UPDATES}


def test_off_or_beside_plugins_nothing_is_hooked(load, monkeypatch):
    if not HAS_PLUGINS:
        monkeypatch.setenv("COSMOS3_FAST", "off")
    load()
    assert hooked() == set()


@without_plugins
def test_a_misspelt_mode_is_reported_and_hooks_nothing(load, monkeypatch, caplog):
    monkeypatch.setenv("COSMOS3_FAST", "quick")
    load()
    assert hooked() == set()
    (warning,) = [r.getMessage() for r in caplog.records if r.name == PACKAGE]
    assert "got 'quick'" in warning


@without_plugins
def test_a_release_that_lacks_what_is_wrapped_is_left_alone(load, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        patch.delattr(weights_updater, UPDATES)
        load()
    assert hooked() == set()
    (warning,) = [r.getMessage() for r in caplog.records if r.name == PACKAGE]
    assert UPDATES in warning


def test_sglang_for_language_models_finds_no_models_in_it(load, monkeypatch):
    """It imports what the same variable names, and then the modules in its folder."""
    loader = "sglang.multimodal_gen.runtime.utils.external_model_package"
    monkeypatch.delitem(sys.modules, loader)
    package = importlib.import_module(PACKAGE)
    assert list(pkgutil.iter_modules(package.__path__)) == []
    assert hooked() == set()
