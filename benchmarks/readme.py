"""A result as Markdown: the whole of it, and the sections of README and benchmarks/README.

python benchmarks/report.py writes those sections, and the plots, from the committed result.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from suites import COMPILED, COPY, FORMULA, OURS, UNFUSED, USUAL_CASES

Result = dict[str, Any]
Row = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent
COMMITTED = ROOT / "benchmarks" / "results" / "cpu" / "result.json"
NOT_MEASURED = "Not measured yet: `make bench-full` does."
DTYPES = ("float32", "bfloat16")


def seconds(value: float) -> str:
    for scale, unit in ((1, "s"), (1e3, "ms"), (1e6, "µs")):
        if value * scale >= 1:
            return f"{_three_digits(value * scale)} {unit}"
    return f"{_three_digits(value * 1e6)} µs"


def ratio(value: float) -> str:
    return f"{_three_digits(value)}×"


def _three_digits(value: float) -> str:
    return (
        f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
    )


def size(text: str) -> str:
    """The text with a multiplication sign between the sides of a size."""
    return re.sub(r"(?<=\d)x(?=\d)", "×", text)


def table(header: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """Lines; the first column flush left, the others right."""
    return [
        "| " + " | ".join(header) + " |",
        "|---|" + "---:|" * (len(header) - 1),
        *("| " + " | ".join(cells) + " |" for cells in body),
    ]


def provenance(result: Result) -> str:
    return (
        f"{result['machine']}, diffusers {result['versions']['diffusers']}; commit "
        f"{result['commit']}, {result['date']}"
    )


def markdown(result: Result) -> str:
    """The whole result as text and tables."""
    lines = [
        f"{provenance(result)}; {result['setting']} setting, {result['minutes']} minutes, "
        f"load average before the start {result['load_before']:.1f}.",
    ]
    if result["goals"]:
        lines += ["", "## Goals", "", *_goals(result)]
    for suite in dict.fromkeys(row["suite"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["suite"] == suite]
        lines += ["", f"## {suite}", ""]
        lines += table(
            ("case", "path", "median", "10 % to 90 %", "rounds", "speed", "of", "error"),
            [_cells(row) for row in rows],
        )
    if "memory" in result:
        lines += ["", "## memory", "", *_memory(result["memory"])]
    if "profile" in result:
        lines += ["", "## profile", "", *_profile(result["profile"])]
    if "engines" in result:
        lines += ["", "## engines", "", *_engines(result["engines"])]
    return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    return (
        f"{size(row['case'])}, {row['dtype']}",
        row["path"],
        seconds(row["median"]),
        f"{seconds(row['q10'])} to {seconds(row['q90'])}",
        str(len(row["seconds"])),
        ratio(row["speedup"]),
        row["baseline"],
        "" if row["error"] is None else f"{row['error']:.1e}",
    )


def _goals(result: Result) -> list[str]:
    def figure(value: float, unit: str) -> str:
        return f"{_three_digits(value)}{unit}"

    return table(
        ("goal", "wanted", "measured", "met"),
        [
            (
                size(goal["name"]),
                f"{goal['relation']} {goal['bound']:g}{goal['unit']}",
                figure(goal["value"], goal["unit"]),
                "yes" if goal["met"] else "**no**",
            )
            for goal in result["goals"]
        ],
    )


def _memory(memory: Result) -> list[str]:
    rows = []
    for dtype in DTYPES:
        for name, key in (("3-D VAE without its decoder", "vae"), ("ours", "ours")):
            figures = memory[dtype][key]
            rows.append(
                (
                    f"{name}, {dtype}",
                    f"{figures['resident']:.0f} MiB",
                    f"{figures['peak'] - figures['resident']:.0f} MiB",
                    f"{figures['peak']:.0f} MiB",
                )
            )
    header = (f"first encode at {size(memory['size'])}", "weights", "encode adds", "peak")
    megabytes = memory["bfloat16_parameters_bytes"] / 1e6
    return [*table(header, rows), "", f"Parameters in bfloat16: {megabytes:.1f} MB."]


def _profile(profile: Result) -> list[str]:
    lines = []
    for dtype, figures in profile.items():
        lines += [
            f"{size(figures['size'])}, {dtype}: {seconds(figures['seconds'])}, "
            f"{figures['tflop']:.3f} TFLOP as direct convolutions, "
            f"{figures['tflop_per_s']:.3f} TFLOP/s (a square matrix product: "
            f"{figures['matmul_tflop_per_s']:.3f}).",
            "",
            *table(
                ("operation", "self CPU time"),
                [(f"`{name}`", f"{share:.1%}") for name, share in figures["shares"].items()],
            ),
            "",
        ]
    return lines[:-1]


def _engines(engines: Result) -> list[str]:
    rows = []
    skipped = []
    for engine, figures in engines.items():
        if "skipped" in figures:
            skipped.append(f"{engine}: skipped, {figures['skipped']}.")
            continue
        where = f"{figures['height']}×{figures['width']}, {figures['num_frames']} frames"
        for row in figures["rows"]:
            rows.append(
                (
                    f"{engine.replace('_', '-')} {figures['version']}, {where}, {row['request']}",
                    row["mode"],
                    str(row["pixel_frames_encoded"]),
                    f"{row['tflop']:.2f}",
                    seconds(row["median_s"]),
                    ratio(row["ratio"]),
                )
            )
    header = ("engine's own stage", "mode", "pixel frames encoded", "TFLOP", "median", "speed")
    lines = table(header, rows) if rows else []
    return [*lines, *([""] if rows and skipped else []), *skipped]


def measured_section(result: Result) -> str:
    """README's table and plot."""
    header = ("", "engines today", "alternative", "this package", "faster by")
    memory = result["memory"]["float32"]
    return "\n".join(
        [
            f"{provenance(result)}. Both sides in one process, interleaved, after a correctness "
            "gate; medians. `make bench-full` remakes table and plot; method, quantiles, goals and "
            "profile are in [benchmarks](benchmarks/README.md).",
            "",
            *table(header, list(_measured(result["rows"]))),
            "",
            "The alternative is a plain copy or `torch.compile` for the op; for the encoder, the "
            "folded network without this package's kernels. Peak memory of one float32 encode "
            f"at {size(result['memory']['size'])}, weights included: {memory['ours']['peak']:.0f} "
            f"MiB against {memory['vae']['peak']:.0f} MiB for the 3-D VAE without its decoder.",
            "",
            "![Encoder, stage and op against what runs today](benchmarks/results/cpu/summary.png)",
        ]
    )


