"""A plugin of pytest: each outcome as a line of JSON, as soon as it is known.

What was reported stays where the run is ended from outside.
"""

from __future__ import annotations

import json
import os
from typing import Any

LINES = "COSMOS3_FAST_TEST_LINES"  # names the file


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
