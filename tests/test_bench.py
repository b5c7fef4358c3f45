"""The benchmarks run, gate and report; README's figures are those of the committed result."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import harness  # noqa: E402
import suites  # noqa: E402

matplotlib = pytest.importorskip("matplotlib")
pytest.importorskip("diffusers")

import bench  # noqa: E402
import readme  # noqa: E402


def row(**changes: object) -> dict[str, object]:
    return {
        "suite": "op", "case": "480x832, 81 frames", "dtype": "float32", "path": "ours",
        "seconds": [1e-3], "median": 1e-3, "q10": 1e-3, "q90": 1e-3, "speedup": 2.5, "error": None,
        **changes,
    }  # fmt: skip


@pytest.fixture
def result() -> dict[str, object]:
    return {
        "setting": "short",
        "machine": "a machine",
        "versions": {"diffusers": "0.42.1"},
        "commit": "abc",
        "date": "2026-11-24",
        "rows": [
            row(),
            row(dtype="bfloat16", path="ours, in place"),
            row(suite="encoder", case="480x832", median=2.25, q10=2.0, q90=2.5, error=1e-6),
            row(suite="growth", case="256x448, 5 frames", path="vae.encode of 5 frames"),
        ],
        "memory": {
            "vae": {"resident": 1.0, "peak": 200.0},
            "ours": {"resident": 1.0, "peak": 90.0},
            "peak_ratio": 0.45,
            "bfloat16_parameters_bytes": 106_400_000,
        },
        "engines": {"sglang": {"skipped": "its environment is not there"}},
    }


def test_readme_shows_the_committed_result():
    text = (ROOT / "README.md").read_text()
    assert readme.updated(text, readme.committed_result()) == text
    assert text.count(readme.BEGIN) == text.count(readme.END) == 1


def test_a_changed_figure_would_be_seen(result: dict[str, object]):
    text = f"before\n{readme.BEGIN}\n{readme.END}\nafter"
    shown = readme.updated(text, result)
    assert "| encoder | 480×832, float32 | ours | 2.25 s |" in shown
    assert "2.50×" in shown
    result["rows"][2]["median"] = 2.24  # type: ignore[index]
    assert readme.updated(text, result) != shown
    assert readme.updated(shown, None) != shown


def test_a_result_is_written_whole(result: dict[str, object], tmp_path: Path):
    bench.write(result, tmp_path)
    assert json.loads((tmp_path / "result.json").read_text()) == result
    with (tmp_path / "result.csv").open() as file:
        assert [float(r["median"]) for r in csv.DictReader(file)] == [1e-3, 1e-3, 2.25, 1e-3]
    assert "its environment is not there" in (tmp_path / "result.md").read_text()
    for plot in ("encoder.png", "op.png"):
        assert (tmp_path / plot).read_bytes().startswith(b"\x89PNG")


def test_a_wrong_result_ends_the_run():
    right = torch.arange(4.0)
    for wrong in (right + 1, right.half(), right[:3], right * float("nan")):
        with pytest.raises(harness.GateError, match="correctness gate failed: here"):
            harness.gate_error("here", wrong, right, 1e-5)
    with pytest.raises(harness.GateError):
        harness.gate_equal("here", right + 1e-7, right)


def test_paths_take_turns():
    order: list[str] = []
    timings = harness.measure(
        {name: lambda n=name: order.append(n) for name in "ab"}, rounds=4, warmup=1
    )
    assert "".join(order) == "ab" + "ab" + "ba" + "ab" + "ba"
    assert all(len(t.seconds) == 4 and t.quantile(0) <= t.median <= t.quantile(1)
               for t in timings.values())  # fmt: skip


def test_the_unfused_switch_is_put_back():
    before = suites.layers._WINOGRAD_TILES, suites.layers.rms_norm_silu
    with suites.unfused():
        assert suites.layers.rms_norm_silu is suites.reference.rms_norm_silu
    assert (suites.layers._WINOGRAD_TILES, suites.layers.rms_norm_silu) == before


def test_the_command_line_measures(tmp_path: Path):
    run = subprocess.run(
        [sys.executable, "-m", "cosmos3_fast", "bench", "--suites", "memory", "--out", tmp_path],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    memory = json.loads((tmp_path / "result.json").read_text())["memory"]
    # The package's own bounds: bytes, not seconds.
    assert memory["bfloat16_parameters_bytes"] <= 110e6
    assert memory["peak_ratio"] <= 0.5
    unknown = subprocess.run(
        [sys.executable, "-m", "cosmos3_fast", "bench", "--suites", "nothing"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert unknown.returncode == 2
    assert "--suites: unknown nothing" in unknown.stderr
