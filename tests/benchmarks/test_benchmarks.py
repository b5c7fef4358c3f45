"""The benchmarks run, gate and report; README's figures are those of the committed result."""

from __future__ import annotations

import csv
import json
import re
import statistics
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("diffusers")

from benchmarks import goals, harness, paths, readme, run, suites
from benchmarks.paths import ONE_FRAME, OURS, UNFUSED, all_frames
from benchmarks.suites import decoder, engines
from benchmarks.suites import op as op_suite
from benchmarks.suites.op import COMPILED, COPY, FORMULA, IN_PLACE

ROOT = harness.ROOT
# Suites of rows, whose plots are one each.
OF_ROWS = {name for name, suite in suites.all_suites().items() if suite.lines is None}


def rows(suite: str, case: str, dtype: str, baseline: str, **medians: float) -> list[Any]:
    """Of paths and medians; a name's underscores stand for what a keyword cannot hold."""
    names = {
        "formula": FORMULA, "compiled": COMPILED, "copy": COPY, "ours": OURS, "place": IN_PLACE,
        "one": ONE_FRAME, "unfused": UNFUSED, "all": all_frames(17),
    }  # fmt: skip
    times = {names[name]: median for name, median in medians.items()}
    return [
        {
            "suite": suite, "case": case, "dtype": dtype, "path": path,
            "seconds": [0.9 * median, median, 1.1 * median], "median": median,
            "q10": 0.9 * median, "q90": 1.1 * median, "baseline": baseline,
            "speedup": times[baseline] / median, "error": 1e-6 if path == OURS else None,
        }
        for path, median in times.items()
    ]  # fmt: skip


def squeezed(text: str) -> str:
    """A table without the spaces that align its columns."""
    return re.sub(" +", " ", text)


@pytest.fixture
def result() -> dict[str, Any]:
    op = {"formula": 9e-3, "compiled": 2e-3, "copy": 1e-3, "ours": 1.05e-3, "place": 1e-4}
    memory = {
        "vae": {"resident": 100.0, "peak": 200.0},
        "ours": {"resident": 40.0, "peak": 90.0},
        "peak_ratio": 0.45,
    }
    result: dict[str, Any] = {
        "setting": "short",
        "machine": "a machine",
        "load_before": 0.25,
        "versions": {"diffusers": "0.42.1"},
        "kernels": {"prepare_latents": "cpp"},
        "commit": "abc",
        "date": "2026-11-24",
        "minutes": 4.5,
        "rows": [
            *rows("op", "480x832, 81 frames", "float32", COPY, **op),
            *rows("op", "480x832, 81 frames", "bfloat16", COPY, **op),
            *rows("op", "256x448, 17 frames", "float32", COPY, **op),
            *rows("encoder", "480x832", "float32", ONE_FRAME, one=8.0, unfused=2.0, ours=1.25),
            *rows("encoder", "480x832", "bfloat16", ONE_FRAME, one=4.0, unfused=1.0, ours=0.7),
            *rows("growth", "256x448, T=1", "float32", ONE_FRAME, one=2.0, ours=0.3),
            *rows("stage", "480x832, 17 frames", "float32", ONE_FRAME, one=8.0, ours=1.3),
            *rows("stage", "480x832, 17 frames", "float32", all_frames(17), all=99, ours=1),
        ],
        "memory": {
            "size": "480x832", "float32": memory, "bfloat16": memory,
            "bfloat16_parameters_bytes": 106_400_000,
        },
        "profile": {
            "float32": {
                "size": "480x832", "seconds": 1.25, "tflop": 0.647, "tflop_per_s": 0.52,
                "matmul_tflop_per_s": 0.2, "shares": {"cosmos3::winograd_conv3x3": 0.75},
            }
        },
        "engines": {
            "sglang": {"skipped": "its environment is not there"},
            "diffusers": {
                "version": "0.42.1", "height": 256, "width": 448, "num_frames": 17,
                "rows": [
                    {
                        "request": "I2V", "mode": "fast", "pixel_frames_encoded": 1,
                        "tflop": 0.18, "median_s": 0.4, "ratio": 69.0,
                    }
                ],
            },
        },
    }  # fmt: skip
    result["goals"] = goals.judge(result)
    return result


