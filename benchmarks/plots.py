"""The plots of a result, one file per suite, and the one that README shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.formatting import provenance, ratio, seconds, size
from benchmarks.paths import DTYPES, ONE_FRAME, OURS, UNFUSED
from benchmarks.suites import Row
from benchmarks.suites.op import COMPILED, COPY, FORMULA, IN_PLACE, USUAL_CASES

Result = dict[str, Any]
# Okabe and Ito's palette, which does not need color vision.
COLORS = {
    FORMULA: "#D55E00",
    COMPILED: "#E69F00",
    COPY: "#999999",
    OURS: "#0072B2",
    IN_PLACE: "#56B4E9",
    ONE_FRAME: "#D55E00",
    UNFUSED: "#E69F00",
}
WHOLE_CLIP = "#CC79A7"
# Of paths that have none: the alternatives of other suites.
SPARE_COLORS = ("#D55E00", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#F0E442")
TITLES = {"encoder": "Encoding the conditioning image", "pixels": "Resizing pictures"}


def draw(result: Result, out: Path) -> None:
    """Write a PNG per suite that `result` holds; summary.png where it holds those README shows.

    A suite of rows that has no plot of its own gets bars of its cases.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    names = dict.fromkeys(row["suite"] for row in result["rows"])
    suites = {suite: _of(result["rows"], suite) for suite in names}
    drawers = {"op": _op, "growth": _growth, "stage": _stage}
    for suite, rows in suites.items():
        drawers.get(suite, _cases)(result, rows).savefig(out / f"{suite}.png", dpi=120)
    if "memory" in result:
        _memory(result).savefig(out / "memory.png", dpi=120)
    if suites.keys() >= {"op", "encoder", "stage"}:
        _summary(result, suites).savefig(out / "summary.png", dpi=120)
    plt.close("all")


def _of(rows: Sequence[Row], suite: str, **wanted: str) -> list[Row]:
    return [
        row
        for row in rows
        if row["suite"] == suite and all(row[name] == value for name, value in wanted.items())
    ]


def _figure(result: Result, title: str, widths: Sequence[float], height: float = 4.8) -> Any:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1,
        len(widths),
        figsize=(12, height),
        squeeze=False,
        layout="constrained",
        gridspec_kw={"width_ratios": widths},
    )
    figure.suptitle(title, x=0.01, ha="left", fontsize=13)
    figure.supxlabel(
        f"{provenance(result)}; {result['setting']} setting", x=0.01, ha="left",
        fontsize=8, color="#555555",
    )  # fmt: skip
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[0]


def _bars(axis: Any, rows: Sequence[Row], labels: Sequence[str], columns: int = 3) -> None:
    """Groups of bars on a log axis: a group per label (`row["group"]`), a color per path.

    Each is annotated with its median and its speed against the row's baseline. The legend has
    `columns`.
    """
    paths = list(dict.fromkeys(row["path"] for row in rows))
    spare = iter(SPARE_COLORS * len(paths))
    colors = {path: COLORS.get(path) or next(spare) for path in paths}
    width = 0.84 / len(paths)
    for i, path in enumerate(paths):
        own = [row for row in rows if row["path"] == path]
        places = [labels.index(row["group"]) + (i - (len(paths) - 1) / 2) * width for row in own]
        whiskers = [
            [row["median"] - row["q10"] for row in own],
            [row["q90"] - row["median"] for row in own],
        ]
        axis.bar(
            places, [row["median"] for row in own], width * 0.94, label=path, color=colors[path],
            yerr=whiskers, error_kw={"lw": 0.9, "ecolor": "#222222", "capsize": 2},
        )  # fmt: skip
        for x, row in zip(places, own, strict=True):
            speed = "" if path == row["baseline"] else f"\n{ratio(row['speedup'])}"
            axis.annotate(
                seconds(row["median"]) + speed, (x, row["q90"]), ha="center", va="bottom",
                fontsize=8, xytext=(0, 3), textcoords="offset points",
                fontweight="bold" if path == OURS else "normal",
            )  # fmt: skip
    lowest, highest = min(row["q10"] for row in rows), max(row["q90"] for row in rows)
    _log_axis(axis)
    # From well below the smallest bar to room for the legend above the tallest.
    axis.set_ylim(lowest / 2, highest * (highest / lowest) ** 0.3 * 1.3)
    axis.set_xticks(range(len(labels)), labels, fontsize=9)
    _legend(axis, "upper left" if columns > 1 else "upper right", columns)


