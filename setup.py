"""Builds the op library and the build-info module, or explains why it did not.

Environment:
    COSMOS3_FAST_BUILD  "auto" (default): build if torch and a C++ compiler are there, else install
                        the pure-Python package; "require": fail instead; "off": pure Python.
    COSMOS3_FAST_CUDA   "1": compile the CUDA kernels or fail; "0": leave them out; unset: compile
                        them if torch is a CUDA build and nvcc is found.
    COSMOS3_FAST_CUDA_ARCHS  list such as "80;90" or "8.0 9.0", default "80;90;100;120". The first
                        and the last are also compiled to PTX, for devices between and after them.
    CUDA_HOME           the CUDA toolkit, where nvcc is not enough to find it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
PACKAGE = "cosmos3_fast"
VERSION = re.findall(r'__version__ = "(.+)"', (ROOT / PACKAGE / "__init__.py").read_text())[0]
# The oldest torch that the library loads on: the stable ABI is versioned by feature.
TORCH_TARGET = "2.10"
TORCH_TARGET_MACRO = "0x020A000000000000"

CXX_FLAGS = ["-O3", "-std=c++17", "-fvisibility=hidden", "-ffp-contract=off", "-Wall"]
NVCC_FLAGS = [
    *("-O3", "-std=c++17", "-fmad=false", "-Xcompiler=-ffp-contract=off"),
    *("--threads=2", "-Xptxas=-v,--warn-on-spills"),
]
STABLE_ABI = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_MACRO}", "-DTORCH_STABLE_ONLY"]


class NotBuilt(Exception):
    """The reason why this install has no compiled library."""


def find_cuda_home() -> str | None:
    """The toolkit's root. nvcc on PATH may be a wrapper, so nvcc itself is asked."""
    if home := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return home if (Path(home) / "bin" / "nvcc").is_file() else None
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    dry_run = subprocess.run(
        [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull],
        capture_output=True,
        text=True,
        check=False,
    )
    for line in dry_run.stderr.splitlines():
        if line.startswith("#$ TOP="):
            return os.path.realpath(line.removeprefix("#$ TOP=").strip())
    return str(Path(nvcc).resolve().parent.parent)


