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

from benchmarks.gpu import campaign, checks
from benchmarks.harness import ROOT


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from numbers(each)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


@pytest.mark.slow
@pytest.mark.parametrize("command", campaign.COMMANDS)
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
    assert campaign.main(["figures", "--dry-run", "--out", str(out)]) == 1
    steps = json.loads(out.read_text())["steps"]
    known = campaign.commands()["figures"]
    done = {name for name, step in steps.items() if step["status"] == "done"}
    assert done == {name for name in known if not known[name].gpu_only and name != "ceilings"}
    assert steps["ceilings"]["result"] == {"copy": "half"}
    assert [len(file) for file in files] == sorted({len(file) for file in files})
    # What time leaves out, and what is unknown, is named.
    assert campaign.main(["figures", "--dry-run", "--budget", "0", "--out", str(out)]) == 0
    reasons = {step["reason"] for step in json.loads(out.read_text())["steps"].values()}
    assert reasons == {"the command's 0 s were over", "dry run: needs a CUDA device"}
    assert campaign.main(["figures", "--dry-run", "--steps", "stage,no_such"]) == 2


def test_a_step_over_its_limit_is_stopped(tmp_path: Path):
    options = argparse.Namespace(command="checks", dry_run=True, cache=tmp_path)
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
