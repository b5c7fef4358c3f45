"""Writes README's section of measured figures from the committed result, between its markers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from bench import markdown_table, seconds

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "cpu" / "result.json"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def section(result: dict[str, Any]) -> str:
    """What stands between the markers for `result`."""
    lines = [
        f"{result['machine']}; diffusers {result['versions']['diffusers']}; commit "
        f"{result['commit']}, {result['date']}. Both sides in one process, interleaved; these "
        "machines are shared, so read the ratios. `make bench-full` remakes table and plot.",
        "",
    ]
    body = []
    for row in result["rows"]:
        if row["suite"] == "op" and row["case"] not in OP_CASES:
            continue
        if row["suite"] == "growth":
            continue
        body.append(
            (
                row["suite"],
                f"{row['case']}, {row['dtype']}".replace("x", "×", 1),
                row["path"],
                seconds(row["median"]),
                f"{seconds(row['q10'])} to {seconds(row['q90'])}",
                f"{row['speedup']:.2f}×",
            )
        )
    header = ("suite", "case", "path", "median", "10 % to 90 %", "speed")
    lines += markdown_table(header, body)
    memory = result["memory"]
    lines += [
        "",
        f"Peak memory of one float32 encode at 480×832, weights included: "
        f"{memory['ours']['peak']:.0f} MiB against {memory['vae']['peak']:.0f} MiB of the 3-D VAE "
        f"without its decoder ({memory['peak_ratio']:.2f} of it). Parameters in bfloat16: "
        f"{memory['bfloat16_parameters_bytes'] / 1e6:.1f} MB.",
        "",
        "![Seconds per encode by size and by clip length](benchmarks/results/cpu/encoder.png)",
    ]
    return "\n".join(lines)


OP_CASES = ("480x832, 81 frames", "720x1280, 189 frames")


def updated(readme: str, result: dict[str, Any] | None) -> str:
    """`readme` with the section of `result`; None: not measured yet."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    text = "Not measured yet: `make bench-full` does." if result is None else section(result)
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def committed_result() -> dict[str, Any] | None:
    return json.loads(RESULT.read_text()) if RESULT.exists() else None


def main() -> int:
    path = ROOT / "README.md"
    path.write_text(updated(path.read_text(), committed_result()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
