"""Builds `csrc/cuda/*.cu` for the CPU: each kernel is a loop over its threads (cuda_emulation.h).

A build registers the ops under `NAMESPACE` for CPU tensors, host functions and checks included.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import cosmos3_fast  # noqa: F401  (defines the schemas)

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "csrc" / "cuda"
NAMESPACE = "cosmos3_emulated"
# Below csrc/cuda; a process loads the emulation of one.
OPS = {
    "prepare_latents": ("prepare_latents", "prepare_latents.mask", "prepare_latents_"),
    "rms_norm_silu": ("rms_norm_silu", "add_rms_norm_silu", "add_pad"),
    "resize_crop": ("resize_crop",),
    "transform_frames": ("transform_frames",),
    "pack_pixels": ("pack_pixels",),
    "unpack_pixels": ("unpack_pixels",),
}
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


def source_of(name: str) -> Path:
    return FOLDER / f"{name}.cu"


def build(library: Path, kind: str, source: Path) -> None:
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


def _overload(namespace: str, op: str) -> Any:
    name, _, overload = op.partition(".")
    return getattr(getattr(getattr(torch.ops, namespace), name), overload or "default")


class Emulation:
    """A build of the source `name`, loaded; its ops by name, as `ops["prepare_latents.mask"]`."""

    def __init__(self, library: Path, name: str) -> None:
        self._schemas = torch.library.Library(NAMESPACE, "DEF")
        for op in OPS[name]:
            schema = _overload("cosmos3", op)._schema
            self._schemas.define(str(schema).removeprefix("cosmos3::"))
        torch.ops.load_library(str(library))
        self.ops = {op: _overload(NAMESPACE, op) for op in OPS[name]}
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


def bytes_of(x: Tensor) -> np.ndarray:
    """The addresses of every byte that `x` has."""
    addresses = np.full((1,), x.data_ptr(), np.int64)
    for size, stride in zip(x.shape, x.stride(), strict=True):
        step = stride if size > 1 else 0
        addresses = (addresses[:, None] + np.arange(size) * step * x.element_size()).reshape(-1)
    addresses = np.unique(addresses)
    return (addresses[:, None] + np.arange(x.element_size())).reshape(-1)


def trace_fault(
    accesses: np.ndarray[Any, np.dtype[np.void]], read: list[Tensor], written: list[Tensor]
) -> str | None:
    """What is wrong with the loads and stores of a call: that they are of exactly the elements of
    `read` and `written`, on their boundaries, that each byte is written once, and that no thread
    reads what another one writes."""
    sizes = accesses["size"].astype(np.int64)
    if np.any(accesses["address"].astype(np.int64) % np.maximum(sizes, 1)):
        return "an access is not aligned to its size"
    index = np.repeat(np.arange(len(accesses)), sizes)
    within = np.arange(len(index)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    where = accesses["address"].astype(np.int64)[index] + within
    store = accesses["store"][index] != 0

    def union(tensors: list[Tensor]) -> np.ndarray:
        return np.unique(np.concatenate([np.empty(0, np.int64), *map(bytes_of, tensors)]))

    if not np.array_equal(np.unique(where[~store]), union(read)):
        return "it does not read exactly the elements that the result takes"
    stored = np.sort(where[store])
    if np.any(stored[1:] == stored[:-1]):
        return "a byte is written twice"
    if not np.array_equal(stored, union(written)):
        return "it does not write exactly the elements of the outputs"
    # Each byte has one store, so that a load by another thread is the only race left.
    thread = accesses["thread"][index].astype(np.int64) << 32 | accesses["launch"][index]
    order = np.argsort(where[store])
    owner = thread[store][order]
    shared = np.isin(where[~store], stored)
    position = np.searchsorted(stored, where[~store][shared])
    if np.any(owner[position] != thread[~store][shared]):
        return "a thread reads a byte that another one writes"
    return None


def refusal_fault(
    op: Callable[..., object], check: Callable[..., None], arguments: tuple[object, ...]
) -> str | None:
    """Whether the op refuses these arguments as the reference's check does, in its words."""
    messages = []
    for refuse in (op, check):
        try:
            refuse(*arguments)
            messages.append("nothing")
        except RuntimeError as error:
            messages.append(str(error).splitlines()[0])
    if messages[1] not in messages[0]:
        return f"the op says {messages[0]!r}, the check {messages[1]!r}"
    return None
