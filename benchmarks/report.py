"""The one writer: a result as Markdown and plots, and every table that is committed.

`python -m benchmarks.report` writes the tables anew from the JSON files of `benchmarks/results`:
each `result.md`, those in README, docs/engines.md and benchmarks/README, and results/gpu/README.md
with its plot.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import DTYPES, ONE_FRAME, OURS
from benchmarks.harness import ROOT, Figures, Row

Result = dict[str, Any]
RESULTS = ROOT / "benchmarks" / "results"


# Numbers, sizes and tables as text.


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


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


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


# A result of `benchmarks.run`.


def markdown(result: Result) -> str:
    """A whole result."""
    shown = [
        f"{provenance(result)}; {result['setting']} setting, {result['minutes']} minutes, "
        f"load average before the start {result['load_before']:.1f}.",
    ]
    if result["goals"]:
        shown += ["", "## Goals", "", *goal_lines(result["goals"])]
    for suite in dict.fromkeys(row["suite"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["suite"] == suite]
        shown += ["", f"## {suite}", "", *row_lines(rows)]
    for name, lines in FIGURES.items():
        if name in result:
            shown += ["", f"## {name}", "", *lines(result[name])]
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


def memory_lines(figures: Figures) -> list[str]:
    """Both sides of a first call in each dtype that was measured."""
    encodes = "bfloat16_parameters_bytes" in figures
    call, other = ("first encode", "decoder") if encodes else ("first decode", "encoder")
    rows = []
    for dtype in (each for each in DTYPES if each in figures):
        for name, key in ((f"3-D VAE without its {other}", "vae"), ("ours", "ours")):
            resident, peak = figures[dtype][key]["resident"], figures[dtype][key]["peak"]
            shown = (resident, peak - resident, peak)
            rows.append((f"{name}, {dtype}", *(f"{value:.0f} MiB" for value in shown)))
    where = size(figures["size"])
    if figures.get("frames", 1) > 1:
        where += f", {figures['frames']} frames"
    header = (f"{call} at {where}", "weights", "the call adds", "peak")
    if not encodes:
        return table(header, rows)
    megabytes = figures["bfloat16_parameters_bytes"] / 1e6
    return [*table(header, rows), "", f"Parameters in bfloat16: {megabytes:.1f} MB."]


def bulk_memory_lines(figures: Figures) -> list[str]:
    if "skipped" in figures:
        return [f"Skipped: {figures['skipped']}."]
    rows = [
        (f"{figures[name]['samples']}", f"{figures[name]['peak']:.0f} MiB")
        for name in ("few", "many")
    ]
    return table(("pictures", "peak of the process"), rows)


def profile_lines(figures: Figures) -> list[str]:
    shown = []
    for dtype, of in figures.items():
        shares = [(f"`{name}`", f"{share:.1%}") for name, share in of["shares"].items()]
        shown += [
            f"{size(of['size'])}, {dtype}: {seconds(of['seconds'])}, {of['tflop']:.3f} TFLOP "
            f"as direct convolutions, {of['tflop_per_s']:.3f} TFLOP/s (a square matrix product: "
            f"{of['matmul_tflop_per_s']:.3f}).",
            "",
            *table(("operation", "self CPU time"), shares),
            "",
        ]
    return shown[:-1]


def engine_lines(figures: Figures) -> list[str]:
    rows, skipped = [], []
    for engine, of in figures.items():
        if "skipped" in of:
            skipped.append(f"{engine}: skipped, {of['skipped']}.")
            continue
        name = f"{engine.replace('_', '-')} {of['version']}"
        size = f"{of['height']}×{of['width']}, {of['num_frames']} frames"
        for row in of["rows"]:
            decodes = row["request"].startswith("decode")  # of a size that it names
            what = row["request"] if decodes else f"{size}, {row['request']}"
            frames, tflop = str(row["pixel_frames_encoded"]), f"{row['tflop']:.2f}"
            shown = (row["mode"], frames, tflop, seconds(row["median_s"]), ratio(row["ratio"]))
            rows.append((f"{name}, {what}", *shown))
    header = ("engine's own stage", "mode", "pixel frames encoded", "TFLOP", "median", "speed")
    shown_rows = table(header, rows) if rows else []
    return [*shown_rows, *([""] if rows and skipped else []), *skipped]


FIGURES: dict[str, Callable[[Figures], list[str]]] = {
    "memory": memory_lines,
    "decoder_memory": memory_lines,
    "clip_memory": memory_lines,
    "bulk_memory": bulk_memory_lines,
    "profile": profile_lines,
    "engines": engine_lines,
}


# Okabe and Ito's palette, which does not need color vision.
PALETTE = ("#D55E00", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#999999")
OUR_COLOR = "#0072B2"


def draw(result: Result, out: Path) -> None:
    """Write a PNG for each suite of rows: a group of bars per case, a color per path."""
    plt = _pyplot()
    for suite in dict.fromkeys(row["suite"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["suite"] == suite]
        paths = [path for path in dict.fromkeys(row["path"] for row in rows) if path != OURS]
        colors = {path: PALETTE[i % len(PALETTE)] for i, path in enumerate(paths)}
        figure, axis = plt.subplots(figsize=(10, 1.5 + 0.24 * len(rows)), layout="constrained")
        case, places = None, []
        for row in rows:  # a gap before each case
            key = row["case"], row["dtype"], row["baseline"]
            places.append((places[-1] if places else 0.0) + (1.0 if key == case else 1.8))
            case = key
        medians = [row["median"] for row in rows]
        bars = [colors.get(row["path"], OUR_COLOR) for row in rows]
        axis.barh(places, medians, 0.9, color=bars)
        for place, row in zip(places, rows, strict=True):
            text = f" {seconds(row['median'])}, {ratio(row['speedup'])}"
            axis.text(row["median"], place, text, va="center", fontsize=8)
        names = [f"{size(row['case'])}, {row['dtype']}: {row['path']}" for row in rows]
        axis.set_yticks(places, names, fontsize=8)
        axis.invert_yaxis()
        axis.set_xscale("log")
        axis.set_xlim(min(medians) / 2, max(medians) * 4)
        axis.set_xlabel("seconds (log)")
        axis.spines[["top", "right"]].set_visible(False)
        figure.suptitle(f"{suite}; {provenance(result)}", fontsize=8)
        figure.savefig(out / f"{suite}.png", dpi=120)
    plt.close("all")


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    return plt


# The GPU campaign's runs. Each folder of results/gpu is one run on one machine: a file for each
# command of the campaign, and `notes.md`, which says what a reader has to know of it.

# What a kernel's name says it computes; the first that fits.
KINDS = {
    "convolutions": r"fprop|cudnn",
    "norms and sums": r"cosmos3::",
    "attention": r"fmha|softmax|nvjet|bfloat16_copy_kernel",
}
OTHERS = "others"
Run = dict[str, Any]


def read_run(folder: Path) -> Run:
    """One run: its commands' files, and every step's result by name."""
    names = ("checks", "sanitizers", "figures", "decoding", "claims", "mends", "rest")
    files = [folder / f"{name}.json" for name in names]
    commands = {path.stem: json.loads(path.read_text()) for path in files if path.exists()}
    steps = {name: step for each in commands.values() for name, step in each["steps"].items()}
    notes = folder / "notes.md"
    text = notes.read_text().strip() if notes.exists() else ""
    return {"commands": commands, "steps": steps, "notes": text}


def gpu_runs() -> list[Run]:
    return [read_run(each) for each in sorted((RESULTS / "gpu").iterdir()) if each.is_dir()]


def result_of(run: Run, step: str) -> dict[str, Any]:
    return run["steps"].get(step, {}).get("result", {})


def timed(result: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, each in result.items():
        if isinstance(each, dict) and "median_us" in each:
            yield name, each


def microseconds(each: dict[str, Any]) -> str:
    return seconds(each["median_us"] / 1e6)


def quantiles(each: dict[str, Any]) -> str:
    return spread(each["p10_us"] / 1e6, each["p90_us"] / 1e6)


def gpu_machine(run: Run) -> list[str]:
    first = next(iter(run["commands"].values()))
    environment, ceilings = result_of(run, "environment"), result_of(run, "ceilings")
    driver = environment["nvidia_smi"].splitlines()[-1].split(", ")[1]
    return [
        f"## {environment['device']}, commit {first['commit']}",
        "",
        f"{first['machine']}, driver {driver}, cuDNN {environment['cudnn']}, Triton "
        f"{environment['packages']['triton']}; {first['started'][:10]}. A large copy moves "
        f"{ceilings['copy_bytes_per_s'] / 1e12:.2f} TB/s, read and written; the fastest of three "
        f"3x3 convolutions in bfloat16 {ceilings['conv_flops_per_s'] / 1e12:.0f} TFLOP/s.",
        *(("", run["notes"]) if run["notes"] else ()),
    ]


def gpu_tables(run: Run) -> Iterator[tuple[Sequence[str], list[list[str]]]]:
    """Headers and rows of a run's tables; without rows where the steps did not run."""
    rows = []
    if tests := run["steps"].get("gpu_tests"):
        told = tests["result"]
        crashed = sum("crashed" in each for each in told["failed"])
        outcome = f"{told['passed']} passed, {len(told['failed'])} failed"
        outcome += f", {crashed} of them by the end of their process" if crashed else ""
        outcome += "" if told["finished"] else "; the time limit ended them"
        rows.append(["tests that ask for a GPU", outcome])
    for name, step in run["steps"].items():
        checks = name.startswith("sanitizer_") or name in ("graphs", "streams", "build")
        if checks and step["status"] != "skipped":
            told = step["result"].get("summary", [step["status"]])
            rows.append([name, told[0].strip("= ").lower()])
    yield ("check", "outcome"), rows

    rows = [
        [
            f"{size(step.removeprefix('op_'))}, {name}",
            microseconds(each["device"]),
            f"{each['launches']['kernels'] + each['launches']['copies_and_sets']}",
            percent(each["share_of_copy_bandwidth"]),
            microseconds(each["call"]),
        ]
        for step in run["steps"]
        if step.startswith("op_")
        for name, each in result_of(run, step).items()
        if isinstance(each, dict) and "device" in each
    ]
    header = ("prepare_latents, bfloat16", "device", "launches", "of the copy", "called alone")
    yield header, rows

    rows = []
    for step in run["steps"]:
        if step.startswith(("encoder_", "decoder_", "clips", "every_plan")):
            for name, each in timed(result_of(run, step)):
                rate = each.get("flops_per_s")
                shown = "" if rate is None else f"{rate / 1e12:.0f}"
                share = percent(each.get("share_of_conv_ceiling"))
                where = f"{size(step.replace('_', ' '))}: {name}"
                rows.append([where, microseconds(each), quantiles(each), shown, share])
    yield ("networks, bfloat16", "median", "10 % to 90 %", "TFLOP/s", "of the ceiling"), rows

    rows = [
        [size(step.replace("_", " ")), *(f"{us:.0f}" for us in (*spent.values(), total))]
        for step, spent in kernel_kinds(run).items()
        for total in [sum(spent.values())]
    ]
    yield ("µs on the device", *KINDS, OTHERS, "in all"), rows

    yield from clip_tables(run)
    result = result_of(run, "attention")
    variants = dict.fromkeys(name for each in result.values() for name, _ in timed(each))
    rows = [
        [shape, *(microseconds(each[v]) if v in each else "" for v in variants)]
        for shape, each in result.items()
    ]
    yield ("attention, one head", *variants), rows

    rows = [
        [f"{step}, {part}: {name}", microseconds(each), quantiles(each)]
        for step in ("stage", "seam")
        for part, result in result_of(run, step).items()
        for name, each in timed(result)
    ]
    yield ("requests at 480×832×81, host clock", "median", "10 % to 90 %"), rows


