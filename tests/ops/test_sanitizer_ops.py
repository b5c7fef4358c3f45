"""The program that compute-sanitizer runs on a GPU, without one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import sanitizer_ops

from cosmos3_fast import ops
from cosmos3_fast.ops import registry

CUDA_SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"


def test_the_sanitized_program_runs_every_op_that_has_gpu_code(monkeypatch: pytest.MonkeyPatch):
    # The other backends' values are the business of the op tests.
    made = sanitizer_ops.check("cpu", ("triton" if registry.LIBRARY_ERROR else "cpp",))
    served = {name for name in registry.OPS if (name, "triton") in registry._python_kernels}
    if not registry.LIBRARY_ERROR:
        for source in CUDA_SOURCES.glob("*.cu"):
            served |= set(re.findall(r'm\.impl\("(\w+)', source.read_text()))
    assert {name.split()[0] for name in made} == served
    right = ops.pack_pixels
    monkeypatch.setattr(ops, "pack_pixels", lambda *args, **kw: right(*args, **kw) + 0.25)
    with pytest.raises(AssertionError, match="pack_pixels"):
        sanitizer_ops.check("cpu")
