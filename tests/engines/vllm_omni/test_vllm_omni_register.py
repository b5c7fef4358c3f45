"""What vLLM-Omni's own plugin loader and registry make of the entry point."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import omni_stubs
import pytest
from omni_pipeline import EnginePipeline
from vllm_omni import plugins
from vllm_omni.diffusion.cache.cachedit.model_specific import CUSTOM_DIT_ENABLERS
from vllm_omni.diffusion.cache.seacache.backend import CUSTOM_SEACACHE_ENABLERS
from vllm_omni.diffusion.models.cosmos3 import pipeline_cosmos3

from cosmos3_fast.engines import vllm_omni as adapter
from cosmos3_fast.engines.common import MODE_VARIABLE
from cosmos3_fast.engines.vllm_omni_pipeline import Cosmos3OmniDiffusersPipeline as FastPipeline

GROUP = "vllm_omni.general_plugins"
ARCHITECTURES = ["Cosmos3OmniDiffusersPipeline", "Cosmos3OmniPipeline"]
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's metadata for this group as an installation would have it."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [f"{name} = {value}" for name, value in project["entry-points"][GROUP].items()]
    metadata = tmp_path / "cosmos3_fast-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: cosmos3-fast\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *lines, ""]))
    monkeypatch.syspath_prepend(str(tmp_path))


def load_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """As at the start of each of the engine's processes."""
    monkeypatch.setattr(plugins, "omni_plugins_loaded", False)
    plugins.load_omni_general_plugins()


def classes(registry: ModuleType) -> list[type | None]:
    return [registry.DiffusionModelRegistry._try_load_model_cls(name) for name in ARCHITECTURES]


def tables(registry: ModuleType) -> dict[str, Any]:
    found = {k: dict(v) for k, v in vars(registry).items() if k.startswith("_DIFFUSION_")}
    return {**found, "models": dict(registry.DiffusionModelRegistry.models)}


@pytest.mark.usefixtures("entry_point")
def test_fast_serves_both_architectures(
    registry: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MODE_VARIABLE, "fast")
    assert classes(registry) == [EnginePipeline] * 2
    load_plugins(monkeypatch)
    assert classes(registry) == [FastPipeline] * 2
    assert issubclass(FastPipeline, EnginePipeline)


@pytest.mark.usefixtures("entry_point")
@pytest.mark.parametrize("mode", [None, "exact", "off", " EXACT "])
def test_other_modes_leave_the_engine_alone(
    registry: ModuleType, monkeypatch: pytest.MonkeyPatch, mode: str | None
) -> None:
    if mode is None:
        monkeypatch.delenv(MODE_VARIABLE, raising=False)
    else:
        monkeypatch.setenv(MODE_VARIABLE, mode)
    before, pipeline = tables(registry), dict(vars(EnginePipeline))
    load_plugins(monkeypatch)
    assert tables(registry) == before
    assert dict(vars(EnginePipeline)) == pipeline
    assert classes(registry) == [EnginePipeline] * 2


def test_in_a_fresh_process() -> None:
    """The adapter is imported by name, before anything else of vLLM-Omni's diffusion is."""
    script = (
        "import sys, omni_stubs\n"
        "from cosmos3_fast.engines.vllm_omni import register\n"
        "assert not {'vllm', 'vllm_omni'} & set(sys.modules), 'imported too early'\n"
        "register()\n"
        "from vllm_omni.diffusion.registry import DiffusionModelRegistry\n"
        f"for name in {ARCHITECTURES!r}:\n"
        "    print(DiffusionModelRegistry._try_load_model_cls(name).__module__)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        env={
            **os.environ,
            MODE_VARIABLE: "fast",
            "PYTHONPATH": str(Path(omni_stubs.__file__).parent),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-2:] == [FastPipeline.__module__] * 2


def test_twice_is_once(registry: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MODE_VARIABLE, "fast")
    adapter.register()
    once = tables(registry)
    adapter.register()
    assert tables(registry) == once
    # The models are compared by identity too: nothing was registered anew.
    models = registry.DiffusionModelRegistry.models
    assert all(models[name] is once["models"][name] for name in ARCHITECTURES)


