"""The CUDA source on the CPU: every thread of every launch, against the reference."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import cuda_emulation
import cuda_mutations
import pytest

FOLDER = Path(__file__).parent


def build_or_skip(kind: str, folder: Path) -> Path:
    if reason := cuda_emulation.why_not(kind):
        pytest.skip(reason)
    library = folder / f"{kind}.so"
    cuda_emulation.build(library, kind)
    return library


def run_cases(library: Path, *options: str, preload: str = "") -> int:
    """Calls that were made and right, in a process of its own."""
    search = [str(cuda_emulation.ROOT), str(FOLDER), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, search))}
    if preload:
        # Python keeps what it allocated until it ends.
        environment |= {"LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(
        [sys.executable, str(FOLDER / "cuda_emulation_cases.py"), str(library), *options],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    calls = dict(re.findall(r"^(.+): (\d+) calls$", done.stdout, re.MULTILINE))
    assert calls.keys() == {"frames", "mask", "in place"}
    return sum(map(int, calls.values()))


def test_random_calls_equal_the_reference_to_the_bit(tmp_path):
    assert run_cases(build_or_skip("plain", tmp_path), "--count", "2000") > 2000


def test_sanitizers_find_nothing(tmp_path):
    library = build_or_skip("sanitized", tmp_path)
    preload = cuda_emulation.sanitizer_runtime()
    assert run_cases(library, "--first", "10000", "--count", "500", preload=preload) == 500


def test_each_byte_is_its_tensor_s_and_written_once(tmp_path):
    library = build_or_skip("traced", tmp_path)
    assert run_cases(library, "--first", "20000", "--count", "300", "--traced") == 300


@pytest.mark.parametrize("name", cuda_mutations.MUTATIONS)
def test_planted_faults_are_caught(name, tmp_path):
    if reason := cuda_emulation.why_not("plain"):
        pytest.skip(reason)
    assert cuda_mutations.survivors([name], tmp_path) == {}
