"""What an install must not do: ship an old library, guess, or stop with a traceback."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from cosmos3_fast.ops import registry

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "cosmos3_fast"
HAS_NVCC = shutil.which("nvcc") is not None
NEEDS_LIBRARY = pytest.mark.skipif(not registry.build_info(), reason="this install has no library")


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("COSMOS3_FAST", "PYTHONPATH"))}
    return subprocess.run(
        [str(each) for each in command],
        cwd=cwd, env={**kept, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of what is built, without libraries."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "_not*")
    for name in ("csrc", "cosmos3_fast"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


@pytest.mark.parametrize("environment", [{"CXX": "false"}, {"COSMOS3_FAST_BUILD": "off"}])
def test_an_old_library_is_not_shipped(sources: Path, environment: dict[str, str]):
    built = sources / "out" / "cosmos3_fast"
    built.mkdir(parents=True)
    for name in ("_C.abi3.so", "_build_info.cpython-311-x86_64-linux-gnu.so"):
        (built / name).write_bytes(b"of an earlier build")
    command = (sys.executable, "setup.py", "build", "--build-lib", "out")
    result = run(*command, cwd=sources, COSMOS3_FAST_CUDA="0", **environment)
    assert result.returncode == 0, result.stderr
    assert not list(built.glob("*.so"))
    assert (built / "_not_built.txt").exists()


def test_an_old_setuptools_is_refused_by_name(sources: Path):
    code = "import setuptools, runpy; setuptools.__version__ = '65.5.1'; runpy.run_path('setup.py')"
    result = run(sys.executable, "-c", code, cwd=sources)
    assert result.returncode == 1
    assert 'got 65.5.1: pip install -U "setuptools>=77"' in result.stderr


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"COSMOS3_FAST_CUDA": "1", "PYTHONPATH": "stub"},
            "COSMOS3_FAST_CUDA=1, but torch could not be imported",
        ),
        (
            {"COSMOS3_FAST_CUDA": "1", "CUDA_HOME": "/nonexistent"},
            "COSMOS3_FAST_CUDA=1, but there is no bin/nvcc in CUDA_HOME=/nonexistent",
        ),
        (
            {"COSMOS3_FAST_CUDA_ARCHS": "8.0;hopper"},
            'must be a list such as "80;90" or "8.0;9.0", got \'8.0;hopper\'',
        ),
        ({"COSMOS3_FAST_CUDA_ARCHS": " "}, "COSMOS3_FAST_CUDA_ARCHS must be a list"),
    ],
)
def test_what_is_asked_for_and_cannot_be_had_fails_at_once(
    sources: Path, environment: dict[str, str], message: str
):
    (sources / "stub").mkdir()
    (sources / "stub" / "torch.py").write_text("raise ImportError('none here')")
    result = run(sys.executable, "setup.py", "--name", cwd=sources, **environment)
    assert result.returncode != 0
    assert message in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "environment",
    [
        {"CXX": ""},
        {"CUDA_HOME": "/nonexistent"},
        pytest.param(
            {"COSMOS3_FAST_CUDA": "1", "COSMOS3_FAST_CUDA_ARCHS": "8.0 9.0;120"},
            marks=pytest.mark.skipif(not HAS_NVCC, reason="there is no nvcc"),
        ),
    ],
)
def test_what_can_be_understood_is(sources: Path, environment: dict[str, str]):
    result = run(sys.executable, "setup.py", "--name", cwd=sources, **environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "cosmos3-fast"


@NEEDS_LIBRARY
def test_a_second_copy_in_the_process_gets_a_sentence(tmp_path: Path):
    library = shutil.copy(next(PACKAGE.glob("_C*.so")), tmp_path)
    script = (
        f"import torch; torch.ops.load_library({library!r})\n"
        "try:\n    import cosmos3_fast\nexcept ImportError as error:\n    print(error)"
    )
    result = run(sys.executable, "-c", script, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert "another copy of cosmos3_fast is loaded. Remove one of the two" in result.stdout


@NEEDS_LIBRARY
def test_the_source_distribution_compiles(tmp_path: Path):
    tracked = run("git", "ls-files", cwd=ROOT).stdout.split()
    if not tracked:
        pytest.skip("these sources are not a git checkout")
    for name in tracked:
        if (ROOT / name).is_file() and not name.startswith(("benchmarks/results", ".")):
            target = tmp_path / "tree" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)
    packed = run(
        sys.executable, "setup.py", "sdist", "--dist-dir", tmp_path,
        cwd=tmp_path / "tree", COSMOS3_FAST_BUILD="off",
    )  # fmt: skip
    assert packed.returncode == 0, packed.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    kinds = (".h", ".cu", ".cpp")
    files = {p.relative_to(unpacked).as_posix() for p in (unpacked / "csrc").rglob("*.*")}
    assert files == {n for n in tracked if n.startswith("csrc/") and n.endswith(kinds)}
    installed = run(
        sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index",
        "--target", tmp_path / "installed", unpacked,
        cwd=tmp_path, COSMOS3_FAST_BUILD="require", COSMOS3_FAST_CUDA="0",
    )  # fmt: skip
    assert installed.returncode == 0, installed.stderr
    info = run(sys.executable, "-m", "cosmos3_fast", "info", cwd=tmp_path / "installed")
    assert "library: loaded" in info.stdout