@pytest.mark.parametrize("name", readme.SECTIONS)
def test_the_documents_show_the_committed_result(name: str):
    text = (ROOT / name).read_text()
    assert readme.updated(text, readme.committed_result(), readme.SECTIONS[name]) == text


def test_the_committed_result_is_whole():
    result = readme.committed_result()
    if result is None:
        pytest.skip("nothing is committed yet")
    medians = {}
    for row in result["rows"]:
        assert row["median"] == statistics.median(row["seconds"])
        medians[row["suite"], row["case"], row["dtype"], row["baseline"], row["path"]] = row
    for key, row in medians.items():
        baseline = medians[(*key[:4], row["baseline"])]
        assert row["speedup"] == pytest.approx(baseline["median"] / row["median"])
    # Suites that came later are not in it.
    shown = {row["suite"] for row in result["rows"]}
    assert shown == {"op", "encoder", "growth", "stage"}
    assert result["goals"] == goals.judge(result)
    assert result["setting"] == "full"
    assert "dirty" not in result["commit"]
    plots = {path.stem for path in readme.COMMITTED.parent.glob("*.png")}
    assert plots == {*shown, "memory", "summary"}


def test_each_figure_is_shown_where_it_belongs(result: dict[str, Any]):
    measured = squeezed(readme.measured(result))
    assert "| op, 480×832, 81 frames, float32 | 9.00 ms, eager formula | " in measured
    assert "1.00 ms, clone + 1-frame copy | 1.05 ms | **8.57×** |" in measured
    assert "| 8.00 s, vae.encode of 1 frame | 2.00 s, folded, unfused | 1.25 s | **6.40×** |" in (
        measured
    )
    assert "| 99.0 s, vae.encode of 17 frames | | 1.00 s | **99.0×** |" in measured
    assert "90 MiB against 200 MiB" in measured
    # Not what users run, and the clip that nobody has to encode.
    assert "256×448" not in measured
    shown = squeezed(readme.engines_in_full(result))
    assert (
        "| diffusers 0.42.1, 256×448, 17 frames, I2V | fast | 1 | 0.18 | 400 ms | 69.0× |" in shown
    )
    assert "sglang: skipped, its environment is not there." in shown
    judged = squeezed(readme.judged(result))
    assert "| at least 70× | 69.0× | **no** |" in judged
    assert "| `cosmos3::winograd_conv3x3` | 75.0% |" in judged


def test_readme_has_a_row_per_engine(result: dict[str, Any]):
    figures = result["engines"]["diffusers"]
    (fast,) = figures["rows"]
    figures["rows"] = [{**fast, "mode": "unpatched", "median_s": 27.6, "ratio": 1.0}, fast]
    assert squeezed(readme.engines_in_short(result)).splitlines()[2:] == [
        "| diffusers 0.42.1, 256×448, 17 frames, I2V | 27.6 s | 400 ms | **69.0×** |"
    ]


def test_a_changed_figure_would_be_seen(result: dict[str, Any]):
    sections = readme.SECTIONS["README.md"]
    empty = "".join(f"a\n<!-- {name}: begin -->\n<!-- {name}: end -->\nb\n" for name in sections)
    shown = readme.updated(empty, result, sections)
    assert readme.updated(shown, result, sections) == shown
    for row in result["rows"]:
        if (row["suite"], row["path"]) == ("encoder", OURS):
            row["median"] *= 1.01
    assert readme.updated(shown, result, sections) != shown
    assert readme.NOT_MEASURED in readme.updated(shown, None, sections)


@pytest.mark.parametrize(
    ("suite", "case", "medians", "met"),
    [
        ("encoder", "480x832", {"one": 6.0, "ours": 1.0}, True),
        ("encoder", "480x832", {"one": 5.99, "ours": 1.0}, False),
        ("op", "480x832, 81 frames", {"copy": 1.0, "ours": 1.09}, True),
        ("op", "720x1280, 189 frames", {"copy": 1.0, "ours": 1.11}, False),
        ("stage", "480x832, 17 frames", {"all": 70.0, "ours": 1.0}, True),
        ("stage", "480x832, 17 frames", {"all": 69.9, "ours": 1.0}, False),
    ],
)
def test_goals_are_judged(suite: str, case: str, medians: dict[str, float], met: bool):
    baseline = {"encoder": ONE_FRAME, "op": COPY, "stage": all_frames(17)}[suite]
    (goal,) = goals.judge({"rows": rows(suite, case, "float32", baseline, **medians)})
    assert goal["met"] is met


