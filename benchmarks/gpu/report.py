"""Tables and a plot of what the GPU campaign measured: `benchmarks/results/gpu`.

    python -m benchmarks.gpu.report

Each folder there is one run on one machine: a file for each command of the campaign, and
`notes.md`, which says what a reader has to know of it.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.formatting import seconds, size, spread, table, three_digits
from benchmarks.harness import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "gpu"
COMMANDS = ("checks", "sanitizers", "figures", "decoding")
# What a kernel's name says it computes; the first that fits.
KINDS = {
    "convolutions": r"fprop|cudnn",
    "norms and sums": r"cosmos3::",
    "attention": r"fmha|softmax|nvjet|bfloat16_copy_kernel",
}
OTHERS = "others"
COLORS = ("#0072B2", "#D55E00", "#E69F00", "#999999")
Run = dict[str, Any]


def read(folder: Path) -> Run:
    """One run: its commands' files, and every step's result by name."""
    files = [folder / f"{command}.json" for command in COMMANDS]
    commands = {path.stem: json.loads(path.read_text()) for path in files if path.exists()}
    steps = {name: step for each in commands.values() for name, step in each["steps"].items()}
    notes = folder / "notes.md"
    text = notes.read_text().strip() if notes.exists() else ""
    return {"commands": commands, "steps": steps, "notes": text}


def result_of(run: Run, step: str) -> dict[str, Any]:
    return run["steps"].get(step, {}).get("result", {})


def timed(result: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, each in result.items():
        if isinstance(each, dict) and "median_us" in each:
            yield name, each


def microseconds(each: dict[str, Any]) -> str:
    return seconds(each["median_us"] / 1e6)


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def _machine(run: Run) -> Iterator[str]:
    first = next(iter(run["commands"].values()))
    environment = result_of(run, "environment")
    driver = environment["nvidia_smi"].splitlines()[-1].split(", ")[1]
    ceilings = result_of(run, "ceilings")
    yield f"## {environment['device']}, commit {first['commit']}"
    yield ""
    yield (
        f"{first['machine']}, driver {driver}, cuDNN {environment['cudnn']}, Triton "
        f"{environment['packages']['triton']}; {first['started'][:10]}. A large copy moves "
        f"{ceilings['copy_bytes_per_s'] / 1e12:.2f} TB/s, read and written; the fastest of three "
        f"3x3 convolutions in bfloat16 {ceilings['conv_flops_per_s'] / 1e12:.0f} TFLOP/s."
    )


def _notes(run: Run) -> Iterator[str]:
    if run["notes"]:
        yield ""
        yield run["notes"]


def _checks(run: Run) -> Iterator[str]:
    rows = []
    tests = run["steps"].get("gpu_tests")
    if tests:
        told = tests["result"]
        failed = told["failed"]
        crashed = sum("crashed" in each for each in failed)
        rows.append(
            [
                "tests that ask for a GPU",
                f"{told['passed']} passed, {len(failed)} failed"
                + (f", {crashed} of them by the end of their process" if crashed else "")
                + ("" if told["finished"] else "; the time limit ended them"),
            ]
        )
    for name, step in run["steps"].items():
        if name.startswith("sanitizer_") or name in ("graphs", "streams", "build"):
            if step["status"] == "skipped":
                continue
            told = step["result"].get("summary", [step["status"]])
            rows.append([name, told[0].strip("= ").lower()])
    if rows:
        yield ""
        yield from table(["check", "outcome"], rows)


def _op(run: Run) -> Iterator[str]:
    rows = []
    for step in run["steps"]:
        if not step.startswith("op_"):
            continue
        for name, each in result_of(run, step).items():
            if isinstance(each, dict) and "device" in each:
                rows.append(
                    [
                        f"{size(step.removeprefix('op_'))}, {name}",
                        microseconds(each["device"]),
                        f"{each['launches']['kernels'] + each['launches']['copies_and_sets']}",
                        percent(each["share_of_copy_bandwidth"]),
                        microseconds(each["call"]),
                    ]
                )
    if rows:
        header = ["prepare_latents, bfloat16", "device", "launches", "of the copy", "called alone"]
        yield ""
        yield from table(header, rows)


def _networks(run: Run) -> Iterator[str]:
    rows = []
    for step in run["steps"]:
        if not step.startswith(("encoder_", "decoder_", "clips", "every_plan")):
            continue
        where = size(step.replace("_", " "))
        for name, each in timed(result_of(run, step)):
            rate = each.get("flops_per_s")
            rows.append(
                [
                    f"{where}: {name}",
                    microseconds(each),
                    spread(each["p10_us"] / 1e6, each["p90_us"] / 1e6),
                    "" if rate is None else f"{rate / 1e12:.0f}",
                    percent(each.get("share_of_conv_ceiling")),
                ]
            )
    if rows:
        header = ["networks, bfloat16", "median", "10 % to 90 %", "TFLOP/s", "of the ceiling"]
        yield ""
        yield from table(header, rows)


def kinds(run: Run) -> dict[str, dict[str, float]]:
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


def _kernels(run: Run) -> Iterator[str]:
    found = kinds(run)
    if found:
        rows = [
            [size(step.replace("_", " ")), *(f"{us:.0f}" for us in (*spent.values(), total))]
            for step, spent in found.items()
            for total in [sum(spent.values())]
        ]
        yield ""
        yield from table(["µs on the device", *KINDS, OTHERS, "in all"], rows)


def _attention(run: Run) -> Iterator[str]:
    result = result_of(run, "attention")
    if result:
        variants = dict.fromkeys(name for each in result.values() for name, _ in timed(each))
        rows = [
            [shape, *(microseconds(each[v]) if v in each else "" for v in variants)]
            for shape, each in result.items()
        ]
        yield ""
        yield from table(["attention, one head", *variants], rows)


def _requests(run: Run) -> Iterator[str]:
    rows = []
    for step in ("stage", "seam"):
        for part, result in result_of(run, step).items():
            for name, each in timed(result):
                low, high = each["p10_us"] / 1e6, each["p90_us"] / 1e6
                rows.append([f"{step}, {part}: {name}", microseconds(each), spread(low, high)])
    if rows:
        yield ""
        yield from table(["requests at 480×832×81, host clock", "median", "10 % to 90 %"], rows)


def report(runs: list[Run]) -> str:
    lines = [
        "# Measured on GPUs",
        "",
        "By `python -m benchmarks.gpu.campaign`, each run on a machine lent for some minutes; "
        "drawn up by `python -m benchmarks.gpu.report`. What is timed was compared with float64 of "
        "the same weights before, and the rows of one step are interleaved in one process. A "
        "network in a CUDA graph shows the device, one called eagerly the host too. Steps that "
        "are missing did not run, or failed, as the files say.",
        "",
        "![Time on the device of one frame, by what its kernels compute](kernels.png)",
    ]
    for run in runs:
        lines.append("")
        for part in (_machine, _notes, _checks, _op, _networks, _kernels, _attention, _requests):
            lines += part(run)
    return "\n".join(lines) + "\n"


def draw(runs: list[Run], out: Path) -> None:
    """A PNG of what each run's frames took on the device; nothing where no run has kernels."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    bars = []
    for run in runs:
        device = result_of(run, "environment")["device"].split()[1]
        commit = next(iter(run["commands"].values()))["commit"]
        for step, spent in kinds(run).items():
            what = size(step.replace("_", " ")) if "x" in step else "encoder 480×832"
            bars.append((what.split()[0], f"{what}\n{device}, {commit}", spent))
    if not bars:
        return
    networks = dict.fromkeys(network for network, _, _ in bars)
    heights = [sum(network == each for each, _, _ in bars) for network in networks]
    figure, axes = plt.subplots(
        len(networks), 1, figsize=(9, 1.6 + 0.6 * len(bars)), height_ratios=heights, squeeze=False
    )
    for axis, network in zip(axes[:, 0], networks, strict=True):
        mine = [(name, spent) for each, name, spent in bars if each == network][::-1]
        left = [0.0] * len(mine)
        for kind, color in zip((*KINDS, OTHERS), COLORS, strict=True):
            widths = [spent[kind] / 1e3 for _, spent in mine]
            axis.barh([name for name, _ in mine], widths, left=left, color=color, label=kind)
            for y, (start, width) in enumerate(zip(left, widths, strict=True)):
                if width > 0.04 * max(sum(spent.values()) / 1e3 for _, spent in mine):
                    axis.text(start + width / 2, y, three_digits(width), ha="center", va="center")
            left = [start + width for start, width in zip(left, widths, strict=True)]
        axis.set_xlabel("ms on the device, one frame, bfloat16")
    axes[0, 0].legend(ncols=4, loc="lower left", bbox_to_anchor=(0, 1.02), frameon=False)
    figure.tight_layout()
    figure.savefig(out, dpi=120)
    plt.close(figure)


def main() -> int:
    runs = [read(folder) for folder in sorted(RESULTS.iterdir()) if folder.is_dir()]
    (RESULTS / "README.md").write_text(report(runs))
    draw(runs, RESULTS / "kernels.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
