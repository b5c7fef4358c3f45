"""Devices, poisoned allocations, and the Triton interpreter where there is no GPU."""

from __future__ import annotations

import os

import pytest
import torch

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
