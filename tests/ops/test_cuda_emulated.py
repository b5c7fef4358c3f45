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


def build_or_skip(kind: str, folder: Path, source: Path = cuda_emulation.SOURCE) -> Path:
    if reason := cuda_emulation.why_not(kind):
        pytest.skip(reason)
    library = folder / f"{kind}.so"
    cuda_emulation.build(library, kind, source)
    return library


def run_script(name: str, *arguments: str, preload: str = "") -> str:
    """What it printed, in a process of its own."""
    search = [str(cuda_emulation.ROOT), str(FOLDER), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, search))}
    if preload:
        # Python keeps what it allocated until it ends.
        environment |= {"LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(
        [sys.executable, str(FOLDER / name), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


def calls_made(library: Path, *options: str, preload: str = "") -> int:
    """Calls of the three forms; each was right."""
    text = run_script("cuda_emulation_cases.py", str(library), *options, preload=preload)
    calls = dict(re.findall(r"^(.+): (\d+) calls$", text, re.MULTILINE))
    assert calls.keys() == {"frames", "mask", "in place"}
    return sum(map(int, calls.values()))


def test_every_cuda_source_is_emulated():
    emulated = {cuda_emulation.SOURCE, cuda_emulation.RESIZE_SOURCE}
    assert {*cuda_emulation.FOLDER.glob("*.cu")} == emulated


def test_random_calls_equal_the_reference_to_the_bit(tmp_path):
    library = build_or_skip("plain", tmp_path)
    assert calls_made(library, "--count", "3000") > 3000


def test_sanitizers_find_nothing(tmp_path):
    library = build_or_skip("sanitized", tmp_path)
    preload = cuda_emulation.sanitizer_runtime()
    options = ("--first", "10000", "--count", "500")
    assert calls_made(library, *options, preload=preload) > 500


def test_each_load_and_store_is_its_tensor_s_and_each_byte_is_written_once(tmp_path):
    library = build_or_skip("traced", tmp_path)
    assert calls_made(library, "--first", "20000", "--count", "250", "--traced") == 250


def test_planted_faults_are_caught():
    """A third of them; `python tests/ops/cuda_mutations.py` builds and runs all, in a minute."""
    if reason := cuda_emulation.why_not("quick"):
        pytest.skip(reason)
    names = list(cuda_mutations.MUTATIONS)[::3]
    if cuda_emulation.why_not("traced") is None:
        names += list(cuda_mutations.SILENT_MUTATIONS)[::3]
    assert f"{len(names)} of {len(names)} caught" in run_script("cuda_mutations.py", *names)


@pytest.mark.parametrize(("kind", "count"), [("plain", 200), ("sanitized", 30)])
def test_resizes_equal_pillow_to_the_bit(kind, count, tmp_path):
    library = build_or_skip(kind, tmp_path, cuda_emulation.RESIZE_SOURCE)
    preload = cuda_emulation.sanitizer_runtime() if kind == "sanitized" else ""
    text = run_script("cuda_resize_cases.py", str(library), "--count", str(count), preload=preload)
    assert re.search(r"^\d{3,} calls equal Pillow", text)


def test_planted_faults_of_a_resize_are_caught(tmp_path):
    """A third of them; without --step all, in half a minute."""
    if reason := cuda_emulation.why_not("plain"):
        pytest.skip(reason)
    text = run_script("cuda_resize_cases.py", "--mutations", str(tmp_path), "--step", "3")
    assert len(text.splitlines()) == 3
