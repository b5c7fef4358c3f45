"""What the steps of the GPU campaign share: their context, device timing, launches, memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.harness import Timing

NOT_MEASURED = "not measured: dry run"
Result = dict[str, Any]
Call = Callable[[], object]
T = TypeVar("T")


class Skipped(Exception):
    """A step, or a part of one, that cannot run here; the text says why."""


@dataclass(frozen=True)
class Context:
    """Where a step runs.

    Attributes:
        dry_run: run on the CPU at tiny sizes and measure nothing.
        scratch: a folder for files, gone when the command ends.
        cache: a folder for files that the next command takes too.
        earlier: results of the steps before, by name.
    """

    dry_run: bool
    scratch: Path
    cache: Path
    earlier: Mapping[str, Result]

    @property
    def device(self) -> str:
        return "cpu" if self.dry_run else "cuda"

    def ceiling(self, name: str) -> float | None:
        """A figure of the ceilings step, None where it has not run."""
        return self.earlier.get("ceilings", {}).get(name)


@dataclass(frozen=True)
class Step:
    """One step: yields parts of its result as it has them; each is written to the file.

    Attributes:
        limit_s: its time limit.
        gpu_only: a dry run has nothing to do in it.
    """

    run: Callable[[Context], Iterator[Result]]
    limit_s: float
    gpu_only: bool = False


@contextmanager
def tuned(plans: int = 10) -> Iterator[None]:
    """Inside, cuDNN measures which of so many plans serves a shape best; 0: of all it has.

    Ten are torch's default. Its plans are kept per thread, whatever this switch says later: what
    ran untuned in a thread stays so there. Untuned figures therefore come first, or from a process
    of their own.
    """
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit
    torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit = True, plans
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit = before


def figure(seconds: Sequence[float], per_call: int = 1) -> Result:
    """Quantiles in microseconds of rounds of `per_call` calls each."""
    timing = Timing(tuple(second / per_call for second in seconds))
    quantiles = {"p10_us": 0.1, "median_us": 0.5, "p90_us": 0.9}
    return {
        **{name: timing.quantile(q) * 1e6 for name, q in quantiles.items()},
        "min_us": min(timing.seconds) * 1e6,
        "rounds": len(seconds),
    }


def median_s(timed: Result) -> float:
    return timed["median_us"] / 1e6


def l2_bytes() -> int:
    return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size


def time_calls(
    context: Context,
    paths: Mapping[str, Call],
    *,
    seconds: float = 1.5,
    flush: bool = True,
    per_call: int = 1,
    warmup: int = 3,
    least: int = 5,
    most: int = 200,
) -> dict[str, Any]:
    """Time paths between CUDA events in interleaved rounds, after a warm-up.

    Args:
        seconds: about how long all rounds together may take; bounded by `least` and `most`.
        flush: overwrite the L2 cache before each call. The host enqueues meanwhile, so that the
            time of a call in a few launches is the device's; one of many launches is timed as
            it is served, with whatever gaps the launches leave.
        per_call: what one call repeats; figures are for one of these.

    Returns:
        A `figure` for each path; in a dry run each is called once and says so.
    """
    if context.dry_run:
        for run in paths.values():
            run()
        return dict.fromkeys(paths, NOT_MEASURED)
    scratch = torch.empty(2 * l2_bytes() if flush else 1, dtype=torch.uint8, device="cuda")

    def once(run: Call) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        scratch.zero_()
        start.record()
        result = run()
        end.record()
        del result
        return start, end

    estimate = 0.0
    for run in paths.values():
        for _ in range(warmup):
            start, end = once(run)
        end.synchronize()
        estimate += start.elapsed_time(end) / 1e3
    rounds = min(most, max(least, int(seconds / max(estimate, 1e-6))))
    samples: dict[str, list[float]] = {name: [] for name in paths}
    for i in range(rounds):
        order = list(paths) if i % 2 == 0 else list(reversed(paths))
        pairs = {name: once(paths[name]) for name in order}
        torch.cuda.synchronize()
        for name, (start, end) in pairs.items():
            samples[name].append(start.elapsed_time(end) / 1e3)
    return {name: figure(values, per_call) for name, values in samples.items()}


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


def sets_beyond_l2(bytes_per_call: int) -> int:
    """How many input sets it takes to move four times the L2 cache."""
    return max(4, math.ceil(4 * l2_bytes() / bytes_per_call))


def launches(context: Context, call: Call) -> Any:
    """What one call puts on the device, by torch.profiler."""
    if context.dry_run:
        return NOT_MEASURED
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize()
    names = [e.name for e in profiled.events() if e.device_type == DeviceType.CUDA]
    copies = [name for name in names if name.startswith(("Memcpy", "Memset"))]
    kernels = [name for name in names if name not in copies]
    return {
        "kernels": len(kernels),
        "copies_and_sets": len(copies),
        "names": sorted({name[:80] for name in kernels})[:12],
    }


def kernel_times(context: Context, call: Call, calls: int = 5) -> Any:
    """The kernels of one call by the device time they take together, longest first."""
    if context.dry_run:
        return NOT_MEASURED
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    spent: dict[str, list[float]] = {}
    for event in profiled.events():
        if event.device_type == DeviceType.CUDA:
            spent.setdefault(event.name[:160], []).append(event.device_time)
    total = sum(map(sum, spent.values())) / calls
    longest = sorted(spent, key=lambda name: -sum(spent[name]))[:30]
    return {
        "device_us": total,
        "each": [
            {
                "name": name,
                "launches": len(spent[name]) / calls,
                "us": sum(spent[name]) / calls,
                "share": sum(spent[name]) / calls / total,
            }
            for name in longest
        ],
    }


def peak_bytes(context: Context, call: Call) -> Any:
    """Device memory that one call allocates at its peak, on top of what was there."""
    if context.dry_run:
        call()
        return NOT_MEASURED
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def resident_bytes(module: torch.nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


def count_flops(call: Callable[[], T]) -> tuple[T, int]:
    """What one call returns, and the operations of its convolutions, products and attention."""
    from torch.utils.flop_counter import FlopCounterMode

    # The counter's own formula of a product takes no dtype of its result.
    def product(a: Sequence[int], b: Sequence[int], *_: Any, **__: Any) -> int:
        return 2 * math.prod(a) * b[-1]

    mapping = {torch.ops.aten.bmm: product}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        result = call()
    return result, counter.get_total_flops()