def _legend(axis: Any, place: str, columns: int = 1) -> None:
    legend = axis.legend(
        fontsize=8.5, loc=place, ncols=columns, columnspacing=1, edgecolor="none", framealpha=1
    )
    legend.set_in_layout(False)  # it lies in the axes, which need not shrink for it


def _log_axis(axis: Any) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _grouped(rows: Sequence[Row], key: str) -> tuple[list[Row], list[str]]:
    grouped = [{**row, "group": size(row[key])} for row in rows]
    return grouped, list(dict.fromkeys(row["group"] for row in grouped))


def _op(result: Result, rows: Sequence[Row]) -> Any:
    figure, axes = _figure(
        result, f"prepare_latents: time as a multiple of {COPY}, lower is better", (1, 1), 6.4
    )
    for axis, dtype in zip(axes, DTYPES, strict=True):
        own, labels = _grouped(_of(rows, "op", dtype=dtype), "case")
        _multiples(axis, own, labels, (FORMULA, COMPILED, OURS, IN_PLACE))
        axis.set_title(dtype, loc="left", fontsize=10)
    return figure


def _multiples(axis: Any, rows: Sequence[Row], labels: Sequence[str], paths: Sequence[str]) -> None:
    """Times over the copy's, as points: a line of them per label (`row["group"]`)."""
    from matplotlib.ticker import NullFormatter

    copies = {row["group"]: row["median"] for row in rows if row["path"] == COPY}
    for path in paths:
        own = [row for row in rows if row["path"] == path]
        x = [row["median"] / copies[row["group"]] for row in own]
        y = [labels.index(row["group"]) for row in own]
        axis.scatter(
            x, y, s=52, color=COLORS[path], label=path, zorder=3,
            marker={FORMULA: "s", COMPILED: "D", OURS: "o", IN_PLACE: "v"}[path],
        )  # fmt: skip
        for multiple, place in zip(x, y, strict=True):
            # Ours below its point, clear of the labels of what is close to it.
            axis.annotate(
                f"{multiple:.2f}", (multiple, place), ha="center", fontsize=8,
                va="top" if path == OURS else "bottom", xytext=(0, -6 if path == OURS else 6),
                textcoords="offset points", fontweight="bold" if path == OURS else "normal",
            )  # fmt: skip
    axis.axvline(1, color=COLORS[COPY], lw=1.4, label=COPY)
    axis.set_xscale("log")
    axis.set_yticks(range(len(labels)), labels, fontsize=9)
    axis.set_ylim(len(labels) - 0.5 + 0.2 * len(labels), -0.7)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel(f"time / {COPY} (log)")
    axis.grid(axis="y", color="#EEEEEE", zorder=0)
    _legend(axis, "lower center", 2)


def _cases(result: Result, rows: Sequence[Row]) -> Any:
    """Bars of every case, a panel for each dtype."""
    suite, baseline = rows[0]["suite"], rows[0]["baseline"]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    title = TITLES.get(suite, suite)
    figure, axes = _figure(result, f"{title}; speed against {baseline}", (1,) * len(dtypes))
    for axis, dtype in zip(axes, dtypes, strict=True):
        own, labels = _grouped(_of(rows, suite, dtype=dtype), "case")
        _bars(axis, own, labels)
        axis.set_ylabel(f"seconds (log), {dtype}")
        axis.set_xlabel("height×width")
    return figure


def _growth(result: Result, rows: Sequence[Row]) -> Any:
    where = size(rows[0]["case"].split(",")[0])
    figure, (axis,) = _figure(
        result, f"Encoding T frames where one is used, {where}, float32", (1,)
    )
    frames = [int(row["case"].split("T=")[1]) for row in rows]
    for mine, label in (
        (False, "vae.encode of T frames"),
        (True, "ours, of the frame that matters"),
    ):
        points = [
            (t, row) for t, row in zip(frames, rows, strict=True) if (row["path"] == OURS) == mine
        ]
        color = COLORS[OURS] if mine else WHOLE_CLIP
        x, y = [t for t, _ in points], [row["median"] for _, row in points]
        axis.plot(x, y, "o-" if mine else "s-", color=color, label=label)
        for t, row in points:
            axis.annotate(
                seconds(row["median"]), (t, row["median"]), ha="center", va="bottom", fontsize=9,
                xytext=(0, 6), textcoords="offset points",
            )  # fmt: skip
    axis.set_xticks(sorted(set(frames)))
    axis.set_xlabel("pixel frames T")
    axis.set_ylabel("seconds (log)")
    _log_axis(axis)
    axis.margins(x=0.08, y=0.18)
    axis.legend(fontsize=9, frameon=False, loc="center right")
    return figure


