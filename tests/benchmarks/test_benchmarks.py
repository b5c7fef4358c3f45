"""The benchmarks gate, take turns and report; the committed tables are those of the files."""

from __future__ import annotations

import csv
import json
import statistics
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("matplotlib")
pytest.importorskip("diffusers")

from benchmarks import cases, demo, goals, harness, report, run
from benchmarks.cases import OURS
from benchmarks.suites import SUITES, engines
from benchmarks.suites import op as op_suite
from cosmos3_fast.ops._torch import has_hooks_of_all_modules

RESULTS = sorted(path.parent.name for path in report.RESULTS.glob("*/result.json"))


@pytest.mark.parametrize("name", RESULTS)
def test_a_committed_result_is_whole_and_its_tables_are_its_own(name: str):
    result = report.committed(name)
    rows = {
        (row["suite"], row["case"], row["dtype"], row["baseline"], row["path"]): row
        for row in result["rows"]
    }
    for key, row in rows.items():
        assert row["median"] == statistics.median(row["seconds"])
        baseline = rows[(*key[:4], row["baseline"])]
        assert row["speedup"] == pytest.approx(baseline["median"] / row["median"])
    assert result["goals"] == goals.judge(result)
    assert result["setting"] == "full"
    assert "dirty" not in result["commit"]
    assert (report.RESULTS / name / "result.md").read_text() == report.markdown(result) + "\n"


@pytest.mark.parametrize("name", report.SECTIONS)
def test_the_documents_show_the_committed_results(name: str):
    text = (harness.ROOT / name).read_text()
    assert report.updated(text, report.SECTIONS[name]) == text


def test_the_committed_gpu_tables_are_those_of_the_files():
    runs = report.gpu_runs()
    assert len(runs) >= 2
    assert (report.RESULTS / "gpu" / "README.md").read_text() == report.gpu_markdown(runs)
    for each in runs:
        assert each["notes"]
        for command in each["commands"].values():
            assert command["dry_run"] is False
            assert "NVIDIA" in command["machine"]
        for step, spent in report.kernel_kinds(each).items():
            total = report.result_of(each, step)["kernels"]["device_us"]
            assert sum(spent.values()) == pytest.approx(total)
            assert min(spent.values()) >= 0


@pytest.mark.slow
def test_every_suite_runs_behind_its_gate(tmp_path: Path):
    # The engines' scripts need environments of their own.
    wanted = [name for name in SUITES if name != "engines"]
    if find_spec("pyarrow") is None:
        wanted = [name for name in wanted if not name.startswith("bulk")]
    result = run.run("tiny", wanted)
    shown = {row["suite"] for row in result["rows"]}
    assert shown | result.keys() >= {*wanted}
    for suite in shown:
        paths = {row["path"] for row in result["rows"] if row["suite"] == suite}
        assert OURS in paths
        assert len(paths) > 1
    for row in result["rows"]:
        assert row["median"] > 0
        if row["path"] == OURS and row["suite"] not in ("op", "bulk", "pixels"):
            assert 0 < row["error"] < 1e-2
    run.write(result, tmp_path)
    assert json.loads((tmp_path / "result.json").read_text()) == result
    with (tmp_path / "result.csv").open() as file:
        written = [(row["path"], float(row["median"])) for row in csv.DictReader(file)]
    assert written == [(row["path"], row["median"]) for row in result["rows"]]
    assert {plot.stem for plot in tmp_path.glob("*.png")} == shown


@pytest.mark.parametrize("suite", ["op", "growth"])
def test_a_wrong_path_ends_the_run_with_nothing_written(
    suite: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    if suite == "op":
        prepare = op_suite.prepare_latents_formula
        monkeypatch.setattr(torch, "compile", lambda run, **_: lambda *a: (prepare(*a)[0] + 1, 0))
    else:
        encode = cases.FrameEncoder.from_vae

        def wrong(vae: Any) -> Any:
            encoder = encode(vae)
            encoder.conv_out.bias += 1e-3
            return encoder

        monkeypatch.setattr(cases.FrameEncoder, "from_vae", wrong)
    with pytest.raises(harness.GateError, match=rf"correctness gate failed: {suite} \d+x"):
        run.main(["--tiny", "--suites", suite, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_the_demo_makes_latents_and_compares(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for name, value in {"HEIGHT": 32, "WIDTH": 48, "NUM_FRAMES": 5, "DECODED": "64x96"}.items():
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setattr(demo, "CLIP", "32x48")
    monkeypatch.setattr(demo, "CLIP_WIDTH", 16)
    narrow = {**cases.COSMOS3_VAE_CONFIG, "base_dim": 16, "decoder_base_dim": 16}
    monkeypatch.setattr(cases, "COSMOS3_VAE_CONFIG", narrow)
    assert demo.main(["--out", str(tmp_path), "--rounds", "1"]) == 0
    shown = capsys.readouterr().out
    assert "Two latent frames to 5 frames of a clip" in shown
    assert "vae.decode of 5 frames" in shown
    assert {path.name for path in tmp_path.iterdir()} == {"latents.safetensors", "preview.png"}


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
        paths = {"vae": lambda: half - 0.25, "ours": lambda wrong=wrong: wrong}
        with pytest.raises(harness.GateError, match="here, ours"):
            harness.gate_paths("here", paths, "vae", "plain", right)


def test_paths_take_turns():
    order: list[str] = []
    calls = {name: lambda n=name: order.append(n) for name in "ab"}
    timings = harness.measure(calls, rounds=4, warmup=1)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab" + "ba"
    assert all(
        len(t.seconds) == 4 and t.quantile(0) <= t.median <= t.quantile(1) for t in timings.values()
    )
    order.clear()
    harness.measure(calls, rounds=2, warmup=0, repeats=2)
    assert "".join(order) == "aaabbb" + "bbbaaa"
    with pytest.raises(ValueError, match="repeats"):
        harness.measure({}, rounds=1, repeats=0)


def test_a_clock_is_asked_when_all_calls_of_a_round_are_enqueued():
    log: list[str] = []

    def clock(call: Any, repeats: int) -> Any:
        call()
        return lambda: log.append("wait") or 2.0 * len(log)

    calls = {name: lambda n=name: log.append(n) for name in "ab"}
    timings = harness.measure(calls, rounds=1, warmup=0, clock=clock)
    assert log == ["a", "b", "wait", "wait"]
    assert [timing.seconds for timing in timings.values()] == [(6.0,), (8.0,)]
    assert harness.Timing((3.0, 1.0, 2.0)).median == 2.0
    assert harness.Timing((3.0, 1.0, 2.0)).quantile(0.25) == 1.5


def test_operations_are_counted_without_hooks() -> None:
    """With one on all modules an accelerated VAE runs its own code, and a gate compares nothing."""
    layer, x = torch.nn.Linear(3, 5), torch.zeros(2, 3)
    seen, operations = harness.count_flops(lambda: (layer(x), has_hooks_of_all_modules())[1])
    assert not seen
    assert operations == 2 * 2 * 3 * 5


@pytest.mark.parametrize("out_dtype", [None, torch.float32])
def test_the_operations_of_a_product_are_counted(out_dtype: torch.dtype | None):
    with FakeTensorMode():
        shapes = ((2, 3, 5), (2, 5, 7))
        a, b = (torch.empty(size, dtype=torch.bfloat16, device="cuda") for size in shapes)
        given = {} if out_dtype is None else {"out_dtype": out_dtype}
        _, operations = harness.count_flops(lambda: torch.bmm(a, b, **given))
    assert operations == 2 * 2 * 3 * 5 * 7


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
