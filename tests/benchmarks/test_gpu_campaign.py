"""The GPU campaign without a GPU: its dry run, its bookkeeping, and the program it sanitizes."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sanitizer_ops
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.gpu import campaign, cases, checks, timing
from benchmarks.gpu.timing import NOT_MEASURED, Context, Skipped, Step
from benchmarks.harness import ROOT, GateError
from cosmos3_fast import ops
from cosmos3_fast.ops import registry

GPU_STEPS = {
    "checks": ["build", "gpu_tests", "graphs", "streams"],
    "figures": ["build", "encoder_480x832_compiled"],
    "decoding": ["build"],
    "sanitizers": ["build", "sanitizer_memcheck", "sanitizer_racecheck", "sanitizer_initcheck"],
}
FIGURES = [
    "ceilings",
    "op_480x832x81",
    "op_720x1280x189",
    "encoder_480x832_untuned",
    "encoder_720x1280_untuned",
    "encoder_480x832",
    "encoder_720x1280",
    "encoder_480x832_compiled",
    "numerics",
    "stage",
    "cold",
]
DECODING = [
    "ceilings",
    "decoder_480x832",
    "decoder_720x1280",
    "decoder_1024x1024",
    "encoder_480x832_clips",
    "encoder_720x1280_clips",
    "clips",
    "attention",
    "every_plan",
    "seam",
]
COMMANDS = {
    "checks": ["environment", *GPU_STEPS["checks"]],
    "figures": ["environment", "build", *FIGURES],
    "decoding": ["environment", "build", *DECODING],
    "sanitizers": ["environment", *GPU_STEPS["sanitizers"]],
}


@pytest.fixture(scope="module")
def dry_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What each command wrote."""
    folder, cache = tmp_path_factory.mktemp("campaign"), tmp_path_factory.mktemp("cache")
    for command in COMMANDS:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "benchmarks.gpu.campaign", command, "--dry-run"),
                *("--budget", "3600", "--cache", str(cache)),
                *("--out", str(folder / f"{command}.json")),
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert {path.name for path in folder.iterdir()} == {f"{name}.json" for name in COMMANDS}
    assert {path.name for path in cache.iterdir()} <= {"encoder_16.pt", "decoder_16.pt"}
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in COMMANDS}


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for each in value.values():
            yield from leaves(each)
    elif isinstance(value, list):
        for each in value:
            yield from leaves(each)
    else:
        yield value


@pytest.mark.parametrize("command", COMMANDS)
def test_the_dry_run_says_what_it_is(command: str, dry_runs: dict[str, dict[str, Any]]):
    assert dry_runs[command]["command"] == command
    assert dry_runs[command]["dry_run"] is True
    assert "nothing here is a figure about a GPU" in dry_runs[command]["note"]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_dry_run_runs_or_names_every_step(command: str, dry_runs: dict[str, dict[str, Any]]):
    steps = dry_runs[command]["steps"]
    assert [*steps] == COMMANDS[command]
    for name, outcome in steps.items():
        if name in GPU_STEPS[command]:
            wanted = {"status": "skipped", "reason": "dry run: needs a CUDA device"}
            assert outcome == wanted
        else:
            assert outcome["status"] == "done", outcome


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_ends_within_nine_minutes(command: str):
    steps = campaign.commands()[command]
    assert [*steps] == COMMANDS[command]
    # The build is done before the figures and the sanitizers begin: `checks` comes first.
    built = 0 if command == "checks" else steps["build"].limit_s
    assert sum(step.limit_s for step in steps.values()) - built <= 540


@pytest.mark.parametrize("command", COMMANDS)
def test_the_dry_run_holds_no_number(command: str, dry_runs: dict[str, dict[str, Any]]):
    steps = dry_runs[command]["steps"]
    assert not [
        leaf
        for leaf in leaves(steps)
        if isinstance(leaf, int | float) and not isinstance(leaf, bool)
    ]
    assert steps["environment"]["result"]["device"] is None
    if command in ("figures", "decoding"):
        assert list(leaves(steps["ceilings"]["result"])) == [NOT_MEASURED] * 3


def test_the_dry_run_takes_every_path(dry_runs: dict[str, dict[str, Any]]):
    def result(step: str) -> dict[str, Any]:
        return dry_runs["figures"]["steps"][step]["result"]

    variants = {"cpp", "triton", "eager formula", "clone and one-frame copy", "Inductor"}
    assert variants <= set(result("op_720x1280x189"))
    folded = {"folded, unfused", "folded, fused kernels"}
    for step in ("encoder_480x832_untuned", "encoder_480x832", "encoder_720x1280", "numerics"):
        assert folded <= set(result(step))
    for step in ("encoder_480x832", "encoder_720x1280"):
        assert "dry run" in result(step)["folded, fused kernels, CUDA graph"]["skipped"]
        alone = result(step)["convolutions alone"]["each"]
        # Each resolution has its own; stride 2 ends three of four, and 1x1 changes the width.
        assert {name.split()[0] for name in alone} == {"3x3", "1x1"}
        assert len(alone) > 8
    assert {"warm, resident", "parts", "weights", "warm, offloaded"} <= set(result("stage"))
    assert set(result("cold")) == {"graph", "fast", "engine"}

    decoding = dry_runs["decoding"]["steps"]
    for step in ("decoder_480x832", "decoder_720x1280", "decoder_1024x1024"):
        paths = {"last taps, plain", "folded, fused kernels"}
        assert paths <= set(decoding[step]["result"])
    assert {f"ClipEncoder, {frames} frames" for frames in (5, 9)} <= set(
        decoding["clips"]["result"]
    )
    for shape in decoding["attention"]["result"].values():
        assert {"torch's choice", "layers.attend"} <= set(shape)


