"""Numbers, sizes and tables as text, the same in every report."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any


def three_digits(value: float) -> str:
    return (
        f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
    )


def seconds(value: float) -> str:
    for scale, unit in ((1, "s"), (1e3, "ms")):
        if value * scale >= 1:
            return f"{three_digits(value * scale)} {unit}"
    return f"{three_digits(value * 1e6)} µs"


def spread(lowest: float, highest: float) -> str:
    return f"{seconds(lowest)} to {seconds(highest)}"


def ratio(value: float) -> str:
    return f"{three_digits(value)}×"


def size(text: str) -> str:
    """The text with a multiplication sign between the sides of a size."""
    return re.sub(r"(?<=\d)x(?=\d)", "×", text)


def table(header: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table that a terminal shows as well: columns as wide as their cells.

    The first column is flush left, the others right.
    """
    rows = [list(header), *(list(row) for row in body)]
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(header))]
    lines = [
        "| "
        + " | ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        + " |"
        for row in rows
    ]
    ruler = "|".join("-" * (width + 1) + (":" if i else "-") for i, width in enumerate(widths))
    return [lines[0], f"|{ruler}|", *lines[1:]]


def provenance(result: Mapping[str, Any]) -> str:
    """Where, with what and from what a result was measured."""
    return (
        f"{result['machine']}, diffusers {result['versions']['diffusers']}; commit "
        f"{result['commit']}, {result['date']}"
    )