def clip_tables(run: Run) -> Iterator[tuple[Sequence[str], list[list[str]]]]:
    """Of clips: memory, the kernel between convolutions by its calls, errors."""
    rows = [
        [
            f"{size(step.replace('_', ' '))}: {name}",
            f"{result_of(run, step).get('ratios', {}).get(name, math.nan):.2f}",
            *(f"{peak[kind] / 2**30:.2f}" for kind in ("allocated", "reserved")),
        ]
        for step in run["steps"]
        if step.startswith("clips_decode")
        for name, peak in result_of(run, step).get("memory", {}).items()
    ]
    yield ("clips to pixels", "times ClipDecoder", "GiB allocated", "GiB reserved"), rows

    rows = [
        [
            name,
            f"{each['calls of a decode']}",
            microseconds(each["call"]),
            percent(each["share_of_copy_bandwidth"]),
        ]
        for name, each in result_of(run, "transforms").items()
        if isinstance(each, dict) and "bytes_per_s" in each
    ]
    yield ("transform_frames, 480×832×81", "calls", "median", "of the copy"), rows

    rows = [
        [name, *(f"{max(each[part]):.2e}" for part in ("frames", "between neighbours"))]
        for name, each in result_of(run, "numerics").items()
        if isinstance(each, dict) and "frames" in each
    ]
    yield ("rms error over standard deviation", "worst frame", "between neighbours"), rows


