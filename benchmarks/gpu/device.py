"""What the steps of the GPU campaign share: their context, timing, launches and memory."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness import Call, Timing, cuda_clock, l2_bytes, measure

NOT_MEASURED = "not measured: dry run"
Result = dict[str, Any]


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
        flush: see `cuda_clock`.
        per_call: what one call repeats; figures are for one of these.

    Returns:
        A `figure` for each path; in a dry run each is called once and says so.
    """
    if context.dry_run:
        for run in paths.values():
            run()
        return dict.fromkeys(paths, NOT_MEASURED)
    clock, estimate = cuda_clock(flush), 0.0
    for run in paths.values():
        waits = [clock(run, 1) for _ in range(warmup)]
        estimate += waits[-1]()
    rounds = min(most, max(least, int(seconds / max(estimate, 1e-6))))
    timings = measure(paths, rounds=rounds, warmup=0, clock=clock)
    return {name: figure(timing.seconds, per_call) for name, timing in timings.items()}


def sets_beyond_l2(bytes_per_call: int) -> int:
    """How many input sets it takes to move four times the L2 cache."""
    return max(4, math.ceil(4 * l2_bytes() / bytes_per_call))


def launches(context: Context, call: Call) -> Any:
    """What one call puts on the device, by torch.profiler."""
    if context.dry_run:
        return NOT_MEASURED
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


# What a kernel of a clip does, by its name; the first that fits. The rest are torch's own.
KERNEL_KINDS = {
    "transform_frames": r"cosmos3::.*transform_",
    "other kernels of this package": r"cosmos3::",
    "copies, fills and layouts": r"Memcpy|Memset|copy|Copy|CatArray|Fill|nchwTo|nhwcTo|convertTensor",
    "convolutions": r"fprop|cudnn|implicit|xmma|cutlass|gemm|conv",
    "attention": r"fmha|softmax|nvjet",
}


def kernel_kind(name: str) -> str:
    fits = (kind for kind, pattern in KERNEL_KINDS.items() if re.search(pattern, name))
    return next(fits, "others")


def kernel_times(context: Context, call: Call, calls: int = 5) -> Any:
    """The kernels of one call by the device time they take together, longest first, and by kind."""
    if context.dry_run:
        return NOT_MEASURED
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    spent: dict[str, list[float]] = {}
    kinds: dict[str, float] = {}
    for event in profiled.events():
        if event.device_type == DeviceType.CUDA:
            spent.setdefault(event.name[:160], []).append(event.device_time)
            kind = kernel_kind(event.name)
            kinds[kind] = kinds.get(kind, 0.0) + event.device_time / calls
    total = sum(map(sum, spent.values())) / calls
    longest = sorted(spent, key=lambda name: -sum(spent[name]))[:30]
    return {
        "device_us": total,
        "kinds_us": kinds,
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


def peak_memory(context: Context, call: Call) -> Any:
    """Bytes on the device that one call allocates, and reserves, on top of what was there."""
    if context.dry_run:
        call()
        return NOT_MEASURED
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    result = call()
    torch.cuda.synchronize()
    del result
    return {
        "allocated": torch.cuda.max_memory_allocated() - allocated,
        "reserved": torch.cuda.max_memory_reserved() - reserved,
    }


def peak_bytes(context: Context, call: Call) -> Any:
    """`peak_memory`, what is allocated."""
    peak = peak_memory(context, call)
    return peak if context.dry_run else peak["allocated"]


def resident_bytes(module: torch.nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
