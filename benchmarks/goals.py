"""The goals that the package sets itself, judged on a result."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.cases import LAST_TAPS, ONE_FRAME, OURS, USUAL_CASES, all_frames
from benchmarks.harness import Row
from benchmarks.suites import pixels
from benchmarks.suites.bulk import BARE, LOOP, MEASURED, ON_RAY
from benchmarks.suites.op import COPY

Result = dict[str, Any]


@dataclass(frozen=True)
class Goal:
    """A figure and its bound.

    Attributes:
        relation: "at least" or "at most".
        unit: of both figures; "×" for ratios.
    """

    name: str
    value: float
    relation: str
    bound: float
    unit: str = "×"

    @property
    def met(self) -> bool:
        compare: Callable[[float, float], bool] = {"at least": operator.ge, "at most": operator.le}[
            self.relation
        ]
        return compare(self.value, self.bound)


def judge(result: Result) -> list[Result]:
    """Every goal whose figure `result` holds, as dictionaries with `met`."""
    return [{**asdict(goal), "met": goal.met} for goal in _goals(result)]


def _median(result: Result, beside: Row, path: str) -> float:
    """Seconds of another path of the same case."""
    where = "suite", "case", "dtype"
    (found,) = (
        row["median"]
        for row in result["rows"]
        if row["path"] == path and all(row[key] == beside[key] for key in where)
    )
    return float(found)


def _goals(result: Result) -> Iterator[Goal]:
    for row in result["rows"]:
        if (row["suite"], row["case"]) == ("bulk", MEASURED) and row["path"] not in (BARE, LOOP):
            bound = {BARE: 0.85 if row["path"] == ON_RAY else 0.92, LOOP: 4}[row["baseline"]]
            name = f"bulk {row['case']}, {row['path']}: speed against {row['baseline']}"
            yield Goal(name, row["speedup"], "at least", bound)
        if row["path"] != OURS:
            continue
        match row["suite"], row["case"], row["baseline"]:
            case "encoder", "480x832" as case, _:
                name = f"encoder {case}, {row['dtype']}: speed against {ONE_FRAME}"
                yield Goal(name, row["speedup"], "at least", 6)
            case "op", case, _ if case in USUAL_CASES:
                name = f"op {case}, {row['dtype']}: time against {COPY}"
                yield Goal(name, 1 / row["speedup"], "at most", 1.1)
            case "stage", case, baseline if baseline == all_frames(17):
                name = f"stage {case}, {row['dtype']}: speed against {baseline}"
                yield Goal(name, row["speedup"], "at least", 70)
            case "decoder", "256x448" as case, baseline:
                name = f"decoder {case}, {row['dtype']}: speed against"
                bound = {"float32": 5.5, "bfloat16": 3}[row["dtype"]]
                yield Goal(f"{name} {baseline}", row["speedup"], "at least", bound)
                if row["dtype"] == "float32":
                    faster = _median(result, row, LAST_TAPS) / row["median"]
                    yield Goal(f"{name} {LAST_TAPS}", faster, "at least", 2.2)
            case "clips", case, baseline if "256x448, 17 frames" in case and "vae." in baseline:
                bound = 3 if case.startswith("decode") else 3.5
                name = f"{case}, {row['dtype']}: speed"
                yield Goal(name, row["speedup"], "at least", bound)
            case "pixels", "1280x1920 to 480x832" as case, pixels.PILLOW:
                yield Goal(f"picture {case}: speed against Pillow", row["speedup"], "at least", 8)
            case "pixels", "1280x1920 to 480x832, 1 thread" as case, pixels.PILLOW:
                yield Goal(f"picture {case}: speed against Pillow", row["speedup"], "at least", 4)
            case "pixels", case, pixels.DECODE if "3024x4032" in case:
                name = f"{case}: time against {pixels.DECODE}"
                yield Goal(name, 1 / row["speedup"], "at most", 1.3)
    figures = result.get("engines", {}).get("diffusers", {})
    for row in figures.get("rows", []):
        if (row["request"], row["mode"], figures.get("num_frames")) == ("I2V", "fast", 17):
            size = f"{figures['height']}x{figures['width']}"
            name = f"diffusers' own stage, I2V {size}, 17 frames: speed"
            yield Goal(name, row["ratio"], "at least", 70)
    if "ratio" in (figures := result.get("bulk_memory", {})):
        counts = f"{figures['many']['samples']} pictures over that of {figures['few']['samples']}"
        yield Goal(f"bulk: peak memory of {counts}", figures["ratio"], "at most", 1.05)
    if memory := result.get("memory"):
        megabytes = memory["bfloat16_parameters_bytes"] / 1e6
        yield Goal("parameters in bfloat16", megabytes, "at most", 110, " MB")
        for dtype in ("float32", "bfloat16"):
            name = f"peak memory of an encode at {memory['size']}, {dtype}: share of the 3-D VAE's"
            yield Goal(name, memory[dtype]["peak_ratio"], "at most", 0.5)
    if memory := result.get("clip_memory"):
        name = f"peak memory of a decode at {memory['size']}, {memory['frames']} frames, float32"
        ratio = memory["float32"]["peak_ratio"]
        yield Goal(f"{name}: share of the 3-D VAE's", ratio, "at most", 1)