def kernel_kinds(run: Run) -> dict[str, dict[str, float]]:
    """Microseconds of one call's kernels by what they compute, for each step that has them."""
    found = {}
    for step in run["steps"]:
        kernels = result_of(run, step).get("kernels")
        if not kernels:
            continue
        spent = dict.fromkeys([*KINDS, OTHERS], 0.0)
        for each in kernels["each"]:
            kind = next((k for k, fits in KINDS.items() if re.search(fits, each["name"])), OTHERS)
            spent[kind] += each["us"]
        spent[OTHERS] += kernels["device_us"] - sum(spent.values())  # beyond those listed
        found[step] = spent
    return found


def gpu_markdown(runs: list[Run]) -> str:
    lines = [
        "# Measured on GPUs",
        "",
        "By `python -m benchmarks.gpu.campaign`, each run on a machine lent for some minutes; "
        "drawn up by `python -m benchmarks.report`. What is timed was compared with float64 of "
        "the same weights before, and the rows of one step are interleaved in one process. A "
        "network in a CUDA graph shows the device, one called eagerly the host too. Steps that "
        "are missing did not run, or failed, as the files say.",
        "",
        "![Time on the device of one frame, by what its kernels compute](kernels.png)",
    ]
    for run in runs:
        lines += ["", *gpu_machine(run)]
        for header, rows in gpu_tables(run):
            lines += ["", *table(header, rows)] if rows else []
    return "\n".join(lines) + "\n"


