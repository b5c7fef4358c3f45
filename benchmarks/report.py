"""A whole result as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.formatting import provenance, ratio, seconds, size, spread, table, three_digits
from benchmarks.suites import Row, all_suites

Result = dict[str, Any]


def markdown(result: Result) -> str:
    shown = [
        f"{provenance(result)}; {result['setting']} setting, {result['minutes']} minutes, "
        f"load average before the start {result['load_before']:.1f}.",
    ]
    if result["goals"]:
        shown += ["", "## Goals", "", *goal_lines(result["goals"])]
    for suite in dict.fromkeys(row["suite"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["suite"] == suite]
        shown += ["", f"## {suite}", "", *row_lines(rows)]
    for name, suite in all_suites().items():
        if suite.lines is not None and name in result:
            shown += ["", f"## {name}", "", *suite.lines(result[name])]
    return "\n".join(shown)


def row_lines(rows: Sequence[Row]) -> list[str]:
    return table(
        ("case", "path", "median", "10 % to 90 %", "rounds", "speed", "of", "error"),
        [
            (
                f"{size(row['case'])}, {row['dtype']}",
                row["path"],
                seconds(row["median"]),
                spread(row["q10"], row["q90"]),
                str(len(row["seconds"])),
                ratio(row["speedup"]),
                row["baseline"],
                "" if row["error"] is None else f"{row['error']:.1e}",
            )
            for row in rows
        ],
    )


def goal_lines(goals: Sequence[Result]) -> list[str]:
    return table(
        ("goal", "wanted", "measured", "met"),
        [
            (
                size(goal["name"]),
                f"{goal['relation']} {goal['bound']:g}{goal['unit']}",
                f"{three_digits(goal['value'])}{goal['unit']}",
                "yes" if goal["met"] else "**no**",
            )
            for goal in goals
        ],
    )