def nvcc_version(cuda_home: str) -> str:
    output = subprocess.run(
        [os.path.join(cuda_home, "bin", "nvcc"), "--version"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return output.split("release ")[1].split(",")[0]


def wants_cuda(torch: Any, cuda_home: str | None) -> bool:
    # Never torch.cuda.is_available(): images are built on machines that have no GPU.
    request = os.environ.get("COSMOS3_FAST_CUDA")
    if request == "0":
        return False
    if request == "1":
        if cuda_home is None:
            home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
            where = f"there is no bin/nvcc in CUDA_HOME={home}" if home else "nvcc is not on PATH"
            raise SystemExit(
                f"COSMOS3_FAST_CUDA=1, but {where}: install a CUDA toolkit, or set CUDA_HOME to one"
            )
        return True
    if request is not None:
        raise SystemExit(f"COSMOS3_FAST_CUDA must be 0, 1 or unset, got {request!r}")
    return torch.version.cuda is not None and cuda_home is not None


def cuda_architectures() -> list[str]:
    """Numbers as nvcc takes them, ascending: "80" for 8.0."""
    text = os.environ.get("COSMOS3_FAST_CUDA_ARCHS", "80;90;100;120")
    parts = filter(None, re.split(r"[;,\s]+", text))
    found = [re.fullmatch(r"(\d{1,2})\.?(\d)", part) for part in parts]
    if not found or None in found:
        raise SystemExit(
            f'COSMOS3_FAST_CUDA_ARCHS must be a list such as "80;90" or "8.0;9.0", got {text!r}'
        )
    return sorted({each[1] + each[2] for each in found if each}, key=int)


def gencode_flags(architectures: list[str]) -> list[str]:
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]
    # The oldest serves what lies between two (Orin, Thor), the newest what is to come.
    as_ptx = dict.fromkeys((architectures[0], architectures[-1]))
    return [*flags, *(f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in as_ptx)]


def compiler_version() -> str:
    if not os.environ.get("CXX", "c++").strip():
        del os.environ["CXX"]  # set to nothing is not set, for torch's build too
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        raise NotBuilt(f"no C++ compiler: {compiler!r} was not found")
    line = subprocess.run(
        [*compiler.split(), "--version"], capture_output=True, text=True, check=False
    ).stdout.splitlines()
    return line[0] if line else compiler


def extensions() -> tuple[list[Extension], dict[str, Any]]:
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        if os.environ.get("COSMOS3_FAST_CUDA") == "1":
            raise SystemExit(
                f"COSMOS3_FAST_CUDA=1, but torch could not be imported while building ({error}): "
                "install with `pip install --no-build-isolation .`"
            ) from error
        raise NotBuilt(
            f"torch could not be imported while building ({error}): "
            "install with `pip install --no-build-isolation .`"
        ) from error
    try:
        import pybind11
    except ImportError as error:
        raise NotBuilt(f"pybind11 could not be imported while building ({error})") from error
    compiler = compiler_version()
    cuda_home = find_cuda_home()
    with_cuda = wants_cuda(torch, cuda_home)
    archs = cuda_architectures()

    sources = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/cpu/*.cpp"))
    compile_args = {"cxx": [*CXX_FLAGS, *STABLE_ABI], "nvcc": []}
    library_dirs, libraries = [], []
    if with_cuda:
        assert cuda_home is not None
        cpp_extension.CUDA_HOME = cuda_home
        # It refuses an nvcc of another major version than torch's CUDA. Nothing here is linked with
        # torch's CUDA: the runtime is linked statically, the ABI to torch is the stable one.
        cpp_extension._check_cuda_version = lambda *_: None
        sources += sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/cuda/*.cu"))
        compile_args["nvcc"] = [*NVCC_FLAGS, *STABLE_ABI, *gencode_flags(archs)]
        # The runtime is linked statically and the current stream is looked up when a kernel is
        # launched, so that one library loads on CPU torch and on CUDA torch.
        library_dirs = [os.path.join(cuda_home, "lib64")]
        libraries = ["cudart_static", "dl", "rt", "pthread"]
    library = cpp_extension.CppExtension(
        f"{PACKAGE}._C",
        sources,
        include_dirs=[os.path.join(cuda_home, "include")] if with_cuda and cuda_home else [],
        extra_compile_args=compile_args,
        library_dirs=library_dirs,
        libraries=libraries,
        depends=sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*.h")),
        py_limited_api=True,
    )
    # CppExtension links libtorch_python and more; the stable ABI lives in these two.
    library.libraries = [*libraries, "torch_cpu", "torch"]
    if sys.platform == "linux":
        # Before what the compiler adds: one that links its C++ library statically would leave this
        # library with a copy of its own, and the first error it throws would end the process.
        library.libraries.append(":libstdc++.so.6")

    facts = {
        "VERSION": VERSION,
        "TORCH": torch.__version__,
        "TORCH_TARGET": TORCH_TARGET,
        "COMPILER": compiler,
        "CUDA_VERSION": nvcc_version(cuda_home) if with_cuda and cuda_home else "",
        "CUDA_ARCHS": ";".join(archs) if with_cuda else "",
        "CXX_FLAGS": " ".join(compile_args["cxx"]),
        "NVCC_FLAGS": " ".join(compile_args["nvcc"]),
    }
    build_info = Extension(
        f"{PACKAGE}._build_info",
        ["csrc/bindings.cpp"],
        include_dirs=[pybind11.get_include()],
        define_macros=[(f"COSMOS3_FAST_{key}", f'"{value}"') for key, value in facts.items()],
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": []},
        language="c++",
    )

    class BuildExtension(cpp_extension.BuildExtension):
        """Turns a failed build into a pure-Python install, unless one was required."""

        def run(self) -> None:
            forget_libraries(Path(self.build_lib) / PACKAGE)
            try:
                super().run()
            except Exception as error:
                if self.inplace:
                    forget_libraries(ROOT / PACKAGE)
                if os.environ.get("COSMOS3_FAST_BUILD") == "require" or with_cuda:
                    raise
                self.extensions = []
                write_reason(Path(self.build_lib) / PACKAGE, f"the compiler failed: {error}")
                if self.inplace:
                    write_reason(ROOT / PACKAGE, f"the compiler failed: {error}")

    return [library, build_info], {"build_ext": BuildExtension}


def forget_libraries(folder: Path) -> None:
    """Removes what an earlier build left there, which must not pass for this one's."""
    for library in (*folder.glob("_C*.so"), *folder.glob("_build_info*.so")):
        library.unlink()


def write_reason(folder: Path, reason: str) -> None:
    """Leaves the reason where `python -m cosmos3_fast info` finds it."""
    print(f"cosmos3_fast: installing without compiled kernels: {reason}", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "_not_built.txt").write_text(reason + "\n")


def main() -> None:
    if int(setuptools.__version__.split(".")[0]) < 77:  # which cannot read `project.license`
        raise SystemExit(
            f"setuptools must be 77 or newer, got {setuptools.__version__}: "
            'pip install -U "setuptools>=77"'
        )
    mode = os.environ.get("COSMOS3_FAST_BUILD", "auto")
    if mode not in ("auto", "require", "off"):
        raise SystemExit(f"COSMOS3_FAST_BUILD must be auto, require or off, got {mode!r}")
    (ROOT / PACKAGE / "_not_built.txt").unlink(missing_ok=True)
    modules: list[Extension] = []
    commands: dict[str, Any] = {}
    try:
        if mode == "off":
            raise NotBuilt("COSMOS3_FAST_BUILD=off")
        modules, commands = extensions()
    except NotBuilt as reason:
        if mode == "require":
            raise SystemExit(f"COSMOS3_FAST_BUILD=require, but {reason}") from reason
        text = str(reason)

        class BuildPy(build_py):
            def run(self) -> None:
                super().run()
                editable = getattr(self, "editable_mode", False)
                folder = ROOT / PACKAGE if editable else Path(self.build_lib) / PACKAGE
                forget_libraries(folder)
                write_reason(folder, text)

        commands = {"build_py": BuildPy}
    setup(ext_modules=modules, cmdclass=commands)


main()
