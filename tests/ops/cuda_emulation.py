"""Builds `csrc/cuda/*.cu` for the CPU: each kernel is a loop over its threads (cuda_emulation.h).

A build registers the ops under `NAMESPACE` for CPU tensors, host functions and checks included.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import cosmos3_fast  # noqa: F401  (defines the schemas)

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "csrc" / "cuda"
SOURCE = FOLDER / "prepare_latents.cu"
RESIZE_SOURCE = FOLDER / "resize_crop.cu"
NAMESPACE = "cosmos3_emulated"
OPS = ("prepare_latents", "prepare_latents.mask", "prepare_latents_", "resize_crop")
TORCH = Path(torch.__file__).parent
FLAGS = {
    "plain": ["-O1"],
    "quick": ["-O0"],  # to build, not to run
    "sanitized": [
        "-O1", "-g", "-shared-libasan", "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
    ],
    # At -O2 so that what a thread keeps to itself lies in registers, as on a device.
    "traced": [
        "-O2", "-DCOSMOS3_TRACED", "-fsanitize-coverage=func,trace-pc,trace-loads,trace-stores",
    ],
}  # fmt: skip
ACCESS = np.dtype(
    [("address", "u8"), ("size", "u4"), ("store", "u4"), ("thread", "u4"), ("launch", "u4")]
)


@cache
def cuda_headers() -> Path | None:
    """The folder of cuda_runtime.h. nvcc on PATH may be a wrapper, so nvcc itself is asked."""
    homes = [os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")]
    if nvcc := shutil.which("nvcc"):
        command = [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull]
        text = subprocess.run(command, capture_output=True, text=True, check=False).stderr
        homes += re.findall(r"^#\$ TOP=(.+)$", text, re.MULTILINE)
    folders = [Path(home.strip()).resolve() / "include" for home in homes if home]
    return next((folder for folder in folders if (folder / "cuda_runtime.h").exists()), None)


def compiler(kind: str) -> str | None:
    """Sanitizers and traces are clang's; the plain build takes any compiler."""
    names = ("g++", "clang++") if kind in ("plain", "quick") else ("clang++",)
    return next(filter(None, map(shutil.which, names)), None)


def sanitizer_runtime() -> str | None:
    """What a process preloads to load the sanitized build; its C++ library has to come along."""
    clang = compiler("sanitized")
    if clang is None:
        return None
    names = ("libclang_rt.asan-x86_64.so", "libstdc++.so.6")
    found = [
        subprocess.run(
            [clang, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in names
    ]
    return ":".join(found) if all(map(os.path.isabs, found)) else None


def why_not(kind: str) -> str | None:
    """The reason why this machine cannot build `kind`, or None."""
    if cuda_headers() is None:
        return "no CUDA toolkit: cuda_runtime.h was not found"
    if compiler(kind) is None:
        return "no clang++" if kind in ("sanitized", "traced") else "no g++ or clang++"
    if kind == "sanitized" and sanitizer_runtime() is None:
        return "clang has no AddressSanitizer runtime (libclang-rt)"
    return None


def build(library: Path, kind: str, source: Path = SOURCE) -> None:
    """Compiles `source` to `library`; its headers are those of csrc/cuda.

    Raises:
        RuntimeError: it does not compile; with what the compiler said.
    """
    chosen = compiler(kind)
    assert chosen is not None
    includes = (FOLDER, ROOT / "csrc", ROOT / "tests" / "ops", TORCH / "include")
    command = [
        chosen, "-x", "c++", "-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden",
        "-ffp-contract=off", "-DTORCH_TARGET_VERSION=0x020A000000000000", "-DTORCH_STABLE_ONLY",
        "-DCOSMOS3_EMULATED", *FLAGS[kind], *(f"-I{folder}" for folder in includes),
        "-isystem", cuda_headers(), source, "-o", library, "-x", "none", f"-L{TORCH / 'lib'}",
        "-ltorch_cpu", "-ltorch",
    ]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{source} does not compile for the CPU:\n{done.stderr}")


class Emulation:
    """A build, loaded: the ops of the source that it was built of."""

    def __init__(self, library: Path) -> None:
        self._schemas = torch.library.Library(NAMESPACE, "DEF")
        for op in OPS:
            name, _, overload = op.partition(".")
            schema = getattr(getattr(torch.ops.cosmos3, name), overload or "default")._schema
            self._schemas.define(str(schema).removeprefix("cosmos3::"))
        torch.ops.load_library(str(library))
        ops = getattr(torch.ops, NAMESPACE)
        self.prepare_latents = ops.prepare_latents.default
        self.prepare_latents_mask = ops.prepare_latents.mask
        self.prepare_latents_ = ops.prepare_latents_.default
        self.resize_crop = ops.resize_crop.default
        self._library = ctypes.CDLL(str(library))
        self._library.emulation_accesses.restype = ctypes.c_size_t

    def seed(self, seed: int) -> None:
        """Of the order in which the threads run."""
        self._library.emulation_seed(seed & 0xFFFFFFFF)

    def launches(self) -> int:
        return self._library.emulation_launches()

    def accesses(self) -> np.ndarray[Any, np.dtype[np.void]]:
        """What a traced build recorded since the last call."""
        begin = ctypes.c_void_p()
        count = self._library.emulation_accesses(ctypes.byref(begin))
        if count == 0:
            return np.empty(0, ACCESS)
        return np.frombuffer(ctypes.string_at(begin.value, count * ACCESS.itemsize), ACCESS)
