"""Collected only where SGLang is installed: its requirements exclude the other suites'."""

from __future__ import annotations

import importlib.util

import pytest
import torch

collect_ignore_glob = []
if importlib.util.find_spec("sglang") is None:
    collect_ignore_glob.append("test_*.py")
else:
    # At these sizes two threads that other processes disturb are ten times slower than one.
    torch.set_num_threads(1)
    import sglang_engine  # before any test module imports SGLang

    if not sglang_engine.HAS_PLUGINS:
        collect_ignore_glob.append("test_plugin.py")


@pytest.fixture
def conditioning():
    """SGLang's cache of encodings, which its releases before 0.5.21 have not."""
    return pytest.importorskip("sglang.multimodal_gen.runtime.cache.conditioning")
