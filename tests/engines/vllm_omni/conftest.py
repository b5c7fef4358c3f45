"""Collected only where vLLM-Omni is installed: its requirements exclude the other suites'."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest
import torch

collect_ignore_glob = []
if importlib.util.find_spec("vllm_omni") is None:
    collect_ignore_glob.append("test_*.py")
else:
    import omni_stubs  # noqa: F401

    # At these sizes two threads that other processes disturb are ten times slower than one.
    torch.set_num_threads(1)


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
