"""The package in each state a user can have it in: compiled, pure Python, broken, bare."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cosmos3_fast
from cosmos3_fast.ops import registry

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PACKAGE = Path(cosmos3_fast.__file__).parent


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def copy_package(folder: Path, *, library: bool) -> None:
    ignore = shutil.ignore_patterns("__pycache__", *([] if library else ["*.so", "_not_built.txt"]))
    shutil.copytree(PACKAGE, folder / "cosmos3_fast", ignore=ignore)


def test_python_has_the_schemas_of_the_library():
    sources = "".join(path.read_text() for path in (ROOT / "csrc" / "cpu").glob("*.cpp"))
    definitions = re.findall(r"m\.def\(([^;]*)\);", sources)
    compiled = ["".join(re.findall(r'"([^"]*)"', d)) for d in definitions]
    assert sorted(compiled) == sorted(registry.SCHEMAS)


def test_the_registered_schemas_are_those():
    for schema in registry.SCHEMAS:
        name, _, overload = schema.split("(", maxsplit=1)[0].partition(".")
        registered = getattr(getattr(torch.ops.cosmos3, name), overload or "default")._schema
        assert str(registered) == f"cosmos3::{schema}"


def test_an_install_without_library_passes_the_op_tests(tmp_path: Path):
    copy_package(tmp_path, library=False)
    (tmp_path / "cosmos3_fast" / "_not_built.txt").write_text("no compiler, as this test says\n")
    shutil.copytree(
        ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    names = ("errors", "prepare_latents", "prepare_latents_compile", "prepare_latents_gradients")
    tests = run(
        sys.executable, "-m", "pytest", "-q", "-k", "not triton and not 2_to_the_31",
        *(f"tests/ops/test_{name}.py" for name in names), cwd=tmp_path,
    )  # fmt: skip
    assert tests.returncode == 0, tests.stdout[-3000:]
    assert " passed" in tests.stdout
    where = run(
        sys.executable, "-c", "import cosmos3_fast; print(cosmos3_fast.__file__)", cwd=tmp_path
    )
    assert str(tmp_path) in where.stdout, "the tests must have run on the copy"
    info = run(sys.executable, "-m", "cosmos3_fast", "info", cwd=tmp_path)
    assert info.returncode == 0, info.stderr
    assert "no compiler, as this test says" in info.stdout
    assert re.search(r"cosmos3::prepare_latents +cpu +eager +available, serves", info.stdout)


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("readelf"), reason="no readelf")
def test_the_standard_library_is_torch_s():
    """Of its own, which some compilers link unasked, the first error thrown would end the process
    (seen with a g++ that adds -static-libstdc++)."""
    if not registry.build_info():
        pytest.skip("this install has no library")
    library = next(Path(registry.__file__).parents[1].glob("_C*.so"))
    read = run("readelf", "--wide", "--dynamic", "--dyn-syms", library, cwd=library.parent)
    assert read.returncode == 0, read.stderr
    assert "[libstdc++.so.6]" in read.stdout
    throws = [line.split() for line in read.stdout.splitlines() if "__cxa_throw" in line]
    assert throws
    assert all("UND" in line for line in throws), "the library has a copy of its own"


def test_a_library_that_does_not_load_is_reported_and_replaced(tmp_path: Path):
    if not registry.build_info():
        pytest.skip("this install has no library")
    copy_package(tmp_path, library=True)
    library = next((tmp_path / "cosmos3_fast").glob("_C*.so"))
    library.write_bytes(b"not an ELF file " * 100)
    info = run(sys.executable, "-m", "cosmos3_fast", "info", cwd=tmp_path)
    assert info.returncode == 0, info.stderr
    assert f"{library.name} does not load: " in info.stdout
    assert f"built with torch {registry.build_info()['torch']}" in info.stdout
    script = """
import torch, cosmos3_fast.ops as ops
noise, cond = torch.randn(1, 2, 3, 4, 4), torch.randn(1, 2, 1, 4, 4)
assert torch.equal(ops.prepare_latents(cond, noise)[0][:, :, :1], cond)
try:
    ops.prepare_latents(cond, noise, backend="cpp")
except ops.BackendUnavailableError as error:
    print(error)
"""
    named = run(sys.executable, "-c", script, cwd=tmp_path)
    assert named.returncode == 0, named.stderr
    assert "backend 'cpp' cannot run prepare_latents on cpu: " in named.stdout
    assert f"found torch {torch.__version__}" in named.stdout


BLOCK_IMPORTS = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is not here, as this test says")
sys.meta_path.insert(0, Block())
"""


