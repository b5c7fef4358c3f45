"""What vLLM-Omni's own plugin loader and registry make of the entry point."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import omni_stubs
import pytest
import torch
from omni_pipeline import (
    ENCODES_ALL_FRAMES,
    EnginePipeline,
    make_pipeline,
    make_vae,
    registered,
)
from torch import Tensor
from vllm_omni import plugins

from cosmos3_fast.engines import releases
from cosmos3_fast.engines import vllm_omni as adapter
from cosmos3_fast.engines.common import MODE_VARIABLE
from cosmos3_fast.vae.live import seam
from cosmos3_fast.vae.live.patch import ATTRIBUTE
from cosmos3_fast.vae.live.paths import Choice

GROUP = "vllm_omni.general_plugins"
ARCHITECTURES = ["Cosmos3OmniDiffusersPipeline", "Cosmos3OmniPipeline"]
ROOT = Path(__file__).resolve().parents[3]
MODES = ["exact", "fast"] if ENCODES_ALL_FRAMES else ["fast"]
CHOICES = [*((mode, False) for mode in MODES), ("fast", True)]


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
    for name in ("load_weights", "_prepare_latents_i2v"):
        monkeypatch.setattr(EnginePipeline, name, getattr(EnginePipeline, name))
    monkeypatch.setattr(plugins, "omni_plugins_loaded", False)
    plugins.load_omni_general_plugins()


def patched() -> bool:
    announces = hasattr(EnginePipeline._prepare_latents_i2v, ATTRIBUTE)
    adopts = hasattr(EnginePipeline.load_weights, ATTRIBUTE)
    assert announces == (adopts and ENCODES_ALL_FRAMES)
    return adopts


@pytest.mark.usefixtures("entry_point")
def test_fast_patches_the_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MODE_VARIABLE, "fast")
    assert not patched()
    load_plugins(monkeypatch)
    assert patched()


@pytest.mark.usefixtures("entry_point")
@pytest.mark.parametrize("mode", [None, "exact", "off", " EXACT "])
def test_other_modes_patch_only_what_encodes_too_much(
    monkeypatch: pytest.MonkeyPatch, mode: str | None
) -> None:
    if mode is None:
        monkeypatch.delenv(MODE_VARIABLE, raising=False)
    else:
        monkeypatch.setenv(MODE_VARIABLE, mode)
    load_plugins(monkeypatch)
    assert patched() == (ENCODES_ALL_FRAMES and mode != "off")


@pytest.mark.parametrize("version", ["0.1.dev7+g1234567", None])
def test_a_version_that_says_nothing(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    monkeypatch.setattr(adapter, "installed", lambda engine: version)
    with registered("exact"):
        assert patched() == ENCODES_ALL_FRAMES


@pytest.mark.skipif(ENCODES_ALL_FRAMES, reason="there is something to leave out")
def test_exact_mode_does_not_import_the_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    name = EnginePipeline.__module__
    monkeypatch.delitem(sys.modules, name)
    with registered("exact"):
        assert name not in sys.modules


def test_in_a_fresh_process() -> None:
    """The adapter is imported by name, before anything else of vLLM-Omni's diffusion is."""
    script = (
        "import sys, omni_stubs\n"
        "from cosmos3_fast.engines.vllm_omni import register\n"
        "assert not {'vllm', 'vllm_omni'} & set(sys.modules), 'imported too early'\n"
        "register()\n"
        "from vllm_omni.diffusion.registry import DiffusionModelRegistry\n"
        f"for name in {ARCHITECTURES!r}:\n"
        "    served = DiffusionModelRegistry._try_load_model_cls(name)\n"
        "    print(served is None or hasattr(served.load_weights, '__wrapped__'))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        env={
            **os.environ,
            MODE_VARIABLE: "fast",
            "PYTHONPATH": os.pathsep.join(
                [str(Path(omni_stubs.__file__).parent), os.environ.get("PYTHONPATH", "")]
            ),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-2:] == ["True"] * 2


