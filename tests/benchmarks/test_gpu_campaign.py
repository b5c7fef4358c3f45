"""The GPU campaign without a GPU: its dry run and its bookkeeping."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import report
from benchmarks.gpu import campaign, checks, clips
from benchmarks.gpu.cases import BF16
from benchmarks.gpu.device import Context, kernel_kind
from benchmarks.gpu.pytest_lines import MOST
from benchmarks.harness import ROOT
from cosmos3_fast import ops
from cosmos3_fast.ops.transform_frames import FrameArguments


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from numbers(each)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


@pytest.mark.slow
@pytest.mark.parametrize("command", campaign.BUDGETS)
def test_the_dry_run_runs_or_names_every_step_and_holds_no_number(
    command: str, tmp_path_factory: pytest.TempPathFactory
):
    folder = tmp_path_factory.mktemp("campaign")
    cache = folder.parent / "campaign_cache"
    out = folder / "out.json"
    options = ["--dry-run", "--budget", "3600", "--cache", str(cache), "--out", str(out)]
    assert campaign.main([command, *options]) == 0
    written = json.loads(out.read_text())
    assert "nothing here is a figure about a GPU" in written["note"]
    known = campaign.commands()[command]
    assert [*written["steps"]] == [*known]
    for name, outcome in written["steps"].items():
        wanted = "skipped" if known[name].gpu_only else "done"
        assert outcome["status"] == wanted, outcome
    assert not list(numbers(written["steps"]))


def test_a_failed_step_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "out.json"
    files = []

    def run(name: str, *_: Any) -> dict[str, Any]:
        files.append(json.loads(out.read_text())["steps"] if out.exists() else {})
        if name == "ceilings":
            return {"status": "failed", "reason": "no luck", "result": {"copy": "half"}}
        return {"status": "done", "result": {}}

    monkeypatch.setattr(campaign, "run_step_in_child", run)
    assert campaign.main(["claims", "--dry-run", "--out", str(out)]) == 1
    steps = json.loads(out.read_text())["steps"]
    known = campaign.commands()["claims"]
    done = {name for name, step in steps.items() if step["status"] == "done"}
    assert done == {name for name in known if not known[name].gpu_only and name != "ceilings"}
    assert steps["ceilings"]["result"] == {"copy": "half"}
    assert [len(file) for file in files] == sorted({len(file) for file in files})
    # What time leaves out, and what is unknown, is named.
    assert campaign.main(["claims", "--dry-run", "--budget", "0", "--out", str(out)]) == 0
    reasons = {step["reason"] for step in json.loads(out.read_text())["steps"].values()}
    assert reasons == {"the command's 0 s were over", "dry run: needs a CUDA device"}
    assert campaign.main(["claims", "--dry-run", "--steps", "stage,no_such"]) == 2


def test_a_step_over_its_limit_is_stopped(tmp_path: Path):
    options = argparse.Namespace(command="claims", dry_run=True, cache=tmp_path, built=False)
    outcome = campaign.run_step_in_child("environment", 0.01, tmp_path, options, {})
    assert outcome["status"] == "failed"
    assert "time limit" in outcome["reason"]


def test_tests_that_ran_are_known_though_the_run_was_ended(tmp_path: Path):
    """Each outcome is in the file before the next test begins."""
    lines, test = tmp_path / "lines.jsonl", tmp_path / "test_some.py"
    test.write_text(
        "import os\n"
        "def test_passes(): pass\n"
        "def test_fails(): assert False, 'told so'\n"
        "def test_ends_the_run(): os._exit(9)\n"
        "def test_never_runs(): pass\n"
    )
    (tmp_path / "test_broken.py").write_text("import no_such_package\n")
    command = [sys.executable, "-m", "pytest", "-q", str(tmp_path), "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors", "-p", "benchmarks.gpu.pytest_lines"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), checks.LINES: str(lines)}
    done = subprocess.run(command, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 9
    told = checks._outcomes(lines)
    assert told["passed"] == 1
    (failed,) = told["failed"]
    assert "told so" in failed
    (missing,) = told["not_collected_for_want_of_a_package"]
    assert "test_broken" in missing


def test_of_many_cases_some_are_run_the_same_in_every_process(tmp_path: Path):
    (tmp_path / "test_many.py").write_text(
        "import pytest\n"
        "pytestmark = pytest.mark.gpu\n"
        "@pytest.mark.parametrize('n', range(64))\n"
        "def test_many(n): pass\n"
        "def test_one(): pass\n"
        "@pytest.mark.parametrize('n', range(3))\n"
        "def test_few(n): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", str(tmp_path), "-m", "gpu"]
    command += ["-p", "no:cacheprovider", "-p", "benchmarks.gpu.pytest_lines"]
    told = []
    for _ in range(2):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), MOST: "5", checks.LINES: "unused"}
        done = subprocess.check_output(command, env=environment, cwd=tmp_path, text=True)
        told.append([line for line in done.splitlines() if "::" in line])
    assert told[0] == told[1]
    assert [sum(test in line for line in told[0]) for test in ("many[", "one", "few[")] == [5, 1, 3]


def test_a_clip_s_errors_are_held_to_the_vae_s_own():
    exact = torch.randn(1, 3, 4, 8, 8, dtype=torch.float64, generator=torch.manual_seed(0))
    off = exact.clone()
    off[:, :, 2] += 0.1
    told = clips.errors(off, exact)
    assert told["frames"] == pytest.approx([0, 0, 0.1 / exact.std().item(), 0])
    assert told["between neighbours"] == pytest.approx([0, *[0.1 / exact.std().item()] * 2])
    own = clips.errors(exact + 0.06, exact)
    assert clips.above(told, told) == clips.above(own, own) == []
    assert clips.above(told, own) == ["frames 2", "between neighbours 1", "between neighbours 2"]
    off[0, 0, 0, 0, 0] = float("nan")
    assert {"clip", "frames 0"} <= set(clips.above(clips.errors(off, exact), own))


def test_kernels_are_told_apart():
    """Names as a profile has them."""
    ours = "void cosmos3::(anonymous namespace)::"
    named = {
        f"{ours}transform_kernel<...>(...)": "transform_frames",
        f"{ours}transform_elements_kernel<...>(...)": "transform_frames",
        f"{ours}unpack_kernel<...>(...)": "other kernels of this package",
        "sm90_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc_tilesize": "convolutions",
        "void cudnn::engines_precompiled::nchwToNhwcKernel<...>": "copies, fills, layouts",
        "Memcpy DtoD (Device -> Device)": "copies, fills, layouts",
        "fmha_cutlassF_bf16_aligned_64x128_rf_sm80": "attention",
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add>": "sums",
        "void at::native::vectorized_elementwise_kernel<4, at::native::clamp>": "others",
    }
    assert {name: kernel_kind(name) for name in named} == named


def test_a_decoder_that_fails_is_left_out_but_for_ours():
    def fails(_: Any) -> Any:
        raise RuntimeError("no luck")

    found = {clips.OURS: lambda z: z, clips.FASTVAE: fails}
    pixels, missing = clips.try_others(found, torch.zeros(1))
    assert list(pixels) == list(found) == [clips.OURS]
    assert "no luck" in missing[clips.FASTVAE]["skipped"]
    with pytest.raises(RuntimeError, match="no luck"):
        clips.try_others({clips.OURS: fails}, torch.zeros(1))


def test_figures_of_clips_are_told_after_each_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With a clock of its own in place of CUDA's events."""
    ticks = iter(range(1, 100))
    monkeypatch.setattr(
        clips, "cuda_clock", lambda flush: lambda run, repeats: lambda: float(next(ticks))
    )
    context = Context(dry_run=False, scratch=tmp_path, cache=tmp_path, earlier={})
    calls = {name: lambda: torch.zeros(1) for name in "ab"}
    rounds = list(clips.in_rounds(context, calls, 3))
    # a takes 1, 4 and 5 seconds, b 2, 3 and 6: the order turns round.
    assert [each["a"]["median_us"] / 1e6 for each in rounds] == [1, 2.5, 4]
    assert [each["b"]["median_us"] / 1e6 for each in rounds] == [2, 2.5, 3]