def _stage(result: Result, rows: Sequence[Row]) -> Any:
    case = f"{size(rows[0]['case'])}, {rows[0]['dtype']}"
    figure, (axis,) = _figure(result, f"A photograph to conditioned latents, {case}", (1,), 3.2)
    _stage_bars(axis, rows)
    return figure


def _stage_bars(axis: Any, rows: Sequence[Row]) -> None:
    theirs = sorted((row for row in rows if row["path"] != OURS), key=lambda row: -row["median"])
    against = {row["baseline"]: row for row in rows if row["path"] == OURS}
    bars = [
        (
            row["path"],
            row["median"],
            f"{seconds(row['median'])}: {ratio(against[row['path']]['speedup'])} ours",
            COLORS.get(row["path"], WHOLE_CLIP),
        )
        for row in theirs
    ]
    ours = against.get(ONE_FRAME) or next(iter(against.values()))
    bars.append((OURS, ours["median"], seconds(ours["median"]), COLORS[OURS]))
    names, medians, texts, colors = zip(*bars, strict=True)
    axis.barh(range(len(bars)), medians, 0.66, color=colors)
    for place, (median, text) in enumerate(zip(medians, texts, strict=True)):
        axis.annotate(
            text, (median, place), va="center", fontsize=9, xytext=(5, 0),
            textcoords="offset points",
        )  # fmt: skip
    axis.set_yticks(
        range(len(bars)), [name.replace("vae.encode of ", "vae.encode,\n") for name in names]
    )
    axis.invert_yaxis()
    axis.set_xlabel("seconds")
    axis.set_xlim(right=max(medians) * 1.7)


def _memory(result: Result) -> Any:
    memory = result["memory"]
    figure, (axis,) = _figure(
        result, f"Memory of the first encode at {size(memory['size'])}, by process", (1,), 3.6
    )
    names = {"vae": "3-D VAE without its decoder", "ours": OURS}
    bars = [(dtype, key) for dtype in DTYPES for key in names]
    weights = [memory[dtype][key]["resident"] for dtype, key in bars]
    peaks = [memory[dtype][key]["peak"] for dtype, key in bars]
    added = [peak - weight for peak, weight in zip(peaks, weights, strict=True)]
    axis.barh(range(len(bars)), weights, 0.66, color="#0072B2", label="weights")
    axis.barh(range(len(bars)), added, 0.66, left=weights, color="#E69F00", label="the encode adds")
    for place, (dtype, key) in enumerate(bars):
        share = f" ({memory[dtype]['peak_ratio']:.2f} of it)" if key == "ours" else ""
        axis.annotate(
            f"{peaks[place]:.0f} MiB{share}", (peaks[place], place), va="center", fontsize=9,
            xytext=(5, 0), textcoords="offset points",
        )  # fmt: skip
    axis.set_yticks(range(len(bars)), [f"{names[key]}, {dtype}" for dtype, key in bars])
    axis.invert_yaxis()
    axis.set_xlim(right=max(peaks) * 1.12)
    axis.set_xlabel("MiB beyond the imports")
    axis.legend(fontsize=9, frameon=False, loc="lower right")
    return figure


def _summary(result: Result, suites: dict[str, list[Row]]) -> Any:
    figure, (encoder, stage, op) = _figure(
        result, "Conditioning latents on a CPU: this package against what runs today", (1, 1, 1.1)
    )
    sizes = {row["case"] for row in suites["encoder"]}
    shown = "480x832" if "480x832" in sizes else min(sizes)
    rows, labels = _grouped(_of(suites["encoder"], "encoder", case=shown), "dtype")
    _bars(encoder, rows, labels, columns=1)
    encoder.set_ylabel("seconds (log)")
    encoder.set_title(f"Encoder, {size(shown)}", loc="left", fontsize=10)

    _stage_bars(stage, suites["stage"])
    row = suites["stage"][0]
    stage.set_title(f"Stage, {size(row['case'])}, {row['dtype']}", loc="left", fontsize=10)

    cases = {row["case"] for row in suites["op"]}
    wanted = cases & set(USUAL_CASES) or cases
    rows = [
        {**row, "group": f"{size(row['case'])}, {row['dtype']}".replace(", ", "\n")}
        for row in suites["op"]
        if row["case"] in wanted
    ]
    labels = list(dict.fromkeys(row["group"] for row in rows))
    _multiples(op, rows, labels, (FORMULA, COMPILED, OURS))
    op.set_title("Op: prepare_latents", loc="left", fontsize=10)
    return figure