def test_import_needs_only_torch(tmp_path: Path):
    copy_package(tmp_path, library=True)
    blocked = {"triton", "diffusers", "sglang", "vllm", "vllm_omni", "PIL", "safetensors",
               "numpy", "huggingface_hub", "transformers"}  # fmt: skip
    script = (
        f"BLOCKED = {blocked!r}\n{BLOCK_IMPORTS}\n"
        "import torch, cosmos3_fast\n"
        "noise, cond = torch.randn(1, 2, 3, 4, 4), torch.randn(1, 2, 1, 4, 4)\n"
        "torch.ops.cosmos3.prepare_latents(cond, noise)\n"
        "cosmos3_fast.prepare_latents(cond, noise)\n"
        "import cosmos3_fast.cli.info\n"
        "print(cosmos3_fast.cli.info.format_info())\n"
    )
    result = run(sys.executable, "-c", script, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    reason = "ModuleNotFoundError: triton is not here, as this test says"
    assert f"not available: {reason}" in result.stdout


def test_import_does_not_load_optional_packages():
    script = (
        "import sys, cosmos3_fast\n"
        "print([m for m in ('triton', 'diffusers', 'sglang', 'vllm', 'PIL') if m in sys.modules])"
    )
    result = run(sys.executable, "-c", script, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def build_wheel(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs setup.py on a copy of the sources, as an installer would; into folder/out."""
    for name in ("csrc", "cosmos3_fast"):
        shutil.copytree(
            ROOT / name,
            folder / name,
            ignore=shutil.ignore_patterns("*.so", "__pycache__", "_not*"),
        )
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return run(sys.executable, "setup.py", "build", "--build-lib", "out", cwd=folder, **environment)


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"COSMOS3_FAST_BUILD": "off"}, "COSMOS3_FAST_BUILD=off"),
        ({"CXX": "no-such-compiler"}, "no C++ compiler: 'no-such-compiler' was not found"),
        ({"PYTHONPATH": "stub"}, "torch could not be imported while building"),
        ({"CXX": "false"}, "the compiler failed"),
    ],
)
def test_what_cannot_be_built_gives_a_pure_python_package(
    tmp_path: Path, environment: dict[str, str], reason: str
):
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub" / "torch.py").write_text("raise ImportError('no torch, as this test says')")
    built = build_wheel(tmp_path, COSMOS3_FAST_CUDA="0", **environment)
    assert built.returncode == 0, built.stderr
    assert reason in built.stderr
    package = tmp_path / "out" / "cosmos3_fast"
    assert not list(package.glob("*.so"))
    assert reason in (package / "_not_built.txt").read_text()
    info = run(sys.executable, "-m", "cosmos3_fast", "info", cwd=tmp_path / "out")
    assert info.returncode == 0, info.stderr
    assert reason in info.stdout


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CXX": "no-such-compiler", "COSMOS3_FAST_BUILD": "require"}, "no C\\+\\+ compiler"),
        ({"COSMOS3_FAST_BUILD": "maybe"}, "COSMOS3_FAST_BUILD must be auto, require or off"),
        ({"COSMOS3_FAST_CUDA": "yes"}, "COSMOS3_FAST_CUDA must be 0, 1 or unset"),
        (
            {"COSMOS3_FAST_CUDA": "1", "PATH": "/usr/bin:/bin", "CUDA_HOME": ""},
            "COSMOS3_FAST_CUDA=1, but nvcc is not on PATH",
        ),
    ],
)
def test_what_was_required_and_cannot_be_built_fails(
    tmp_path: Path, environment: dict[str, str], reason: str
):
    built = build_wheel(tmp_path, **environment)
    assert built.returncode != 0
    assert re.search(reason, built.stderr)


@pytest.mark.skipif(not registry.build_info(), reason="this install has no library")
def test_the_library_uses_only_the_stable_abi():
    library = next(PACKAGE.glob("_C*.so"))
    symbols = run("nm", "-D", "--undefined-only", "--demangle", library, cwd=ROOT).stdout
    assert symbols.count("aoti_torch_") > 3
    unstable = [s for s in symbols.splitlines() if re.search(r"\b(at|c10|torch)::", s)]
    assert unstable == []
    # No CUDA library is needed to load it: cudart is inside, the stream is looked up at run time.
    needed = run("readelf", "-d", library, cwd=ROOT).stdout
    assert "NEEDED" in needed
    assert not re.search(r"libcuda|libc10_cuda|libtorch_cuda|libtorch_python", needed)


@pytest.mark.skipif(not registry.build_info(), reason="this install has no library")
def test_build_info_tells_what_it_was_built_with():
    build = registry.build_info()
    assert build["version"] == cosmos3_fast.__version__
    assert build["torch"].split(".")[0].isdigit()
    assert "-DTORCH_STABLE_ONLY" in build["cxx_flags"]
    assert bool(build["cuda"]) == bool(build["cuda_architectures"]) == bool(build["nvcc_flags"])
