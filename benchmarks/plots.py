"""The plots of a result: the encoder's paths and its growth with the clip, and the op's paths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLOURS = {  # Okabe and Ito's, distinguishable without colour vision
    "eager formula": "#999999",
    "compiled formula": "#E69F00",
    "clone + 1-frame copy": "#56B4E9",
    "ours": "#0072B2",
    "ours, in place": "#009E73",
    "vae.encode of 1 frame": "#999999",
    "folded, unfused": "#E69F00",
}


def draw(result: dict[str, Any], out: Path) -> None:
    """Write encoder.png and op.png for whatever suites `result` holds."""
    import matplotlib

    matplotlib.use("Agg")
    rows = result["rows"]
    note = f"{result['machine']}, commit {result['commit']}, {result['date']}"
    if any(row["suite"] in ("encoder", "growth") for row in rows):
        _encoder(rows, note).savefig(out / "encoder.png", dpi=110)
    if any(row["suite"] == "op" for row in rows):
        _op(rows, note).savefig(out / "op.png", dpi=110)


def _figure(title: str, note: str, panels: int) -> tuple[Any, Any]:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, panels, figsize=(11, 4.6), squeeze=False)
    figure.suptitle(title, x=0.06, ha="left", fontsize=13)
    figure.text(0.06, 0.015, note, fontsize=8, color="#666666")
    figure.subplots_adjust(left=0.07, right=0.98, top=0.84, bottom=0.2, wspace=0.22)
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[0]


def _bars(axis: Any, rows: list[dict[str, Any]], scale: float, label: str) -> None:
    cases = list(dict.fromkeys(row["case"] for row in rows))
    paths = list(dict.fromkeys(row["path"] for row in rows))
    width = 0.8 / len(paths)
    for i, path in enumerate(paths):
        own = {row["case"]: row for row in rows if row["path"] == path}
        places = [cases.index(case) + (i - (len(paths) - 1) / 2) * width for case in own]
        medians = [row["median"] * scale for row in own.values()]
        whiskers = [
            [(row["median"] - row["q10"]) * scale for row in own.values()],
            [(row["q90"] - row["median"]) * scale for row in own.values()],
        ]
        axis.bar(places, medians, width, label=path, color=COLOURS[path], yerr=whiskers,
                 error_kw={"lw": 1, "ecolor": "#333333"})  # fmt: skip
        for x, row in zip(places, own.values(), strict=True):
            axis.annotate(
                f"{row['speedup']:.2g}×", (x, row["q90"] * scale), ha="center", va="bottom",
                fontsize=7, xytext=(0, 2), textcoords="offset points",
            )  # fmt: skip
    axis.set_xticks(range(len(cases)), [case.replace(", ", "\n") for case in cases], fontsize=8)
    axis.set_ylabel(label)
    axis.set_yscale("log")
    axis.legend(fontsize=8, frameon=False)


def _encoder(rows: list[dict[str, Any]], note: str) -> Any:
    figure, (left, right) = _figure(
        "Encoding the conditioning image: seconds, and speed against vae.encode of 1 frame", note, 2
    )
    own = [row for row in rows if row["suite"] == "encoder" and row["dtype"] == "float32"]
    if own:
        _bars(left, own, 1, "seconds (log), float32")
    growth = [row for row in rows if row["suite"] == "growth"]
    for mine, label in ((False, "vae.encode of T frames"), (True, "ours: one frame is enough")):
        points = [row for row in growth if (row["path"] == "ours") == mine]
        frames = [int(row["case"].split(", ")[1].split()[0]) for row in points]
        colour = COLOURS["ours" if mine else "eager formula"]
        right.plot(frames, [row["median"] for row in points], "o-", color=colour, label=label)
    right.set_xlabel("pixel frames T, 256×448, float32")
    right.set_ylabel("seconds")
    right.set_ylim(bottom=0)
    right.legend(fontsize=8, frameon=False)
    return figure


def _op(rows: list[dict[str, Any]], note: str) -> Any:
    figure, axes = _figure("prepare_latents: milliseconds, and speed against a plain copy", note, 2)
    for axis, dtype in zip(axes, ("float32", "bfloat16"), strict=True):
        own = [row for row in rows if row["suite"] == "op" and row["dtype"] == dtype]
        shown = {"480x832, 81 frames", "720x1280, 189 frames", "256x448, 17 frames"}
        own = [row for row in own if row["case"] in shown]
        if own:
            _bars(axis, own, 1e3, f"milliseconds (log), {dtype}")
    return figure
