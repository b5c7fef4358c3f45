"""Measures suites and writes one result: JSON, CSV, a Markdown report and plots.

Each suite runs both sides in one process, interleaved, behind a correctness gate that ends the run
with nothing written. Run from the repository's root.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import goals
from benchmarks.harness import ROOT, commit, machine, say, versions
from benchmarks.report import draw, markdown
from benchmarks.suites import SUITES
from cosmos3_fast import __version__
from cosmos3_fast.ops import registry

COLUMNS = ("suite", "case", "dtype", "path", "median", "q10", "q90", "baseline", "speedup", "error")


def main(argv: list[str] | None = None) -> int:
    suites = list(SUITES)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    setting = parser.add_mutually_exclusive_group()
    setting.add_argument("--full", action="store_true", help="every size, more rounds (90 minutes)")
    setting.add_argument(
        "--tiny", action="store_true", help="seconds for each suite: tries them, measures nothing"
    )
    parser.add_argument("--suites", default=",".join(suites), help=f"of {', '.join(suites)}")
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "out" / "bench",
        help="folder to write (default out/bench in the source tree)",
    )
    args = parser.parse_args(argv)
    wanted = args.suites.split(",")
    if unknown := set(wanted) - set(suites):
        parser.error(f"--suites must be of {', '.join(suites)}, got {', '.join(sorted(unknown))}")
    result = run("full" if args.full else "tiny" if args.tiny else "short", wanted)
    write(result, args.out)
    print(markdown(result))
    say(f"\n{args.out}: result.json, result.csv, result.md, plots")
    return 0


def run(setting: str, wanted: list[str]) -> dict[str, Any]:
    """The result of the suites wanted.

    Raises:
        GateError: a path computes something else than its reference.
    """
    start = time.monotonic()
    result: dict[str, Any] = {
        "setting": setting,
        "machine": machine(),
        "load_before": os.getloadavg()[0],
        "versions": {"cosmos3_fast": __version__, **versions("torch", "diffusers", "triton")},
        "kernels": {op: registry.default_backend("cpu", op) for op in registry.OPS},
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "rows": [],
    }
    for name, suite in SUITES.items():
        if name not in wanted:
            continue
        made = suite.run(**suite.settings[setting])
        if isinstance(made, dict):
            result[name] = made
        else:
            result["rows"] += made
    result["goals"] = goals.judge(result)
    result["minutes"] = round((time.monotonic() - start) / 60, 1)
    return result


def write(result: dict[str, Any], out: Path) -> None:
    """result.json, result.csv, result.md and the plots, in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "result.md").write_text(markdown(result) + "\n")
    with (out / "result.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(result["rows"])
    draw(result, out)


if __name__ == "__main__":
    sys.exit(main())
