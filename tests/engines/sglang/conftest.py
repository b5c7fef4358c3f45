"""Collected only where SGLang is installed: its requirements exclude the other suites'."""

from __future__ import annotations

import importlib.util

collect_ignore_glob = []
if importlib.util.find_spec("sglang") is None:
    collect_ignore_glob.append("test_*.py")
else:
    import sglang_stage  # noqa: F401  before any test module imports SGLang
