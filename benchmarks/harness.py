"""What all benchmarks share: interleaved rounds, clocks, gates, the machine, the commit."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from cosmos3_fast.vae import verify
from cosmos3_fast.vae.verify import FLOAT32_BOUND, Comparison

ROOT = Path(__file__).resolve().parent.parent
Call = Callable[[], object]
# Starts so many calls and returns what waits for them and gives the seconds that each took.
Clock = Callable[[Call, int], Callable[[], float]]


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


def host_clock(run: Call, repeats: int = 1) -> Callable[[], float]:
    """Seconds of the host's clock, a CUDA device synchronised around the calls.

    Repeated calls follow one that is not timed.
    """
    if repeats > 1:
        run()
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        result = run()
    synchronize()
    seconds = (time.perf_counter() - start) / repeats
    del result
    return lambda: seconds


def synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def measure(
    paths: Mapping[str, Call],
    *,
    rounds: int,
    warmup: int = 1,
    repeats: int = 1,
    progress: bool = False,
    clock: Clock = host_clock,
) -> dict[str, Timing]:
    """Time paths in interleaved rounds, so that a drift of the machine falls on all of them alike.

    The order turns round every other round.

    Args:
        paths: name to call; the result of a call is dropped.
        rounds: timed rounds, at least 1.
        warmup: untimed rounds before them.
        repeats: calls per path and round, at least 1; a round's figure is their mean.
        progress: name each round's figures on stderr.
        clock: what times a call; a path's calls are waited for only at the end of the round.
    """
    if rounds < 1 or repeats < 1:
        raise ValueError(f"rounds and repeats must be at least 1, got {rounds} and {repeats}")
    for _ in range(warmup):
        for run in paths.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in paths}
    for i in range(rounds):
        order = list(paths) if i % 2 == 0 else list(reversed(paths))
        for name, wait in [(name, clock(paths[name], repeats)) for name in order]:
            seconds[name].append(wait())
            if progress:
                figure = f"{name}, {seconds[name][-1]:.3f} s"
                print(f"round {i + 1} of {rounds}: {figure}", file=sys.stderr)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def _same_kind(name: str, ours: torch.Tensor, reference: torch.Tensor) -> None:
    if ours.shape != reference.shape or ours.dtype != reference.dtype:
        raise GateError(
            f"{name}: {list(ours.shape)} {ours.dtype} against "
            f"{list(reference.shape)} {reference.dtype}"
        )


def gate_error(
    name: str, ours: torch.Tensor, reference: torch.Tensor, bound: float = FLOAT32_BOUND
) -> float:
    """`verify.relative_error`; aborts where it exceeds `bound`, or shapes or dtypes differ."""
    _same_kind(name, ours, reference)
    error = verify.relative_error(ours, reference)
    # Written so that NaN fails too.
    if not error <= bound:
        raise GateError(f"{name}: error {error:.2e} of the largest value exceeds {bound:.2e}")
    return error


def gate_rounding(
    name: str, ours: torch.Tensor, reference: torch.Tensor, exact: torch.Tensor | None = None
) -> Comparison:
    """`verify.compare`, the rule of the dtype; aborts where it does not pass.

    Args:
        exact: of the reference without its rounding; needed in 16 bits.
    """
    _same_kind(name, ours, reference)
    compared = verify.compare(ours, reference, exact)
    if not compared.passed:
        raise GateError(
            f"{name}: {compared.measure} {compared.error:.2e} exceeds {compared.bound:.2e}"
        )
    return compared


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


def versions(*packages: str) -> dict[str, str]:
    """Of installed packages; "none" for those that are not."""
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def commit() -> str:
    """What is measured, marked where the tree differs; "unknown" without a repository."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        described = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return described.stdout.strip() or "unknown"