@pytest.mark.parametrize("to", [0, 1, 4])
def test_the_bytes_of_a_recorded_call_are_those_of_its_tensors(to: int):
    """The reference: what the tensors that are read and written hold."""
    products = [torch.zeros(2, 3, 4, 5, dtype=torch.float16) for _ in range(6)]
    residual, past = torch.zeros(7, 1, 3, 4, 5, dtype=BF16), torch.zeros(2, 1, 3, 4, 5, dtype=BF16)
    options = {"to": to, "residual": residual, "past": past if to else None, "sum_dtype": BF16}
    options["frames_dtype"] = BF16
    results = ops.transform_frames(products, 7, **options)
    tensors = [*products, residual, *results, *([past] if to else [])]
    assert clips.bytes_of(FrameArguments(products, 7, **options)) == sum(x.nbytes for x in tensors)


def test_what_a_run_tells_of_clips_is_drawn_up():
    told = {
        "clips_decode_480x832": {
            "memory": {"ClipDecoder": {"allocated": 2**30, "reserved": 2**31}},
            "ratios": {"ClipDecoder": 1.0},
        },
        "transforms": {
            "6 of [...]": {
                "calls of a decode": 4,
                "bytes_per_s": 2.0,
                "share_of_copy_bandwidth": 0.5,
                "call": {"median_us": 12.0},
            },
            "seconds of a decode, so far": 0.1,
        },
        "numerics": {
            "ClipDecoder": {"frames": [0.1, 0.3], "between neighbours": [0.2]},
            "above the VAE's own": [],
        },
    }
    run = {"steps": {name: {"status": "done", "result": each} for name, each in told.items()}}
    memory, transforms, numerics = (rows for _, rows in report.clip_tables(run))
    assert memory == [["clips decode 480×832: ClipDecoder", "1.00", "1.00", "2.00"]]
    assert transforms == [["6 of [...]", "4", "12.0 µs", "50 %"]]
    assert numerics == [["ClipDecoder", "3.00e-01", "2.00e-01"]]
