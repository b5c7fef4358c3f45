"""Collected only where vLLM-Omni is installed: its requirements exclude the other suites'."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

collect_ignore_glob = []
_SPEC = importlib.util.find_spec("vllm_omni")
if _SPEC is None or not _SPEC.submodule_search_locations:
    collect_ignore_glob.append("test_*.py")
else:
    # At these sizes two threads that other processes disturb are ten times slower than one.
    torch.set_num_threads(1)
    # Importing these packages starts the whole server; their modules are found without it.
    _ROOT = Path(_SPEC.submodule_search_locations[0])
    for _NAME in ("vllm_omni.entrypoints", "vllm_omni.entrypoints.openai"):
        _STUB = ModuleType(_NAME)
        _STUB.__path__ = [str(_ROOT.joinpath(*_NAME.split(".")[1:]))]
        sys.modules[_NAME] = _STUB


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """vLLM-Omni's registry; what is registered during a test is forgotten after it."""
    from vllm_omni.diffusion import registry

    tables = [name for name, value in vars(registry).items() if name.startswith("_DIFFUSION_")]
    for name in tables:
        monkeypatch.setattr(registry, name, dict(getattr(registry, name)))
    models = registry.DiffusionModelRegistry
    monkeypatch.setattr(models, "models", dict(models.models))
    return registry
