"""The CUDA source on the CPU: every thread of every launch, against the reference."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import cuda_emulation
import pytest

FOLDER = Path(__file__).parent


@pytest.fixture(params=cuda_emulation.OPS)
def source(request: pytest.FixtureRequest) -> str:
    return request.param


def build_or_skip(source: str, kind: str, folder: Path) -> Path:
    if reason := cuda_emulation.why_not(kind):
        pytest.skip(reason)
    library = folder / f"{kind}.so"
    cuda_emulation.build(library, kind, cuda_emulation.source_of(source))
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


def calls_made(source: str, library: Path, *options: str, preload: str = "") -> int:
    """Calls of the source's ops or forms; each was right."""
    text = run_script("cuda_emulation_run.py", source, str(library), *options, preload=preload)
    calls = re.findall(r"^.+: (\d+) calls$", text, re.MULTILINE)
    assert len(calls) == len(cuda_emulation.OPS[source])
    return sum(map(int, calls))


def test_every_cuda_source_is_emulated():
    assert {path.stem for path in cuda_emulation.FOLDER.glob("*.cu")} == {*cuda_emulation.OPS}


def test_random_calls_equal_the_reference(source: str, tmp_path: Path):
    library = build_or_skip(source, "plain", tmp_path)
    count = {"prepare_latents": 3000, "resize_crop": 200, "transform_frames": 400}.get(source, 1500)
    assert calls_made(source, library, "--count", str(count)) > count


@pytest.mark.slow
def test_sanitizers_find_nothing(source: str, tmp_path: Path):
    library = build_or_skip(source, "sanitized", tmp_path)
    preload = cuda_emulation.sanitizer_runtime()
    count = {"resize_crop": 30, "transform_frames": 150}.get(source, 500)
    options = ("--first", "10000", "--count", str(count))
    assert calls_made(source, library, *options, preload=preload) >= count


# What the two passes of a resize leave for each other lies in memory of the op's own.
@pytest.mark.parametrize("source", [op for op in cuda_emulation.OPS if op != "resize_crop"])
def test_each_load_and_store_is_its_tensor_s_and_each_byte_is_written_once(
    source: str, tmp_path: Path
):
    library = build_or_skip(source, "traced", tmp_path)
    assert calls_made(source, library, "--first", "20000", "--count", "250", "--traced") == 250


@pytest.mark.slow
def test_planted_faults_are_caught():
    """A third of them; `python tests/ops/cuda_mutations.py` builds and runs all, in minutes."""
    if reason := cuda_emulation.why_not("quick") or cuda_emulation.why_not("traced"):
        pytest.skip(reason)
    text = run_script("cuda_mutations.py", "--every", "3")
    caught, planted = re.findall(r"^(\d+) of (\d+) caught$", text, re.MULTILINE)[0]
    assert caught == planted
    assert int(planted) >= 12
