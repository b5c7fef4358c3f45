"""The releases of each engine that the tests have run on, and what decides about another one."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import threading
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)

TRUST_VARIABLE = "COSMOS3_FAST_TRUST"

TESTED = {
    "diffusers": ("0.39.0", "0.40.0", "0.41.0", "0.42.1"),
    "sglang": ("0.5.19", "0.5.20", "0.5.21", "0.5.22", "0.5.23"),
    "vllm-omni": ("0.22.0", "0.24.0", "0.26.0", "0.28.0", "0.30.0", "0.31.0rc1", "0.32.0rc1"),
}
"""Newest last: what `make test-<engine>` and, for those that it does not install, `make
test-releases` run."""


def installed(engine: str) -> str | None:
    """The version of an installed engine; None where there is none."""
    try:
        return importlib.metadata.version(engine)
    except importlib.metadata.PackageNotFoundError:
        return None


def trusted() -> bool:
    """Whether the user has said that the installed releases are to be accelerated untested."""
    return os.environ.get(TRUST_VARIABLE, "").strip().lower() not in ("", "0", "off", "false")


class Gate:
    """Whether an engine is accelerated in this process; decided once, at the first question.

    A release that the tests have run on is; any other has to pass a self-test, unless the
    environment variable COSMOS3_FAST_TRUST is set.

    Args:
        engine: a key of `TESTED`.
    """

    def __init__(self, engine: str) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._open: bool | None = None

    def opens(self, why_not: Callable[[], str | None]) -> bool:
        """Whether to accelerate.

        Args:
            why_not: the self-test: the first difference between the engine with and without this
                package, None where there is none. What it raises is a difference too.
        """
        with self._lock:
            if self._open is None:
                self._open = self._decide(why_not)
            return self._open

    def _decide(self, why_not: Callable[[], str | None]) -> bool:
        version = installed(self._engine)
        if version in TESTED[self._engine] or trusted():
            return True
        start = time.perf_counter()
        try:
            reason = why_not()
        except Exception as error:  # whatever it is: the engine is not as it was
            reason = f"{type(error).__name__}: {error}"
        milliseconds = 1000 * (time.perf_counter() - start)
        if reason is None:
            logger.info(
                "cosmos3_fast: %s %s is not a tested release, and passed the self-test in %.0f ms",
                self._engine,
                version,
                milliseconds,
            )
            return True
        logger.warning(
            "cosmos3_fast leaves %s %s as it is: self-test: %s; tested releases: %s. To have it "
            "accelerated all the same set %s=1",
            self._engine,
            version,
            reason,
            ", ".join(TESTED[self._engine]),
            TRUST_VARIABLE,
        )
        return False


def outlook(engine: str) -> str | None:
    """What will decide about the installed release of `engine`; None where none is installed."""
    version = installed(engine)
    if version is None:
        return None
    if version in TESTED[engine]:
        return f"{version}, a tested release"
    if trusted():
        return f"{version}, not tested, accelerated because {TRUST_VARIABLE} is set"
    return f"{version}, not tested: accelerated if its self-test passes where it serves"
