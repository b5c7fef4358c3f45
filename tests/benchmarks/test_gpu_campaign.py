"""The GPU campaign without a GPU: its dry run, its bookkeeping, and the program it sanitizes."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sanitizer_ops
import torch

from benchmarks.gpu import campaign
from benchmarks.gpu.timing import NOT_MEASURED, Context, Skipped, Step
from benchmarks.harness import ROOT, GateError
from cosmos3_fast import ops
from cosmos3_fast.ops import registry

GPU_STEPS = {
    "build",
    "gpu_tests",
    "sanitizer_memcheck",
    "sanitizer_racecheck",
    "sanitizer_initcheck",
    "graphs",
    "streams",
}
CPU_STEPS = {
    "environment",
    "ceilings",
    "op_480x832x81",
    "op_720x1280x189",
    "encoder_480x832",
    "encoder_720x1280",
    "stage",
    "numerics",
}


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("campaign") / "dry_run.json"
    command = [sys.executable, "-m", "benchmarks.gpu.campaign", "--dry-run"]
    done = subprocess.run(
        [*command, "--budget", "3600", "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    return json.loads(out.read_text())


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for each in value.values():
            yield from leaves(each)
    elif isinstance(value, list):
        for each in value:
            yield from leaves(each)
    else:
        yield value


def test_the_dry_run_says_what_it_is(dry_run: dict[str, Any]):
    assert dry_run["dry_run"] is True
    assert "nothing here is a figure about a GPU" in dry_run["note"]


def test_the_dry_run_runs_or_names_every_step(dry_run: dict[str, Any]):
    steps = dry_run["steps"]
    assert set(steps) == GPU_STEPS | CPU_STEPS
    for name in GPU_STEPS:
        outcome = {"status": "skipped", "reason": "dry run: needs a CUDA device"}
        assert steps[name] == outcome
    for name in CPU_STEPS:
        assert steps[name]["status"] == "done", steps[name]
    order = list(steps)
    assert order.index("ceilings") < min(
        order.index(name) for name in CPU_STEPS - {"environment", "ceilings"}
    )


def test_the_dry_run_holds_no_number(dry_run: dict[str, Any]):
    assert not [
        leaf
        for leaf in leaves(dry_run["steps"])
        if isinstance(leaf, int | float) and not isinstance(leaf, bool)
    ]
    assert dry_run["steps"]["environment"]["result"]["device"] is None
    assert list(leaves(dry_run["steps"]["ceilings"]["result"])) == [NOT_MEASURED] * 3


def test_the_dry_run_takes_every_path(dry_run: dict[str, Any]):
    def result(step: str) -> dict[str, Any]:
        return dry_run["steps"][step]["result"]

    variants = {"cpp", "triton", "eager formula", "clone and one-frame copy", "Inductor"}
    assert variants <= set(result("op_720x1280x189"))
    folded = {"folded, eager norms", "folded, fused kernels", "folded, fused kernels, CUDA graph"}
    for step in ("encoder_480x832", "encoder_720x1280", "numerics"):
        assert folded <= set(result(step))
        assert "dry run" in result(step)["folded, fused kernels, CUDA graph"]["skipped"]
    assert {"warm, resident", "parts", "weights", "warm, offloaded"} <= set(result("stage"))
    assert {"cold, graph", "cold, fast"} <= set(result("stage"))


def test_without_a_device_only_a_dry_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert campaign.main(["--out", str(tmp_path / "out.json")]) == 2
    assert "--dry-run" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_steps_that_time_left_out_are_named(tmp_path: Path):
    out = tmp_path / "out.json"
    assert campaign.main(["--dry-run", "--budget", "0", "--out", str(out)]) == 0
    steps = json.loads(out.read_text())["steps"]
    assert {steps[name]["reason"] for name in CPU_STEPS} == {"the campaign's 0 s were over"}


def test_an_unknown_step_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--dry-run", "--steps", "stage,no_such", "--out", str(tmp_path / "out.json")]
    assert campaign.main(options) == 2
    assert "no such step: no_such" in capsys.readouterr().err


def test_a_step_over_its_limit_is_stopped(tmp_path: Path):
    options = argparse.Namespace(dry_run=True)
    outcome = campaign.run_step_in_child("environment", 0.01, tmp_path, options, {})
    assert outcome["status"] == "failed"
    assert "time limit" in outcome["reason"]


def test_a_failed_step_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "out.json"
    files = []

    def run(name: str, *_: Any) -> dict[str, Any]:
        files.append(json.loads(out.read_text())["steps"] if out.exists() else {})
        if name == "ceilings":
            return {"status": "failed", "reason": "no luck", "result": {"copy": "half"}}
        return {"status": "done", "result": {}}

    monkeypatch.setattr(campaign, "run_step_in_child", run)
    assert campaign.main(["--dry-run", "--out", str(out)]) == 1
    steps = json.loads(out.read_text())["steps"]
    assert {name for name, step in steps.items() if step["status"] == "done"} == (
        CPU_STEPS - {"ceilings"}
    )
    assert steps["ceilings"]["result"] == {"copy": "half"}
    assert [len(file) for file in files] == sorted({len(file) for file in files})


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (Skipped("no wheels"), "skipped", "no wheels"),
        (GateError("off by one"), "failed", "GateError: correctness gate failed: off by one"),
        (RuntimeError("CUDA error"), "failed", "RuntimeError: CUDA error"),
        (None, "done", None),
    ],
)
def test_a_step_keeps_what_it_had(
    error: BaseException | None,
    status: str,
    reason: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    def run(context: Context) -> Iterator[dict[str, Any]]:
        yield {"first": {"a": 1.5}}
        yield {"first": {"b": [2, True]}}
        if error is not None:
            raise error

    monkeypatch.setattr(campaign, "all_steps", lambda: {"mine": Step(run, 1)})
    for dry, number in ((False, (1.5, 2)), (True, (NOT_MEASURED, NOT_MEASURED))):
        file = tmp_path / f"{dry}.json"
        campaign.run_step("mine", file, dry, {})
        outcome = json.loads(file.read_text())
        assert outcome["status"] == status
        assert outcome.get("reason") == reason
        assert outcome["result"] == {"first": {"a": number[0], "b": [number[1], True]}}


def test_wheels_serve_what_is_not_installed(tmp_path: Path):
    for name, content in (
        ("absent_package", {"absent_package/__init__.py": "", "absent_package-1.data/x.py": ""}),
        ("torch", {"torch/__init__.py": "raise ImportError"}),
    ):
        with zipfile.ZipFile(tmp_path / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
            for path, text in content.items():
                wheel.writestr(path, text)
    target = tmp_path / "unpacked"
    assert campaign.unpack_wheels(tmp_path, target) == ["absent_package"]
    assert (target / "absent_package" / "__init__.py").exists()
    assert not (target / "torch").exists()


def test_the_sanitized_program_runs_every_op_that_has_gpu_code():
    # The other backends' values are the business of the op tests.
    made = sanitizer_ops.check("cpu", ("triton" if registry.LIBRARY_ERROR else "cpp",))
    served = {name for name in registry.OPS if (name, "triton") in registry._python_kernels}
    assert {name.split()[0] for name in made} == served


def test_the_sanitized_program_compares(monkeypatch: pytest.MonkeyPatch):
    right = ops.pack_pixels
    monkeypatch.setattr(ops, "pack_pixels", lambda *args, **kw: right(*args, **kw) + 0.25)
    with pytest.raises(AssertionError, match="pack_pixels"):
        sanitizer_ops.check("cpu")
