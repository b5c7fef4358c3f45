"""A plugin of pytest: each outcome as a line of JSON, as soon as it is known.

What was reported stays where the run is ended from outside. Asked to, it leaves of each test only
some of its cases, drawn with the test's name as seed: the same in every process and every run.
"""

from __future__ import annotations

import json
import os
import random
from typing import Any

LINES = "COSMOS3_FAST_TEST_LINES"  # names the file
MOST = "COSMOS3_FAST_TEST_CASES"  # how many cases of a test are left, at most


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    if not (most := int(os.environ.get(MOST, "0"))):
        return
    cases: dict[str, list[Any]] = {}
    for item in items:
        cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for name, each in cases.items():
        gpu = [item for item in each if item.get_closest_marker("gpu")]
        each[:] = random.Random(name).sample(gpu, min(most, len(gpu)))
    kept = {id(item) for each in cases.values() for item in each}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = [item for item in items if id(item) in kept]


def _write(test: str, outcome: str, reason: str) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:  # the process that distributes the tests writes
        return
    with open(os.environ[LINES], "a") as lines:
        lines.write(json.dumps({"test": test, "outcome": outcome, "reason": reason}) + "\n")


def pytest_runtest_logreport(report: Any) -> None:
    # A test that passes has three reports; what ends it early has one of another outcome.
    if report.when == "call" or report.outcome != "passed":
        reason = "" if report.outcome == "passed" else str(report.longrepr)[-300:]
        _write(report.nodeid, report.outcome, reason)


def pytest_collectreport(report: Any) -> None:
    if report.outcome != "passed":
        _write(report.nodeid, report.outcome, str(report.longrepr)[-300:])