@pytest.mark.parametrize(
    ("dtype", "vae", "plain", "met"),
    [
        ("float32", 5.5, 2.2, [True, True]),
        ("float32", 5.4, 2.3, [False, True]),
        ("float32", 5.6, 2.1, [True, False]),
        ("bfloat16", 3.0, 1.0, [True]),
        ("bfloat16", 2.9, 1.0, [False]),
    ],
)
def test_the_decoders_goals_are_judged(dtype: str, vae: float, plain: float, met: list[bool]):
    medians = {decoder.VAE: vae, decoder.PLAIN: plain, OURS: 1.0}
    rows = [
        {
            **{"suite": "decoder", "case": "256x448", "dtype": dtype, "path": path},
            **{"median": median, "baseline": decoder.VAE, "speedup": vae / median},
        }
        for path, median in medians.items()
    ]
    assert [goal["met"] for goal in goals.judge({"rows": rows})] == met


def test_memory_and_engine_goals_are_judged(result: dict[str, Any]):
    result["rows"] = []
    met = {goal["name"]: goal["met"] for goal in goals.judge(result)}
    assert list(met.values()) == [False, True, True, True]
    result["memory"]["bfloat16"] = {**result["memory"]["bfloat16"], "peak_ratio": 0.51}
    result["memory"]["bfloat16_parameters_bytes"] = 110_000_001
    assert [goal["met"] for goal in goals.judge(result)] == [False, False, True, False]


def test_a_result_is_written_whole(result: dict[str, Any], tmp_path: Path):
    run.write(result, tmp_path)
    assert json.loads((tmp_path / "result.json").read_text()) == result
    with (tmp_path / "result.csv").open() as file:
        written = [(row["path"], float(row["median"])) for row in csv.DictReader(file)]
    assert written == [(row["path"], row["median"]) for row in result["rows"]]
    assert "its environment is not there" in (tmp_path / "result.md").read_text()
    plots = list(tmp_path.glob("*.png"))
    shown = {row["suite"] for row in result["rows"]}
    assert {plot.stem for plot in plots} == {*shown, "memory", "summary"}
    assert all(plot.read_bytes().startswith(b"\x89PNG") for plot in plots)


def test_every_suite_runs_behind_its_gate(tmp_path: Path):
    # The engines' scripts need environments of their own.
    result = run.run("tiny", [name for name in suites.all_suites() if name != "engines"])
    shown = {
        suite: [row["path"] for row in result["rows"] if row["suite"] == suite] for suite in OF_ROWS
    }
    assert {name: shown[name] for name in ("op", "encoder", "growth", "stage")} == {
        "op": [FORMULA, COMPILED, COPY, OURS, IN_PLACE] * 2,
        "encoder": [ONE_FRAME, UNFUSED, OURS] * 2,
        "growth": [ONE_FRAME, OURS, all_frames(5), OURS],
        "stage": [ONE_FRAME, OURS, all_frames(5), OURS],
    }
    if find_spec("pyarrow") is None:
        assert shown.pop("bulk") == []
    assert all(OURS in names for names in shown.values())
    assert all(row["median"] > 0 and len(row["seconds"]) > 0 for row in result["rows"])
    gated = [
        row for row in result["rows"] if row["suite"] not in ("op", "bulk") and row["path"] == OURS
    ]
    for row in gated:
        error = row["error"]
        assert error == 0 if row["suite"] == "pixels" else 0 < error < 1e-2
    for figures in result["profile"].values():
        assert figures["tflop"] > 0
        assert sum(figures["shares"].values()) == pytest.approx(1, abs=0.2)
    for dtype in paths.DTYPES:
        assert all(result["memory"][dtype][side]["peak"] > 0 for side in ("vae", "ours"))
    run.write(result, tmp_path)
    assert (tmp_path / "summary.png").exists()