def test_twice_is_once() -> None:
    with registered("fast"):
        once = EnginePipeline.load_weights, EnginePipeline._prepare_latents_i2v
        adapter.register()
        assert (EnginePipeline.load_weights, EnginePipeline._prepare_latents_i2v) == once


def test_a_mode_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MODE_VARIABLE, "quick")
    with pytest.raises(ValueError, match=r"COSMOS3_FAST must be one of .*, got 'quick'"):
        adapter.register()
    assert not patched()


def test_a_pipeline_that_does_not_import(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(MODE_VARIABLE, "fast")
    name = "vllm_omni.diffusion.models.cosmos3"
    monkeypatch.setitem(sys.modules, f"{name}.pipeline_cosmos3", None)
    adapter.register()
    assert "no Cosmos3 pipeline" in caplog.text
    assert not patched()


@pytest.fixture
def untested(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM-Omni as a release that nobody has tried."""
    monkeypatch.setitem(releases.TESTED, "vllm-omni", ("0.0.1",))
    monkeypatch.setattr(adapter, "_gate", releases.Gate("vllm-omni"))
    monkeypatch.delenv(releases.TRUST_VARIABLE, raising=False)


@pytest.mark.usefixtures("untested")
@pytest.mark.parametrize(("mode", "clips"), CHOICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_this_release_passes_the_self_test(
    mode: str, clips: bool, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, releases.__name__)
    before = torch.get_rng_state()
    pipeline = make_pipeline(EnginePipeline, make_vae(dtype))
    state = torch.get_rng_state()
    assert torch.equal(before, state)
    with registered(mode):
        adapter._adopt(pipeline, Choice(mode, clips))
    assert seam.choice_of(pipeline.vae) == Choice(mode, clips)
    assert torch.equal(torch.get_rng_state(), state)
    assert "passed the self-test in" in caplog.text


def off_where_accelerated(method: str) -> Any:
    """The pipeline's method with another result where the VAE is accelerated."""
    original = getattr(EnginePipeline, method)

    def replacement(self: Any, *args: Any) -> Any:
        return original(self, *args) * (1.0 + seam.is_accelerated(self.vae))

    return replacement


def uses_two_frames(
    self: Any, image: Tensor, height: int, width: int, frames: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Image-to-video that uses a latent frame behind the first."""
    latent = self._encode_conditioning_video(image, frames, height, width)
    return latent[:, :, :1], latent[:, :, 1:2]


NORMALIZES = "_encode_conditioning_video" if ENCODES_ALL_FRAMES else "_normalize_vae_latent"
OTHER = "_prepare_latents_action_video" if ENCODES_ALL_FRAMES else "_prepare_latents_v2v"
CHANGES = [
    # What comes out of an accelerated VAE is normalised otherwise.
    (NORMALIZES, off_where_accelerated(NORMALIZES), "image to video: result.returned[0]"),
    ("_prepare_latents_i2v", lambda self, *args: 1 / 0, "ZeroDivisionError"),
    (OTHER, None, "TypeError"),
]
if ENCODES_ALL_FRAMES:
    CHANGES += [("_prepare_latents_i2v", uses_two_frames, "image to video: result.returned[1]")]


@pytest.mark.usefixtures("untested")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("method", "replacement", "reason"), CHANGES)
def test_an_engine_that_is_not_as_it_was_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    mode: str,
    method: str,
    replacement: Any,
    reason: str,
) -> None:
    monkeypatch.setattr(EnginePipeline, method, replacement)
    pipeline = make_pipeline(EnginePipeline, make_vae())
    with registered(mode):
        adapter._adopt(pipeline, Choice(mode, clips=False))
    assert not seam.is_accelerated(pipeline.vae)
    (warning,) = [r.getMessage() for r in caplog.records if r.name == releases.__name__]
    assert reason in warning
    assert "tested releases: 0.0.1" in warning