def test_processing_functions_are_the_engines(
    registry: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MODE_VARIABLE, "fast")
    adapter.register()
    seen = []
    for name in adapter._PROCESSING.values():
        original = getattr(pipeline_cosmos3, name)
        ours = sys.modules[FastPipeline.__module__]
        assert getattr(ours, name) is original
        monkeypatch.setattr(ours, name, lambda config, name=name: seen.append((name, config)))
    for architecture in ARCHITECTURES:
        config = SimpleNamespace(model_class_name=architecture)
        registry.get_diffusion_pre_process_func(config)
        registry.get_diffusion_post_process_func(config)
        registry.get_diffusion_ir_op_priority_func(config)
        assert seen == [(name, config) for name in adapter._PROCESSING.values()]
        seen.clear()


def test_cache_backends_still_find_the_pipeline() -> None:
    name = FastPipeline.__name__
    assert CUSTOM_DIT_ENABLERS[name] is CUSTOM_DIT_ENABLERS[EnginePipeline.__name__]
    assert CUSTOM_SEACACHE_ENABLERS[name] is CUSTOM_SEACACHE_ENABLERS[EnginePipeline.__name__]


def test_a_mode_that_does_not_exist(registry: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MODE_VARIABLE, "quick")
    before = tables(registry)
    with pytest.raises(ValueError, match=r"COSMOS3_FAST must be one of .*, got 'quick'"):
        adapter.register()
    assert tables(registry) == before


def refused(registry: ModuleType, caplog: pytest.LogCaptureFixture) -> str:
    """The warning with which `register` changes nothing."""
    before = tables(registry)
    with caplog.at_level(logging.WARNING, logger=adapter.__name__):
        adapter.register()
    assert tables(registry) == before
    (record,) = [r for r in caplog.records if r.name == adapter.__name__]
    assert record.levelno == logging.WARNING
    assert "known: vllm-omni 0.30.x" in record.getMessage()
    return record.getMessage()


@pytest.mark.parametrize("version", ["0.29.4", "0.31.0", "1.30.0", "0.3.0", "dev"])
def test_an_unknown_version(
    registry: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    version: str,
) -> None:
    monkeypatch.setenv(MODE_VARIABLE, "fast")
    monkeypatch.setattr("vllm_omni.version.__version__", version)
    assert f"found vllm-omni {version};" in refused(registry, caplog)


def test_a_patch_release_is_known(registry: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MODE_VARIABLE, "fast")
    monkeypatch.setattr("vllm_omni.version.__version__", "0.30.1.post2")
    adapter.register()
    assert classes(registry) == [FastPipeline] * 2


@pytest.mark.parametrize(
    ("method", "replacement", "wanted"),
    [
        (
            "_encode_video_tensor",
            lambda self, video_tensor: video_tensor,
            "_encode_video_tensor(self, video_tensor)",
        ),
        (
            "_encode_conditioning_image_latent",
            lambda self, image_tensor, strength: image_tensor,
            "_encode_conditioning_image_latent(self, image_tensor, strength)",
        ),
        ("_to_vae_device", None, "without Cosmos3OmniDiffusersPipeline._to_vae_device"),
    ],
)
def test_a_pipeline_of_another_structure(
    registry: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    method: str,
    replacement: Any,
    wanted: str,
) -> None:
    monkeypatch.setenv(MODE_VARIABLE, "fast")
    monkeypatch.setattr(EnginePipeline, method, replacement)
    assert wanted in refused(registry, caplog)


def test_a_missing_processing_function(
    registry: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(MODE_VARIABLE, "fast")
    monkeypatch.delattr(pipeline_cosmos3, "get_cosmos3_ir_op_priority_func")
    assert "without get_cosmos3_ir_op_priority_func" in refused(registry, caplog)


def test_another_plugins_pipeline_stays(
    registry: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(MODE_VARIABLE, "fast")
    registry.register_diffusion_model("Cosmos3OmniPipeline", "other.plugin", "Pipeline")
    assert "Cosmos3OmniPipeline served by other.plugin" in refused(registry, caplog)


def test_a_pipeline_that_does_not_import(
    registry: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(MODE_VARIABLE, "fast")
    name = "vllm_omni.diffusion.models.cosmos3"
    monkeypatch.delattr(sys.modules[name], "pipeline_cosmos3")
    monkeypatch.setitem(sys.modules, f"{name}.pipeline_cosmos3", None)
    assert "cannot be inspected" in refused(registry, caplog)
