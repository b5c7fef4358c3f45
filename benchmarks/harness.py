"""Shared by the benchmarks: correctness gates, interleaved rounds, quantiles, the machine."""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch


class GateError(SystemExit):
    """A path computes something else than its reference: its timing would mean nothing."""

    def __init__(self, message: str) -> None:
        super().__init__(f"correctness gate failed: {message}")


@dataclass(frozen=True)
class Timing:
    """Seconds of each round of one path, in the order they ran."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def quantile(self, q: float) -> float:
        """The q-quantile, 0 <= q <= 1, interpolated between rounds."""
        ordered = sorted(self.seconds)
        position = q * (len(ordered) - 1)
        below = int(position)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (ordered[above] - ordered[below]) * (position - below)

    @property
    def spread(self) -> float:
        """(largest - smallest) / median."""
        return (max(self.seconds) - min(self.seconds)) / self.median


def measure(
    paths: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 1,
    progress: bool = False,
) -> dict[str, Timing]:
    """Time paths in interleaved rounds, so that a drift of the machine falls on all of them alike.

    The order turns round every other round. A CUDA device is synchronised around each call.

    Args:
        paths: Name to a call without arguments; its result is dropped outside the timed interval.
        rounds: Timed calls of each path, at least 1.
        warmup: Untimed calls of each path beforehand.
        progress: One line on stderr per timed call.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    for _ in range(warmup):
        for run in paths.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in paths}
    for i in range(rounds):
        order = list(paths) if i % 2 == 0 else list(reversed(paths))
        for name in order:
            _synchronize()
            start = time.perf_counter()
            result = paths[name]()
            _synchronize()
            seconds[name].append(time.perf_counter() - start)
            del result
            if progress:
                print(
                    f"round {i + 1} of {rounds}: {name}, {seconds[name][-1]:.3f} s", file=sys.stderr
                )
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """max |ours - reference| / max |reference|, in float64."""
    ours, reference = ours.double(), reference.double()
    return ((ours - reference).abs().max() / reference.abs().max()).item()


def gate_error(name: str, ours: torch.Tensor, reference: torch.Tensor, bound: float) -> float:
    """`relative_error`, or abort where shapes or dtypes differ or it exceeds ``bound``."""
    if ours.shape != reference.shape or ours.dtype != reference.dtype:
        raise GateError(
            f"{name}: {list(ours.shape)} {ours.dtype} against "
            f"{list(reference.shape)} {reference.dtype}"
        )
    error = relative_error(ours, reference)
    # Written so that NaN fails too.
    if not error <= bound:
        raise GateError(f"{name}: error {error:.2e} of the largest value exceeds {bound:.2e}")
    return error


def gate_equal(name: str, ours: torch.Tensor, reference: torch.Tensor) -> None:
    """Abort where two tensors are not equal in shape, dtype and every value."""
    if ours.dtype != reference.dtype or not torch.equal(ours, reference):
        raise GateError(f"{name}: values differ that must be equal")


def machine() -> str:
    """The processor, threads, GPU if one is used, and versions, in one line."""
    parts = [
        _cpu_model(),
        f"{os.cpu_count()} CPUs, {torch.get_num_threads()} threads",
        f"torch {torch.__version__}",
        f"Python {platform.python_version()}",
    ]
    if torch.cuda.is_available():
        parts.insert(0, torch.cuda.get_device_name())
    return ", ".join(parts)


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell, the first one flush left."""
    cells = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