def draw_kernels(runs: list[Run], out: Path) -> None:
    """A PNG of what each run's frames took on the device; nothing where no run has kernels."""
    bars = []
    for run in runs:
        device = result_of(run, "environment")["device"].split()[1]
        commit = next(iter(run["commands"].values()))["commit"]
        for step, spent in kernel_kinds(run).items():
            what = "encoder 480×832" if step == "every_plan" else size(step.replace("_", " "))
            bars.append((what.split()[0], f"{what}\n{device}, {commit}", spent))
    if not bars:
        return
    plt = _pyplot()
    networks = dict.fromkeys(network for network, _, _ in bars)
    heights = [sum(network == each for each, _, _ in bars) for network in networks]
    figure, axes = plt.subplots(
        len(networks), 1, figsize=(9, 1.6 + 0.6 * len(bars)), height_ratios=heights, squeeze=False
    )
    for axis, network in zip(axes[:, 0], networks, strict=True):
        mine = [(name, spent) for each, name, spent in bars if each == network][::-1]
        left = [0.0] * len(mine)
        for kind, color in zip((*KINDS, OTHERS), (OUR_COLOR, *PALETTE), strict=False):
            widths = [spent[kind] / 1e3 for _, spent in mine]
            axis.barh([name for name, _ in mine], widths, left=left, color=color, label=kind)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        axis.set_xlabel("ms on the device, one frame, bfloat16")
    axes[0, 0].legend(ncols=4, loc="lower left", bbox_to_anchor=(0, 1.02), frameon=False)
    figure.tight_layout()
    figure.savefig(out, dpi=120)
    plt.close(figure)