def test_without_a_device_only_a_dry_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert campaign.main(["checks", "--out", str(tmp_path / "out.json")]) == 2
    assert "--dry-run" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_steps_that_time_left_out_are_named(tmp_path: Path):
    out = tmp_path / "out.json"
    assert campaign.main(["figures", "--dry-run", "--budget", "0", "--out", str(out)]) == 0
    steps = json.loads(out.read_text())["steps"]
    reasons = {steps[name]["reason"] for name in FIGURES}
    assert reasons == {"the command's 0 s were over", "dry run: needs a CUDA device"}


def test_an_unknown_step_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--dry-run", "--steps", "stage,no_such", "--out", str(tmp_path / "out.json")]
    assert campaign.main(["figures", *options]) == 2
    assert "no such step: no_such" in capsys.readouterr().err


def test_a_step_over_its_limit_is_stopped(tmp_path: Path):
    options = argparse.Namespace(command="checks", dry_run=True, cache=tmp_path)
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
    assert campaign.main(["figures", "--dry-run", "--out", str(out)]) == 1
    steps = json.loads(out.read_text())["steps"]
    done = [name for name, step in steps.items() if step["status"] == "done"]
    assert done == [n for n in ("environment", *FIGURES[1:]) if n not in GPU_STEPS["figures"]]
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
    error: BaseException | None, status: str, reason: str | None, tmp_path: Path
):
    def run(context: Context) -> Iterator[dict[str, Any]]:
        yield {"first": {"a": 1.5}}
        yield {"first": {"b": [2, True]}}
        if error is not None:
            raise error

    for dry, number in ((False, (1.5, 2)), (True, (NOT_MEASURED, NOT_MEASURED))):
        file = tmp_path / f"{dry}.json"
        campaign.run_step(Step(run, 1), file, dry, tmp_path, {})
        outcome = json.loads(file.read_text())
        assert outcome["status"] == status
        assert outcome.get("reason") == reason
        assert outcome["result"] == {"first": {"a": number[0], "b": [number[1], True]}}


def test_tests_that_ran_are_known_though_the_run_was_ended(tmp_path: Path):
    """Each outcome is in the file before the next test begins."""
    lines, test = tmp_path / "lines.jsonl", tmp_path / "test_some.py"
    test.write_text(
        "import os, pytest\n"
        "def test_passes(): pass\n"
        "@pytest.mark.skip(reason='not here')\n"
        "def test_skips(): pass\n"
        "def test_fails(): assert False, 'told so'\n"
        "def test_ends_the_run(): os._exit(9)\n"
        "def test_never_runs(): pass\n"
    )
    (tmp_path / "test_broken.py").write_text("import no_such_package\n")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", str(tmp_path), "-p", "no:cacheprovider"),
            *("--continue-on-collection-errors", "-p", "benchmarks.gpu.pytest_lines"),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT), checks.LINES: str(lines)},
        cwd=tmp_path,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 9
    told = checks._outcomes(lines)
    assert told["passed"] == 1
    assert [each.split("::")[1].split(":")[0] for each in told["skipped"]] == ["test_skips"]
    (failed,) = told["failed"]
    assert "test_fails" in failed
    assert "told so" in failed
    (missing,) = told["not_collected_for_want_of_a_package"]
    assert "test_broken" in missing


@pytest.mark.parametrize("out_dtype", [None, torch.float32])
def test_the_operations_of_a_product_are_counted(out_dtype: torch.dtype | None):
    with FakeTensorMode():
        a, b = (torch.empty(2, *size, dtype=torch.bfloat16, device="cuda") for size in SHAPES)
        given = {} if out_dtype is None else {"out_dtype": out_dtype}
        _, operations = timing.count_flops(lambda: torch.bmm(a, b, **given))
    assert operations == 2 * 2 * 3 * 5 * 7


SHAPES = ((3, 5), (5, 7))


def test_the_weights_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    context = Context(True, tmp_path, tmp_path / "cache", {})
    first = cases.make_encoder(context)
    monkeypatch.setattr(cases, "synthetic_state_dict", lambda *_: pytest.fail("made again"))
    again = cases.make_encoder(context, dtype=torch.float64)
    assert torch.equal(first.conv_in.weight.double(), again.conv_in.weight)
    assert [path.name for path in context.cache.iterdir()] == ["encoder_16.pt"]


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
    if not registry.LIBRARY_ERROR:
        for source in (ROOT / "csrc" / "cuda").glob("*.cu"):
            served |= set(re.findall(r'm\.impl\("(\w+)', source.read_text()))
    assert {name.split()[0] for name in made} == served


def test_the_sanitized_program_compares(monkeypatch: pytest.MonkeyPatch):
    right = ops.pack_pixels
    monkeypatch.setattr(ops, "pack_pixels", lambda *args, **kw: right(*args, **kw) + 0.25)
    with pytest.raises(AssertionError, match="pack_pixels"):
        sanitizer_ops.check("cpu")
