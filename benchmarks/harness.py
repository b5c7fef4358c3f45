"""What all benchmarks share: interleaved rounds by a clock, gates, rows, the machine, the commit.

The clock is the host's, or a GPU's: CUDA events between calls that the host only enqueues, or the
replay of CUDA graphs, which takes the host out of the figure.
"""

from __future__ import annotations

import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import cosmos3_fast.ops  # noqa: F401 - registers those that are counted
from cosmos3_fast.vae import verify
from cosmos3_fast.vae.verify import FLOAT32_BOUND, Comparison

ROOT = Path(__file__).resolve().parent.parent
T = TypeVar("T")
Call = Callable[[], object]
Row = dict[str, Any]
Figures = dict[str, Any]
# Starts so many calls and returns what waits for them and gives the seconds that each took.
Clock = Callable[[Call, int], Callable[[], float]]


@dataclass(frozen=True)
class Suite:
    """What is measured, and at which sizes.

    Attributes:
        run: called with the arguments of a setting. It yields rows (see `timed_rows`), or returns
            figures of a form of its own, which `report.FIGURES` shows.
        settings: arguments of `run` for "tiny", "short" and "full". "tiny" takes seconds and shows
            only that the suite works.
    """

    run: Callable[..., Iterator[Row] | Figures]
    settings: Mapping[str, Mapping[str, Any]]


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
    """Seconds of the host's clock, a CUDA device synchronized around the calls.

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


def l2_bytes() -> int:
    return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size


def cuda_clock(flush: bool = True) -> Clock:
    """Seconds between CUDA events, of calls that the host only enqueues.

    Args:
        flush: overwrite the L2 cache before each call. The host enqueues meanwhile, so that the
            time of a call in a few launches is the device's; one of many launches is timed as
            it is served, with whatever gaps the launches leave.
    """
    scratch = torch.empty(2 * l2_bytes() if flush else 1, dtype=torch.uint8, device="cuda")

    def clock(run: Call, repeats: int = 1) -> Callable[[], float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        scratch.zero_()
        start.record()
        for _ in range(repeats):
            run()
        end.record()

        def wait() -> float:
            end.synchronize()
            return start.elapsed_time(end) / 1e3 / repeats

        return wait

    return clock


@contextmanager
def tuned(plans: int = 10) -> Iterator[None]:
    """Inside, cuDNN measures which of so many plans serves a shape best.

    Ten are torch's default. Its plans are kept per thread, whatever this switch says later: what
    ran untuned in a thread stays so there.
    """
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit
    torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit = True, plans
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit = before


class Graphed:
    """A network replayed as a CUDA graph, captured for each shape and dtype of its input.

    For one stream: a replay writes where the one before did, and a copy of that is returned.
    """

    def __init__(self, network: Callable[[Tensor], Tensor]) -> None:
        self._network = network
        self._graphs: dict[Any, tuple[Tensor, torch.cuda.CUDAGraph, Tensor]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)

    def __call__(self, given: Tensor) -> Tensor:
        key = given.shape, given.dtype
        if key not in self._graphs:
            self._graphs[key] = self._captured(given.clone())
        static, graph, result = self._graphs[key]
        static.copy_(given)
        graph.replay()
        return result.clone()

    def _captured(self, static: Tensor) -> tuple[Tensor, torch.cuda.CUDAGraph, Tensor]:
        with tuned(torch.backends.cudnn.benchmark_limit or 0):
            # As torch asks: what is captured has run before, on a stream beside the current one.
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._network(static)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = self._network(static)
        return static, graph, result


def rotating_graph(call: Callable[..., object], inputs: Sequence[tuple[Any, ...]]) -> Call:
    """A graph of `call` on each of `inputs`, keeping every output apart.

    Its replay time over `len(inputs)` is the device time of one call without launch overhead; with
    inputs and outputs several times the L2 cache, each call finds its own evicted.
    """
    call(*inputs[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [call(*each) for each in inputs]

    def replay(outputs: list[object] = outputs) -> None:
        graph.replay()

    return replay


def count_flops(call: Callable[[], T]) -> tuple[T, int]:
    """What one call returns, and the operations of its convolutions, products and attention.

    A Winograd convolution counts as the direct one that it replaces.
    """

    # The counter's own formula of a product takes no dtype of its result.
    def product(a: Sequence[int], b: Sequence[int], *_: Any, **__: Any) -> int:
        return 2 * math.prod(a) * b[-1]

    def winograd(
        x: Sequence[int], weight: Any, *_: Any, out_shape: Sequence[int], **__: Any
    ) -> int:
        return 2 * 9 * math.prod(x) * out_shape[1]

    ops = {torch.ops.aten.bmm: product, torch.ops.cosmos3.winograd_conv3x3: winograd}
    counter: Any = FlopCounterMode(display=False, custom_mapping=ops)
    counter.mod_tracker = _Total()
    with counter:
        result = call()
    return result, counter.get_total_flops()


class _Total:
    """In place of torch's tracker of modules, which hooks them all: an accelerated VAE would run
    its own code."""

    parents = ("Global",)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *raised: object) -> None:
        pass


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


def timed_rows(
    suite: str,
    case: str,
    dtype: str,
    paths: Mapping[str, Call],
    baseline: str,
    *,
    rounds: int,
    repeats: int = 1,
    errors: Mapping[str, float] | None = None,
) -> list[Row]:
    """Time paths that the gate has called already; one row each.

    Returns:
        {"suite", "case", "dtype", "path", "seconds", "median", "q10", "q90", "baseline",
        "speedup", "error"}. `speedup` is the median of the path named `baseline` over this path's,
        in the same rounds. `error` is, in float32, the largest difference from the reference over
        its largest value; in bfloat16 the rms error against a float32 run of the same weights over
        the rms.
    """
    label = f"{suite} {case} {dtype}"
    say(f"{label} ...")
    timings = measure(paths, rounds=rounds, warmup=0, repeats=repeats)
    say(f"{label}: " + ", ".join(f"{name} {t.median:.3g} s" for name, t in timings.items()))
    return [
        {
            "suite": suite,
            "case": case,
            "dtype": dtype,
            "path": name,
            "seconds": list(timing.seconds),
            "median": timing.median,
            "q10": timing.quantile(0.1),
            "q90": timing.quantile(0.9),
            "baseline": baseline,
            "speedup": timings[baseline].median / timing.median,
            "error": (errors or {}).get(name),
        }
        for name, timing in timings.items()
    ]


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def _same_kind(name: str, ours: Tensor, reference: Tensor) -> None:
    if ours.shape != reference.shape or ours.dtype != reference.dtype:
        raise GateError(
            f"{name}: {list(ours.shape)} {ours.dtype} against "
            f"{list(reference.shape)} {reference.dtype}"
        )


def gate_error(name: str, ours: Tensor, reference: Tensor, bound: float = FLOAT32_BOUND) -> float:
    """`verify.relative_error`; aborts where it exceeds `bound`, or shapes or dtypes differ."""
    _same_kind(name, ours, reference)
    error = verify.relative_error(ours, reference)
    # Written so that NaN fails too.
    if not error <= bound:
        raise GateError(f"{name}: error {error:.2e} of the largest value exceeds {bound:.2e}")
    return error


def gate_rounding(
    name: str, ours: Tensor, reference: Tensor, exact: Tensor | None = None
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


def gate_paths(
    name: str,
    paths: Mapping[str, Callable[[], Tensor]],
    reference: str,
    plain: str,
    exact: Tensor | None = None,
) -> dict[str, float]:
    """The errors of all paths by the rule of their dtype; in 16 bits the reference's own too.

    Args:
        plain: a path that is held to computing the same, not to the reference's own rounding.
        exact: as for `gate_rounding`.
    """
    wanted, errors = paths[reference](), {}
    for path, run in paths.items():
        if path == plain:
            bound = FLOAT32_BOUND if exact is None else 0.1
            error = gate_error(f"{name}, {path}", run(), wanted, bound)
            if exact is None:
                errors[path] = error
        elif path != reference:
            compared = gate_rounding(f"{name}, {path}", run(), wanted, exact)
            errors[path] = compared.error
            if exact is not None:
                errors[reference] = compared.bound
    return errors


def gate_equal(name: str, ours: Tensor, reference: Tensor) -> None:
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
