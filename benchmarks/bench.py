"""Measures every suite and writes one result: JSON, CSV, a Markdown table and plots.

python -m cosmos3_fast bench [--full] [--suites op,encoder,...] [--out benchmarks/results/NAME]

Each suite runs both sides in this process, interleaved, behind a correctness gate that ends the
run. The `engines` suite starts each engine's script in the environment that `make test-<engine>`
makes, and names those that are not there.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import memory
import plots
import torch
from harness import machine
from suites import SUITES, profile

import cosmos3_fast

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
ENGINES = ("diffusers", "sglang", "vllm_omni")
ALL = (*SUITES, "memory", "profile", "engines")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cosmos3_fast bench", description=__doc__)
    parser.add_argument("--full", action="store_true", help="every size, more rounds (20 minutes)")
    parser.add_argument("--suites", default=",".join(ALL), help=f"of {', '.join(ALL)}")
    parser.add_argument("--out", type=Path, help="folder to write (default: out/bench)")
    args = parser.parse_args(argv)
    wanted = args.suites.split(",")
    if unknown := set(wanted) - set(ALL):
        parser.error(f"--suites: unknown {', '.join(sorted(unknown))}, wanted of {', '.join(ALL)}")
    result: dict[str, Any] = {
        "setting": "full" if args.full else "short",
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "rows": [],
    }
    for name, suite in SUITES.items():
        if name in wanted:
            result["rows"] += suite(args.full)
    if "memory" in wanted:
        result["memory"] = memory.compare()
    if "profile" in wanted:
        result["profile"] = profile()
    if "engines" in wanted:
        result["engines"] = engines(args.full)
    out = args.out or ROOT / "out" / "bench"
    write(result, out)
    print(markdown(result))
    print(f"\n{out}: result.json, result.csv, result.md, plots", file=sys.stderr)
    return 0


def versions() -> dict[str, str]:
    found = {"cosmos3_fast": cosmos3_fast.__version__, "torch": torch.__version__}
    for name in ("diffusers", "triton"):
        try:
            found[name] = __import__(name).__version__
        except ImportError:
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


def engines(full: bool) -> dict[str, Any]:
    """Each engine's own before-and-after, from its script and environment."""
    found: dict[str, Any] = {}
    size = ["--height", "480", "--width", "832"] if full else ["--height", "128", "--width", "128"]
    for engine in ENGINES:
        python = ROOT / f".venv-{engine}" / "bin" / "python"
        script = ROOT / "benchmarks" / f"engine_{engine}.py"
        if not (python.exists() and script.exists()):
            target = f"make test-{engine.replace('_', '-')}"
            found[engine] = {"skipped": f"its environment is not there: {target} makes it"}
            continue
        print(f"engines: {engine}", file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            figures = Path(folder) / "figures.json"
            run = subprocess.run(
                [python, script, *size, "--rounds", "2" if full else "1", "--json", figures],
                stdout=sys.stderr,
                check=False,
            )
            found[engine] = (
                json.loads(figures.read_text())
                if run.returncode == 0
                else {"skipped": f"its script ended with status {run.returncode}"}
            )
    return found


def write(result: dict[str, Any], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "result.md").write_text(markdown(result) + "\n")
    columns = ("suite", "case", "dtype", "path", "median", "q10", "q90", "speedup", "error")
    with (out / "result.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(result["rows"])
    plots.draw(result, out)


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def markdown(result: dict[str, Any]) -> str:
    """The whole result as text and tables."""
    lines = [
        f"{result['machine']}; diffusers {result['versions']['diffusers']}; "
        f"commit {result['commit']}, {result['date']}, {result['setting']} setting.",
        "",
    ]
    if result["rows"]:
        header = (
            "suite",
            "case",
            "dtype",
            "path",
            "median",
            "10 % to 90 %",
            "speed",
            "error / max",
        )
        lines += markdown_table(header, [_cells(row) for row in result["rows"]])
    if memory_ := result.get("memory"):
        lines += ["", "One fp32 encode at 480×832, MiB beyond the imports, process of its own:", ""]
        lines += markdown_table(
            ("", "weights loaded", "peak"),
            [
                (name, f"{memory_[key]['resident']:.0f}", f"{memory_[key]['peak']:.0f}")
                for name, key in (("3-D VAE without decoder", "vae"), ("ours", "ours"))
            ],
        )
        megabytes = memory_["bfloat16_parameters_bytes"] / 1e6
        lines += ["", f"Folded parameters in bfloat16: {megabytes:.1f} MB."]
    if shares := result.get("profile"):
        lines += ["", "Where an fp32 encode at 480×832 spends its time:", ""]
        lines += markdown_table(
            ("operation", "share"), [(name, f"{share:.1%}") for name, share in shares.items()]
        )
    for engine, figures in result.get("engines", {}).items():
        lines += ["", f"{engine}: " + figures.get("skipped", json.dumps(figures))]
    return "\n".join(lines)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    error = "" if row["error"] is None else f"{row['error']:.1e}"
    return (
        row["suite"],
        row["case"],
        row["dtype"],
        row["path"],
        seconds(row["median"]),
        f"{seconds(row['q10'])} to {seconds(row['q90'])}",
        f"{row['speedup']:.2f}×",
        error,
    )


def markdown_table(header: tuple[str, ...], body: list[tuple[str, ...]]) -> list[str]:
    return [
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(cells) + " |" for cells in body),
    ]


if __name__ == "__main__":
    sys.exit(main())
