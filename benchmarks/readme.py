"""The sections of README and benchmarks/README that show the committed result.

`python -m benchmarks.readme` writes them, and the plots, from benchmarks/results/cpu/result.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from benchmarks import plots
from benchmarks.formatting import provenance, ratio, seconds, size, table
from benchmarks.harness import ROOT
from benchmarks.paths import OURS, UNFUSED
from benchmarks.report import goal_lines
from benchmarks.suites import Row, engines, profile
from benchmarks.suites.decoder import PLAIN
from benchmarks.suites.op import COMPILED, COPY, FORMULA, USUAL_CASES
from benchmarks.suites.pixels import DECODE_AND_RESIZE, TORCHVISION

Result = dict[str, Any]
Section = Callable[[Result], str]
COMMITTED = ROOT / "benchmarks" / "results" / "cpu" / "result.json"
NOT_MEASURED = "Not measured yet: `make bench-full` does."
# What others could do, by suite; and what that is.
ALTERNATIVES = {"encoder": UNFUSED, "decoder": PLAIN, "stage": UNFUSED, "pixels": TORCHVISION}
EXPLAINED = {
    "op": "a plain copy or `torch.compile` for the op",
    "encoder": "for the encoder, the folded network without this package's kernels",
    "decoder": "for the decoder, the last temporal taps without them",
    "pixels": "for pixels, a resize to other bytes than Pillow's",
}


def measured(result: Result) -> str:
    """README's table and plot."""
    header = ("", "engines today", "alternative", "this package", "faster by")
    memory = result["memory"]["float32"]
    shown = {row["suite"] for row in result["rows"]}
    explained = "; ".join(text for suite, text in EXPLAINED.items() if suite in shown)
    return "\n".join(
        [
            f"{provenance(result)}. Both sides in one process, interleaved, after a correctness "
            "gate; medians. `make bench-full` remakes table and plot; method, quantiles, goals and "
            "profile are in [benchmarks](benchmarks/README.md).",
            "",
            *table(header, list(_measured(result["rows"]))),
            "",
            f"The alternative is {explained}. Peak memory of one float32 encode "
            f"at {size(result['memory']['size'])}, weights included: {memory['ours']['peak']:.0f} "
            f"MiB against {memory['vae']['peak']:.0f} MiB for the 3-D VAE without its decoder.",
            "",
            "![Encoder, stage and op against what runs today](benchmarks/results/cpu/summary.png)",
        ]
    )


def _measured(rows: list[Row]) -> Iterator[tuple[str, ...]]:
    for ours in rows:
        if ours["path"] != OURS or ours["suite"] not in ("op", *ALTERNATIVES):
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
            # The baseline of a file is its decode alone, which is not all that engines do today.
            today = DECODE_AND_RESIZE if DECODE_AND_RESIZE in paths else ours["baseline"]
            best = ALTERNATIVES[ours["suite"]]
        yield (
            f"{ours['suite']}, {size(ours['case'])}, {ours['dtype']}",
            f"{seconds(paths[today])}, {today}",
            f"{seconds(paths[best])}, {best}" if best in paths else "",
            seconds(ours["median"]),
            f"**{ratio(paths[today] / ours['median'])}**",
        )


def engines_in_short(result: Result) -> str:
    """README's three rows: an image through each engine's own stage, unpatched and fast."""
    rows = []
    for engine, figures in result["engines"].items():
        of = {row["mode"]: row for row in figures.get("rows", ()) if row["request"] == "I2V"}
        if {"unpatched", "fast"} <= of.keys():
            times = (seconds(of[mode]["median_s"]) for mode in ("unpatched", "fast"))
            name = engines.request_name(engine, figures, of["fast"])
            rows.append((name, *times, f"**{ratio(of['fast']['ratio'])}**"))
    return "\n".join(table(("engine's own stage", "unpatched", "fast", "faster by"), rows))


def engines_in_full(result: Result) -> str:
    """benchmarks/README's table of each engine before and after."""
    return "\n".join(engines.lines(result["engines"]))


def judged(result: Result) -> str:
    """benchmarks/README's goals and profile."""
    return "\n".join(
        [
            f"{provenance(result)}; {result['minutes']} minutes.",
            "",
            *goal_lines(result["goals"]),
            "",
            "Where an encode's time goes:",
            "",
            *profile.lines(result["profile"]),
        ]
    )


SECTIONS: dict[str, dict[str, Section]] = {
    "README.md": {"measured": measured, "engines": engines_in_short},
    "benchmarks/README.md": {"judged": judged, "engines": engines_in_full},
}


def updated(text: str, result: Result | None, sections: Mapping[str, Section]) -> str:
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
        plots.draw(result, COMMITTED.parent)
    return 0


if __name__ == "__main__":
    sys.exit(main())
