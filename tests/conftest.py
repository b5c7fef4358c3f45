"""Devices, threads, poisoned allocations, and the Triton interpreter where there is no GPU."""

from __future__ import annotations

import os

import pytest
import torch

# What is tested here is so small that further threads only wait for each other; a script that a
# test starts inherits this. tests/ops/test_threads.py runs the kernels with more.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Before anything imports Triton: its kernels then run on CPU tensors.
    os.environ["TRITON_INTERPRET"] = "1"

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="torch sees no GPU")],
    ),
]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def poison():
    """Every allocation starts as NaN, so that an element left unwritten is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
