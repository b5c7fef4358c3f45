"""The tables and the plot of the committed GPU results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.gpu import report


@pytest.fixture(scope="module")
def runs() -> list[report.Run]:
    return [report.read(folder) for folder in sorted(report.RESULTS.iterdir()) if folder.is_dir()]


def test_the_committed_tables_are_those_of_the_files(runs: list[report.Run]):
    assert len(runs) >= 2
    assert (report.RESULTS / "README.md").read_text() == report.report(runs)


def test_every_file_says_what_it_was_measured_on(runs: list[report.Run]):
    for run in runs:
        assert run["notes"]
        for command in run["commands"].values():
            assert command["dry_run"] is False
            assert command["commit"]
            assert "NVIDIA" in command["machine"]
        environment = report.result_of(run, "environment")
        assert environment["nvidia_smi"]
        assert environment["packages"]["torch"]


def test_kinds_are_all_of_the_kernels(runs: list[report.Run]):
    for run in runs:
        for step, spent in report.kinds(run).items():
            total = report.result_of(run, step)["kernels"]["device_us"]
            assert sum(spent.values()) == pytest.approx(total)
            assert min(spent.values()) >= 0
            assert max(spent, key=lambda kind: spent[kind]) == "convolutions"


def test_a_run_with_one_command_and_a_failed_step(tmp_path: Path):
    environment = {
        "device": "NVIDIA Example",
        "nvidia_smi": "name, driver\nNVIDIA Example, 1.2",
        "cudnn": 9,
        "packages": {"triton": "3"},
    }
    stage = {"warm": {"fast": {"median_us": 1500.0, "p10_us": 1000.0, "p90_us": 2000.0}}}
    steps = {
        "environment": {"status": "done", "result": environment},
        "ceilings": {
            "status": "done",
            "result": {"copy_bytes_per_s": 3e12, "conv_flops_per_s": 7e14},
        },
        "encoder_480x832": {"status": "failed", "result": {}, "reason": "no luck"},
        "stage": {"status": "done", "result": stage},
    }
    content = {"machine": "a machine", "commit": "abc", "started": "2026-01-02", "steps": steps}
    (tmp_path / "figures.json").write_text(json.dumps(content))
    text = report.report([report.read(tmp_path)])
    assert "## NVIDIA Example, commit abc" in text
    assert "3.00 TB/s" in text
    assert "| stage, warm: fast" in text
    assert "1.50 ms | 1.00 ms to 2.00 ms" in text
    assert "encoder" not in text
    report.draw([report.read(tmp_path)], tmp_path / "empty.png")
    assert not (tmp_path / "empty.png").exists()
