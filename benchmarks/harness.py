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
    repeats: int = 1,
    progress: bool = False,
) -> dict[str, Timing]:
    """Time paths in interleaved rounds, so that a drift of the machine falls on all of them alike.

    The order turns round every other round. A CUDA device is synchronised around each call.

    Args:
        paths: Name to a call without arguments; its result is dropped outside the timed interval.
        rounds: Timed calls of each path, at least 1.
        warmup: Untimed calls of each path beforehand.
        repeats: For calls that are short against a timer or a scheduler: each round times this many
            calls back to back, results dropped inside the interval, after one untimed call that
            leaves caches and allocator in the path's own state. The seconds are those of one call.
        progress: One line on stderr per round and path.
    """
    if rounds < 1 or repeats < 1:
        raise ValueError(f"rounds and repeats must be at least 1, got {rounds} and {repeats}")
    for _ in range(warmup):
        for run in paths.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in paths}
    for i in range(rounds):
        order = list(paths) if i % 2 == 0 else list(reversed(paths))
        for name in order:
            seconds[name].append(_timed(paths[name], repeats))
            if progress:
                print(
                    f"round {i + 1} of {rounds}: {name}, {seconds[name][-1]:.3f} s", file=sys.stderr
                )
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def _timed(run: Callable[[], object], repeats: int) -> float:
    if repeats == 1:
        _synchronize()
        start = time.perf_counter()
        result = run()
        _synchronize()
        seconds = time.perf_counter() - start
        del result
        return seconds
    run()
    _synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    _synchronize()
    return (time.perf_counter() - start) / repeats


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


def gate_rounding(
    name: str, ours: torch.Tensor, reference: torch.Tensor, exact: torch.Tensor
) -> tuple[float, float]:
    """Abort unless ours is as near to ``exact`` as the reference is, which has its dtype.

    Returns:
        The rms errors of ours and of the reference, relative to the rms of ``exact``.
    """
    if ours.shape != reference.shape or ours.dtype != reference.dtype:
        raise GateError(
            f"{name}: {list(ours.shape)} {ours.dtype} against "
            f"{list(reference.shape)} {reference.dtype}"
        )
    truth = exact.double()
    scale = truth.square().mean().sqrt()
    mine, theirs = (
        ((each.double() - truth).square().mean().sqrt() / scale).item()
        for each in (ours, reference)
    )
    if not mine <= theirs:
        raise GateError(f"{name}: rms error {mine:.2e} exceeds the reference's own, {theirs:.2e}")
    return mine, theirs


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
