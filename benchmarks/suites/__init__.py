"""The suites: one file each, which registers itself by defining `SUITE`.

A suite is measured by `python -m benchmarks.run`, in the order of `Suite.order`. To add one, add a
file; its rows get a table in the report and a plot without further code.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.harness import Call, measure, say

Row = dict[str, Any]
Figures = dict[str, Any]
SETTINGS = ("tiny", "short", "full")


@dataclass(frozen=True)
class Suite:
    """What is measured, and at which sizes.

    Attributes:
        run: called with the arguments of a setting. It yields rows (see `timed_rows`), or returns
            figures of a form of its own, which `lines` shows.
        settings: arguments of `run` for each of `SETTINGS`. "tiny" takes seconds and shows only
            that the suite works.
        order: suites with smaller numbers come first.
        lines: the figures as Markdown; None for a suite of rows.
    """

    run: Callable[..., Iterator[Row] | Figures]
    settings: Mapping[str, Mapping[str, Any]]
    order: int
    lines: Callable[[Figures], list[str]] | None = None


def all_suites() -> dict[str, Suite]:
    """Every suite of this folder by the name of its file, in order."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    found = {name: importlib.import_module(f"{__name__}.{name}").SUITE for name in names}
    return dict(sorted(found.items(), key=lambda item: item[1].order))


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