def _measured(rows: list[Row]) -> Iterator[tuple[str, ...]]:
    for ours in rows:
        if ours["path"] != OURS or ours["suite"] == "growth":
            continue
        where = (ours["suite"], ours["case"], ours["dtype"])
        paths = {
            row["path"]: row["median"]
            for row in rows
            if (row["suite"], row["case"], row["dtype"]) == where
        }
        if ours["suite"] == "op":
            if ours["case"] not in USUAL_CASES:
                continue
            today, best = FORMULA, min((COMPILED, COPY), key=lambda path: paths[path])
        else:
            today, best = ours["baseline"], UNFUSED
        yield (
            f"{ours['suite']}, {size(ours['case'])}, {ours['dtype']}",
            f"{seconds(paths[today])}, {today}",
            f"{seconds(paths[best])}, {best}" if best in paths else "",
            seconds(ours["median"]),
            f"**{ratio(paths[today] / ours['median'])}**",
        )


def engines_section(result: Result) -> str:
    """README's table of each engine before and after."""
    return "\n".join(_engines(result["engines"]))


def judged_section(result: Result) -> str:
    """benchmarks/README's goals and profile."""
    return "\n".join(
        [
            f"{provenance(result)}; {result['minutes']} minutes.",
            "",
            *_goals(result),
            "",
            "Where an encode's time goes:",
            "",
            *_profile(result["profile"]),
        ]
    )


SECTIONS = {
    "README.md": {"measured": measured_section, "engines": engines_section},
    "benchmarks/README.md": {"judged": judged_section},
}


def updated(text: str, result: Result | None, sections: dict[str, Any]) -> str:
    """`text` with each section between its markers; without a result, that it is not measured."""
    for name, section in sections.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, rest = text.split(begin)
        _, after = rest.split(end)
        body = NOT_MEASURED if result is None else section(result)
        text = f"{before}{begin}\n{body}\n{end}{after}"
    return text


def committed_result() -> Result | None:
    return json.loads(COMMITTED.read_text()) if COMMITTED.exists() else None


def main() -> int:
    result = committed_result()
    for name, sections in SECTIONS.items():
        path = ROOT / name
        path.write_text(updated(path.read_text(), result, sections))
    if result is not None:
        import plots

        plots.draw(result, COMMITTED.parent)
    return 0


if __name__ == "__main__":
    sys.exit(main())
