"""Each engine's own latent preparation before and after, in that engine's environment.

The scripts are `benchmarks/engines/<engine>.py`; `make test-<engine>` makes the environments. An
engine without one is named and skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from importlib import util
from pathlib import Path

from benchmarks.cases import TINY_DIM
from benchmarks.harness import ROOT, Figures, GateError, Suite, say

# What an engine's script imports.
ENGINES = {
    "diffusers": ("diffusers", "transformers"),
    "sglang": ("sglang", "cache_dit"),
    "vllm_omni": ("vllm_omni", "vllm"),
}


def engines(**options: int) -> Figures:
    """`options` are the scripts' own, with underscores."""
    given = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    return {engine: run_engine(engine, given) for engine in ENGINES}


def run_engine(engine: str, options: list[str]) -> Figures:
    """The engine's own before-and-after, or {"skipped": why}.

    Raises:
        GateError: the script's own gate failed.
    """
    python = engine_python(engine)
    if python is None:
        target = f"make test-{engine.replace('_', '-')}"
        return {"skipped": f"its environment is not there: {target} makes it"}
    say(f"engines: {engine} ...")
    # The root comes first on the path of `-m`: this tree is measured, not an installed copy.
    paths = [str(ROOT / "tests" / "support"), *filter(None, [os.environ.get("PYTHONPATH")])]
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures.json"
        ended = subprocess.run(
            [python, "-m", f"benchmarks.engines.{engine}", *options, "--json", figures],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            stdout=sys.stderr,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        sys.stderr.write(ended.stderr)
        if ended.returncode == 0:
            return json.loads(figures.read_text())
    last = (ended.stderr.strip().splitlines() or [""])[-1]
    if last.startswith("correctness gate failed"):
        raise GateError(f"engine {engine}: {last}")
    return {"skipped": f"its script ended with status {ended.returncode}: {last}"}


def engine_python(engine: str) -> str | None:
    """The interpreter of the engine's environment; or this one, if it has the engine."""
    python = ROOT / f".venv-{engine}" / "bin" / "python"
    if python.exists():
        return str(python)
    if all(util.find_spec(module) for module in ENGINES[engine]):
        return sys.executable
    return None


SUITE = Suite(
    engines,
    {
        "tiny": {"height": 32, "width": 48, "num_frames": 9, "rounds": 1, "base_dim": TINY_DIM},
        "short": {"height": 128, "width": 128, "rounds": 1},
        "full": {"height": 256, "width": 448, "rounds": 2},
    },
)
