"""Found by SGLang's own plugin loader, and only where SGLang is the one that is known."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
import sglang
import torch
from sglang.multimodal_gen.runtime.platforms import plugins
from sglang.multimodal_gen.runtime.platforms.plugins import HookRegistry
from sglang_stage import Cosmos3LatentPreparationStage, make_batch, make_stage, make_vae, run

from cosmos3_fast.engines import sglang as engine

ROOT = Path(__file__).parents[3]
GROUP = "sglang.multimodal_gen.plugins"


@pytest.fixture
def clean(monkeypatch):
    """SGLang's plugin loading as in a new process; the stage as it was afterwards."""
    before = dict(vars(Cosmos3LatentPreparationStage))
    monkeypatch.delenv("COSMOS3_FAST", raising=False)
    plugins._reset_lifecycle_for_tests()
    HookRegistry.reset()
    yield before
    plugins._reset_lifecycle_for_tests()
    HookRegistry.reset()
    engine._registered = False
    for name in ("forward", "component_uses"):
        setattr(Cosmos3LatentPreparationStage, name, before[name])


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The metadata that installing this package leaves, made from pyproject.toml."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    folder = tmp_path / "cosmos3_fast-0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0\n"
    )
    entries = "\n".join(f"{k} = {v}" for k, v in project["entry-points"][GROUP].items())
    (folder / "entry_points.txt").write_text(f"[{GROUP}]\n{entries}\n")
    monkeypatch.syspath_prepend(tmp_path)


def load() -> None:
    """The two calls of SGLang's worker_bootstrap."""
    plugins.load_plugins()
    plugins.apply_plugin_hooks()


def hooked() -> set[str]:
    return {
        name
        for name in ("forward", "component_uses")
        if hasattr(vars(Cosmos3LatentPreparationStage)[name], "__wrapped__")
    }


@pytest.mark.parametrize(
    ("mode", "hooks"),
    [
        (None, {"forward"}),
        ("exact", {"forward"}),
        (" FAST ", {"forward", "component_uses"}),
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
    assert [len(hooks) for hooks in HookRegistry._hooks.values()] == [1]


@pytest.mark.parametrize("version", ["0.5.22", "0.5.23.post1", "0.6.0"])
def test_another_version_is_left_alone(clean, installed, monkeypatch, caplog, version):
    found = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: version if name == "sglang" else found(name)
    )
    monkeypatch.setenv("COSMOS3_FAST", "fast")
    load()
    assert hooked() == set()
    assert f"found sglang {version}; known: sglang 0.5.23" in caplog.text


@pytest.mark.parametrize("name", engine._KNOWN_RELEASES["0.5.23"])
@pytest.mark.parametrize("change", ["modified", "missing"])
def test_a_changed_source_is_left_alone(clean, monkeypatch, tmp_path, caplog, name, change):
    """The same version with one of the files altered or gone."""
    original = Path(sglang.__file__).parent
    for file in engine._KNOWN_RELEASES["0.5.23"]:
        copy = tmp_path / file
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((original / file).read_bytes())
    monkeypatch.setattr(engine, "_source_roots", lambda: [str(tmp_path)])
    assert engine._difference_from_known() is None
    if change == "modified":
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes() + b"\n")
    else:
        (tmp_path / name).unlink()
    engine.register()
    assert dict(HookRegistry._hooks) == {}
    wording = {"modified": "with a modified", "missing": "without the source file"}[change]
    assert f"found sglang 0.5.23 {wording} {name}" in caplog.text