@pytest.mark.parametrize("suite", ["op", "encoder", "growth", "stage"])
def test_a_wrong_path_ends_the_run_with_nothing_written(
    suite: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    if suite == "op":
        formula = op_suite.prepare_latents_formula

        def wrong(*args: Any) -> Any:
            latents, mask = formula(*args)
            return latents, mask * 0

        monkeypatch.setattr(op_suite, "prepare_latents_formula", wrong)
    else:
        forward = paths.FrameEncoder.forward
        monkeypatch.setattr(paths.FrameEncoder, "forward", lambda *args: forward(*args) * 1.0001)
        # The probe of `from_vae` would refuse it first.
        from_vae = paths.FrameEncoder.from_vae
        monkeypatch.setattr(paths.FrameEncoder, "from_vae", lambda vae: from_vae(vae, probe=False))
    with pytest.raises(harness.GateError, match=rf"correctness gate failed: {suite} \d+x"):
        run.main(["--tiny", "--suites", suite, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_gates_refuse_what_differs():
    right = torch.arange(4.0)
    for wrong in (right + 1, right.half(), right[:3], right * float("nan")):
        with pytest.raises(harness.GateError, match="correctness gate failed: here"):
            harness.gate_error("here", wrong, right, 1e-5)
    with pytest.raises(harness.GateError):
        harness.gate_equal("here", right + 1e-7, right)
    half = right.bfloat16()
    compared = harness.gate_rounding("here", half + 0.125, half - 0.25, right)
    assert compared.error == pytest.approx(compared.bound / 2)
    for wrong in (half + 0.5, right, half[:3], half * float("nan")):
        with pytest.raises(harness.GateError, match="correctness gate failed: here"):
            harness.gate_rounding("here", wrong, half - 0.25, right)


def test_paths_take_turns():
    order: list[str] = []
    timings = harness.measure(
        {name: lambda n=name: order.append(n) for name in "ab"}, rounds=4, warmup=1
    )
    assert "".join(order) == "ab" + "ab" + "ba" + "ab" + "ba"
    assert all(
        len(t.seconds) == 4 and t.quantile(0) <= t.median <= t.quantile(1) for t in timings.values()
    )
    order.clear()
    harness.measure(
        {name: lambda n=name: order.append(n) for name in "ab"}, rounds=2, warmup=0, repeats=2
    )
    assert "".join(order) == "aaabbb" + "bbbaaa"
    with pytest.raises(ValueError, match="repeats"):
        harness.measure({}, rounds=1, repeats=0)


def test_the_unfused_switch_is_put_back():
    names = ("rms_norm_silu", "add_rms_norm_silu", "add_pad", "defers_bias", "takes_winograd")
    before = [getattr(paths.layers, name) for name in names]
    with paths.unfused():
        assert not {getattr(paths.layers, name) for name in names} & set(before)
    assert [getattr(paths.layers, name) for name in names] == before


def test_engine_scripts_are_run_or_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(engines, "engine_python", lambda engine: None)
    assert "make test-sglang makes it" in engines.run_engine("sglang", [])["skipped"]
    monkeypatch.setattr(engines, "engine_python", lambda engine: sys.executable)
    monkeypatch.setattr(engines, "ROOT", tmp_path)
    script = tmp_path / "benchmarks" / "engines" / "sglang.py"
    script.parent.mkdir(parents=True)
    script.write_text("import sys; open(sys.argv[-1], 'w').write('{\"rows\": []}')")
    assert engines.run_engine("sglang", []) == {"rows": []}
    script.write_text("raise SystemExit('no such model')")
    assert engines.run_engine("sglang", [])["skipped"].endswith("status 1: no such model")
    script.write_text("raise SystemExit('correctness gate failed: latents')")
    with pytest.raises(harness.GateError, match="engine sglang"):
        engines.run_engine("sglang", [])


def test_the_command_line_measures(tmp_path: Path):
    assert run.main(["--tiny", "--suites", "growth", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "result.json").read_text())["setting"] == "tiny"
    unknown = subprocess.run(
        [sys.executable, "-m", "benchmarks.run", "--suites", "nothing"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert unknown.returncode == 2
    assert "--suites must be of op, " in unknown.stderr
    assert "got nothing" in unknown.stderr
