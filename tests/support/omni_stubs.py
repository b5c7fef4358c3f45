"""Importing this module makes `vllm_omni.diffusion` importable without the server around it.

vLLM-Omni's model code imports single modules of `vllm_omni.entrypoints`, whose `__init__` starts
to import the whole server and what only a GPU machine has installed. Bare packages with the same
search path take their place.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

_SPEC = importlib.util.find_spec("vllm_omni")
if _SPEC is None or not _SPEC.submodule_search_locations:
    raise ModuleNotFoundError("No module named 'vllm_omni'", name="vllm_omni")

for _NAME in ("vllm_omni.entrypoints", "vllm_omni.entrypoints.openai"):
    _STUB = ModuleType(_NAME)
    _STUB.__path__ = [
        str(Path(folder).joinpath(*_NAME.split(".")[1:]))
        for folder in _SPEC.submodule_search_locations
    ]
    sys.modules.setdefault(_NAME, _STUB)
