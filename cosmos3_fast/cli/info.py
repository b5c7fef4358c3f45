"""`python -m cosmos3_fast info`: what this install is, and what serves each op."""

from __future__ import annotations

import argparse
import platform
from importlib import metadata
from typing import Any

import torch

import cosmos3_fast.ops  # noqa: F401 - registers the backends
from cosmos3_fast.engines.releases import TESTED, outlook
from cosmos3_fast.ops import registry


def add_info(commands: Any) -> None:
    """Register the command with argparse's subparsers."""
    parser = commands.add_parser("info", help="list every op and backend as available or not")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    print(format_info())
    return 0


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def info() -> dict[str, Any]:
    """Facts about this install; never raises.

    Returns a dict with the versions found (`package`, `python`, `torch`, `torch_cuda`, `triton`),
    `build` (see `registry.build_info`), `library_error`, `default` (backend per op and device), and
    `ops`: for each (op, device, backend), None if available or the error as text.
    """
    no_gpu = None if torch.cuda.is_available() else "torch sees no CUDA device"

    def error(op: str, device: str, backend: str) -> str | None:
        without_gpu = no_gpu if device == "cuda" else None
        return registry.backend_error(backend, device, op) or without_gpu

    return {
        "package": _version("cosmos3-fast"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "triton": _version("triton"),
        "build": registry.build_info(),
        "library_error": registry.LIBRARY_ERROR,
        "default": {
            (op, device): registry.default_backend(device, op)
            for op in registry.OPS
            for device in registry.DEVICES
        },
        "ops": {
            (op, device, backend): error(op, device, backend)
            for op in registry.OPS
            for device in registry.DEVICES
            for backend in registry.BACKENDS
        },
    }


def format_info() -> str:
    """`info()` as text: versions found, versions built for, one line per op, device, backend."""
    facts = info()
    lines = [
        f"cosmos3_fast {facts['package'] or '(not installed: run from its source)'}",
        f"found:   Python {facts['python']}, torch {facts['torch']} "
        f"(CUDA {facts['torch_cuda'] or 'none'}), Triton {facts['triton'] or 'none'}",
    ]
    if build := facts["build"]:
        cuda = f"CUDA {build['cuda'] or 'none'}"
        if build["cuda"]:
            cuda += f" for sm_{build['cuda_architectures']}"
        lines += [
            f"built:   torch {build['torch']}, loads on torch >= {build['torch_abi_target']}, "
            f"{build['compiler']}, {cuda}",
            f"flags:   {build['cxx_flags']}",
        ]
        if build["nvcc_flags"]:
            lines.append(f"nvcc:    {build['nvcc_flags']}")
    lines += [f"library: {facts['library_error'] or 'loaded'}", ""]
    width = max(len(op) for op in registry.OPS) + len("cosmos3::")
    for (op, device, backend), error in facts["ops"].items():
        serves = ", serves" if backend == facts["default"][op, device] else ""
        state = f"not available: {error}" if error else f"available{serves}"
        lines.append(f"{'cosmos3::' + op:<{width}}  {device:<4}  {backend:<6}  {state}")
    engines = {engine: text for engine in TESTED if (text := outlook(engine))}
    lines += ["", *(f"{engine}: {text}" for engine, text in engines.items())] if engines else []
    return "\n".join(lines)
