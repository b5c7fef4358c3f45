"""Measures every suite and writes one result: JSON, CSV, a Markdown report and plots.

Each suite runs both sides in one process, interleaved, behind a correctness gate that ends the run
with nothing written. The `engines` suite starts each engine's own script in the environment that
`make test-<engine>` makes, and names those that are not there.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib import metadata, util
from pathlib import Path
from typing import Any

import goals
import memory
import plots
import torch
from harness import GateError, machine
from report import markdown
from suites import FULL, SHORT, SUITES, Plan, profile

from cosmos3_fast import __version__
from cosmos3_fast.ops import registry

ROOT = Path(__file__).resolve().parent.parent
ENGINES = ("diffusers", "sglang", "vllm_omni")
# What an engine's script imports: its own environment is looked for first.
ENGINE_MODULES = {
    "diffusers": ("diffusers", "transformers"),
    "sglang": ("sglang", "cache_dit"),
    "vllm_omni": ("vllm_omni", "vllm"),
}
ALL = (*SUITES, "memory", "profile", "engines")
COLUMNS = (
    *("suite", "case", "dtype", "path", "median", "q10", "q90", "baseline", "speedup", "error"),
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cosmos3_fast bench", description=__doc__)
    parser.add_argument("--full", action="store_true", help="every size, more rounds (35 minutes)")
    parser.add_argument("--suites", default=",".join(ALL), help=f"of {', '.join(ALL)}")
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "out" / "bench",
        help="folder to write (default out/bench in the source tree)",
    )
    args = parser.parse_args(argv)
    wanted = args.suites.split(",")
    if unknown := set(wanted) - set(ALL):
        parser.error(f"--suites: unknown {', '.join(sorted(unknown))}, wanted of {', '.join(ALL)}")
    result = run(FULL if args.full else SHORT, wanted)
    write(result, args.out)
    print(markdown(result))
    print(f"\n{args.out}: result.json, result.csv, result.md, plots", file=sys.stderr)
    return 0


def run(plan: Plan, wanted: list[str]) -> dict[str, Any]:
    """The result of the suites wanted.

    Raises:
        GateError: a path computes something else than its reference.
    """
    start = time.monotonic()
    result: dict[str, Any] = {
        "setting": plan.name,
        "machine": machine(),
        "load_before": os.getloadavg()[0],
        "versions": versions(),
        "kernels": {op: registry.default_backend("cpu", op) for op in registry.OPS},
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "rows": [],
    }
    for name, suite in SUITES.items():
        if name in wanted:
            result["rows"] += suite(plan)
    if "memory" in wanted:
        result["memory"] = memory.compare()
    if "profile" in wanted:
        result["profile"] = profile(plan)
    if "engines" in wanted:
        result["engines"] = {engine: run_engine(engine, plan) for engine in ENGINES}
    result["goals"] = goals.judge(result)
    result["minutes"] = round((time.monotonic() - start) / 60, 1)
    return result


def versions() -> dict[str, str]:
    found = {"cosmos3_fast": __version__, "torch": torch.__version__}
    for name in ("diffusers", "triton"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def commit() -> str:
    """The commit measured, marked where the tree differs from it."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude", "*"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip() or "unknown"


def run_engine(engine: str, plan: Plan) -> dict[str, Any]:
    """The engine's own before-and-after, or {"skipped": why}.

    Raises:
        GateError: the script's own gate failed.
    """
    script = ROOT / "benchmarks" / f"engine_{engine}.py"
    if not script.exists():
        return {"skipped": f"there is no {script.name}"}
    python = engine_python(engine)
    if python is None:
        target = f"make test-{engine.replace('_', '-')}"
        return {"skipped": f"its environment is not there: {target} makes it"}
    print(f"engines: {engine} ...", file=sys.stderr, flush=True)
    # This tree, not the copy that was installed when the environment was made.
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures.json"
        ended = subprocess.run(
            [python, script, *plan.engine_options, "--json", figures],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            stdout=sys.stderr,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        sys.stderr.write(ended.stderr)
        if ended.returncode == 0:
            return json.loads(figures.read_text())
    last = (ended.stderr.strip().splitlines() or [""])[-1]
    if last.startswith("correctness gate failed"):
        raise GateError(f"engine {engine}: {last}")
    return {"skipped": f"its script ended with status {ended.returncode}: {last}"}


def engine_python(engine: str) -> str | None:
    """The interpreter of the engine's environment; or this one, if it has the engine."""
    python = ROOT / f".venv-{engine}" / "bin" / "python"
    if python.exists():
        return str(python)
    if all(util.find_spec(module) for module in ENGINE_MODULES[engine]):
        return sys.executable
    return None


def write(result: dict[str, Any], out: Path) -> None:
    """result.json, result.csv, result.md and the plots, in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "result.md").write_text(markdown(result) + "\n")
    with (out / "result.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(result["rows"])
    plots.draw(result, out)


if __name__ == "__main__":
    sys.exit(main())