# The documents.


# Results on a CPU; of what is in several, the last counts: suites that were measured again.
ON_CPU = ("cpu", "clips", "encoder")


def committed(name: str) -> Result:
    return json.loads((RESULTS / name / "result.json").read_text())


_GRAPH = "folded, fused kernels, CUDA graph"
# What it is, the step, and the two paths.
HEADLINES = (
    ("a photograph to latents, 480×832", "encoder_480x832", "vae.encode, 1 frame", _GRAPH),
    ("where all 81 frames are encoded", "encoder_480x832", "vae.encode, 81 frames", _GRAPH),
    ("a latent to a picture, 1024×1024", "decoder_1024x1024", "vae.decode, 1 frame", _GRAPH),
    (
        "a clip of 5 frames to latents, 480×832",
        *("clips", "vae.encode, 5 frames", "ClipEncoder, 5 frames, CUDA graph"),
    ),
)


# What it is, the suite, the case, and the VAE's path.
CPU_HEADLINES = (
    ("a photograph to latents, 480×832", "encoder", "480x832", ONE_FRAME),
    (
        "a clip of 17 frames to latents, 256×448",
        *("clips", "encode 256x448, 17 frames", "vae.encode of 17 frames"),
    ),
    (
        "latents to a clip of 17 frames, 256×448",
        *("clips", "decode 256x448, 17 frames", "vae.decode of 17 frames"),
    ),
)


def headline() -> list[str]:
    """README's rows: an H100's before a CPU's."""
    run = read_run(RESULTS / "gpu" / "h100_f6d937b")
    pairs = []
    for what, step, theirs, ours in HEADLINES:
        result = result_of(run, step)
        medians = (result[path]["median_us"] / 1e6 for path in (theirs, ours))
        pairs.append((f"H100, bfloat16: {what}", *medians))
    on_cpu = {
        (row["suite"], row["case"], row["path"]): row["median"]
        for name in ON_CPU
        for row in committed(name)["rows"]
        if row["dtype"] == "float32"
    }
    for what, suite, case, theirs in CPU_HEADLINES:
        medians = (on_cpu[suite, case, path] for path in (theirs, OURS))
        pairs.append((f"2 CPU cores, float32: {what}", *medians))
    rows = [(what, seconds(a), seconds(b), f"**{ratio(a / b)}**") for what, a, b in pairs]
    return table(("", "the VAE", "this package", "faster by"), rows)


def judged() -> list[str]:
    """Goals and profile."""
    results = {name: committed(name) for name in ON_CPU}
    goals = {goal["name"]: goal for result in results.values() for goal in result["goals"]}
    return [
        *(
            f"- [{name}](results/{name}/result.md): {provenance(result)}; "
            f"{result['minutes']} minutes."
            for name, result in results.items()
        ),
        "",
        *goal_lines([*goals.values()]),
        "",
        "Where an encode's time goes:",
        "",
        *profile_lines(results["cpu"]["profile"]),
    ]


def engines() -> list[str]:
    result = committed("cpu")
    return [f"{provenance(result)}.", "", *engine_lines(result["engines"])]


SECTIONS: dict[str, dict[str, Callable[[], list[str]]]] = {
    "README.md": {"headline": headline},
    "docs/engines.md": {"engines": engines},
    "benchmarks/README.md": {"judged": judged},
}


def updated(text: str, sections: Mapping[str, Callable[[], list[str]]]) -> str:
    """`text` with each section anew between its markers."""
    for name, section in sections.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, rest = text.split(begin)
        _, after = rest.split(end)
        text = "\n".join((before + begin, *section(), end + after))
    return text


def main() -> int:
    for name, sections in SECTIONS.items():
        path = ROOT / name
        path.write_text(updated(path.read_text(), sections))
    for path in RESULTS.glob("*/result.json"):
        path.with_name("result.md").write_text(markdown(committed(path.parent.name)) + "\n")
    runs = gpu_runs()
    (RESULTS / "gpu" / "README.md").write_text(gpu_markdown(runs))
    draw_kernels(runs, RESULTS / "gpu" / "kernels.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
