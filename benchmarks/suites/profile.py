"""Where an encode spends its time, and how its arithmetic compares with a matrix product's."""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.cases import DTYPES, PHOTOGRAPH, TINY_DIM, sides, vae_and_encoder
from benchmarks.harness import Figures, GateError, Suite, count_flops, measure, say
from cosmos3_fast.images.load import load_pixels


@torch.no_grad()
def profile(size: str, base_dim: int | None = None, matmul_side: int = 2048) -> Figures:
    """Per dtype: `seconds` of an encode, its `tflop` (a Winograd convolution counted as the direct
    one that it replaces), the `tflop_per_s` that makes, the `matmul_tflop_per_s` of a square matrix
    product, and the `shares` of self CPU time of each operation above half a percent.
    """
    found: dict[str, Any] = {}
    for dtype, torch_dtype in DTYPES.items():
        say(f"profile {size} {dtype} ...")
        _, ours = vae_and_encoder(dtype, base_dim)
        pixels = load_pixels(PHOTOGRAPH, *sides(size)).to(torch_dtype)
        _, operations = count_flops(lambda: ours(pixels))  # noqa: B023
        start = time.perf_counter()
        ours(pixels)
        seconds = time.perf_counter() - start
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
            ours(pixels)
        events = recorded.key_averages()
        total = sum(event.self_cpu_time_total for event in events)
        shares = {event.key: event.self_cpu_time_total / total for event in events}
        tflop = operations / 1e12
        found[dtype] = {
            "size": size,
            "seconds": seconds,
            "tflop": tflop,
            "tflop_per_s": tflop / seconds,
            "matmul_tflop_per_s": _matmul_rate(torch_dtype, matmul_side) / 1e12,
            "shares": {
                name: share
                for name, share in sorted(shares.items(), key=lambda item: -item[1])
                if share >= 0.005
            },
        }
        if not found[dtype]["shares"]:
            raise GateError(f"profile {dtype}: the profiler recorded nothing")
    return found


def _matmul_rate(dtype: torch.dtype, side: int) -> float:
    """Floating-point operations per second of the best of five products."""
    left, right = (torch.randn(side, side).to(dtype) for _ in range(2))
    timing = measure({"matmul": lambda: left @ right}, rounds=5)["matmul"]
    return 2 * side**3 / min(timing.seconds)


SUITE = Suite(
    profile,
    {
        "tiny": {"size": "32x48", "base_dim": TINY_DIM, "matmul_side": 256},
        "short": {"size": "480x832"},
        "full": {"size": "480x832"},
    },
)
