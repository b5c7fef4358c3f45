"""Steps of the GPU campaign that must pass before a figure counts: build, tests, memory checks."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib import metadata, util
from pathlib import Path

import torch

from benchmarks.gpu.cases import SIZES, frame, make_encoder, tolerance
from benchmarks.gpu.device import Context, Result, Skipped, Step
from benchmarks.gpu.pytest_lines import LINES, MOST
from benchmarks.harness import ROOT, gate_equal
from cosmos3_fast import ops
from cosmos3_fast.vae.verify import relative_error

TAIL = 4000


def _run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )


def _output(*command: str) -> str | None:
    try:
        done = _run(list(command))
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def source_digest() -> str:
    """SHA-256 over the package's sources, for trees that came without their history."""
    digest = hashlib.sha256()
    for folder in ("csrc", "cosmos3_fast", "benchmarks", "tests"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".cu", ".h"):
                digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def environment(context: Context) -> Iterator[Result]:
    versions: dict[str, str | None] = {}
    for name in ("torch", "triton", "numpy", "diffusers", "pillow", "safetensors", "pytest"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    nvcc = _output("nvcc", "--version")
    yield {
        "sources_sha256": source_digest(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": versions,
        "torch_cuda": torch.version.cuda,
        "nvcc": nvcc.splitlines()[-1] if nvcc else None,
        "compute_sanitizer": shutil.which("compute-sanitizer") is not None,
        "device": None,
    }
    if context.dry_run:
        return
    properties = torch.cuda.get_device_properties(0)
    query = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
    yield {
        "device": properties.name,
        "device_count": torch.cuda.device_count(),
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cudnn": torch.backends.cudnn.version(),
        "nvidia_smi": _output("nvidia-smi", f"--query-gpu={query}", "--format=csv"),
    }


def build(context: Context) -> Iterator[Result]:
    """For this device's architecture alone, half a minute; or a call of what is there."""
    if context.built:
        image = torch.zeros(1, 2, 2, 3, dtype=torch.uint8, device=context.device)
        ops.pack_pixels(image, 2, torch.bfloat16, backend="cpp")
        torch.cuda.synchronize()
        yield {"info": _output(sys.executable, "-m", "cosmos3_fast", "info")}
        return
    major, minor = torch.cuda.get_device_capability()
    start = time.perf_counter()
    done = _run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        COSMOS3_FAST_BUILD="require",
        COSMOS3_FAST_CUDA="1",
        COSMOS3_FAST_CUDA_ARCHS=f"{major}{minor}",
    )
    spills = [line.strip() for line in done.stdout.splitlines() if "bytes spill stores" in line]
    yield {
        "seconds": time.perf_counter() - start,
        "architecture": f"sm_{major}{minor}",
        "spills": sorted({line for line in spills if " 0 bytes spill stores" not in line}),
    }
    if done.returncode:
        raise RuntimeError(f"the build failed:\n{done.stdout[-TAIL:]}")
    # This process imported the package before there was a library.
    yield {"info": _output(sys.executable, "-m", "cosmos3_fast", "info")}


def _outcomes(lines: Path) -> Result:
    """What pytest has reported so far (`pytest_lines`)."""
    reported = (
        [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    )
    told: dict[str, list[str]] = {"passed": [], "skipped": [], "failed": []}
    for each in reported:
        reason = each["reason"]
        told[each["outcome"]].append(each["test"] + (f": {reason}" if reason else ""))
    missing = [test for test in told["failed"] if "ModuleNotFoundError" in test]
    return {
        "passed": len(told["passed"]),
        "skipped": told["skipped"],
        "not_collected_for_want_of_a_package": missing,
        "failed": [test for test in told["failed"] if test not in missing],
    }


# What matters most, about 350 tests: what failed or never ran on a GPU, and what clips go through.
SELECTED = (
    "tests/ops/test_transform_frames.py",
    "tests/ops/test_rms_norm_silu.py",
    "tests/ops/test_pack_pixels.py",
    "tests/ops/test_unpack_pixels.py",
    "tests/ops/test_resize_crop.py",
    "tests/ops/test_every_op.py",
    "tests/ops/test_direct_calls.py",
    "tests/ops/test_triton_compiles.py",
    "tests/vae/networks/test_encoder_module.py",
    "tests/vae/networks/test_layers.py",
)


def gpu_tests(
    context: Context, selected: Sequence[str] = ("tests",), most: int = 0
) -> Iterator[Result]:
    """The tests that ask for a GPU. What has run is known at any time, also when time is over.

    Args:
        selected: files and folders; a dry run collects them.
        most: cases of one test, drawn from all it has; 0: all.
    """
    lines, log = context.scratch / "gpu_tests.jsonl", context.scratch / "gpu_tests.log"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", *selected]
    command += ["--ignore=tests/engines", "--continue-on-collection-errors"]
    command += ["-p", "no:cacheprovider", "-p", "benchmarks.gpu.pytest_lines"]
    environment = {LINES: str(lines), MOST: str(most)}
    if context.dry_run:
        collected = _run([*command, "--collect-only"], **environment)
        yield {"collected": collected.stdout.splitlines()[-1:]}
        if collected.returncode:
            raise RuntimeError(f"the tests could not be collected:\n{collected.stdout[-TAIL:]}")
        return
    if util.find_spec("xdist"):  # most of the time is Triton's compiler's
        command += ["-n", str(len(os.sched_getaffinity(0)))]
    with log.open("w") as output:
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(5)
            done = _outcomes(lines)
            yield {"finished": child.returncode is not None, **done}
            if child.returncode is not None:
                break
    if done["failed"] or not done["passed"]:
        raise RuntimeError(
            f"{len(done['failed'])} GPU tests failed, {done['passed']} passed:\n"
            f"{log.read_text()[-TAIL:]}"
        )


RACECHECK = (
    "racecheck sees shared memory only: races in global memory are looked for in the emulation "
    "(tests/ops/test_cuda_emulated.py), where every load and store is recorded."
)


def sanitizer(tool: str, limit_s: float, *only: str) -> Step:
    """A tool of compute-sanitizer over all ops, or `only` some; a dry run makes the calls."""

    def run(context: Context) -> Iterator[Result]:
        command = [sys.executable, str(ROOT / "tests/ops/sanitizer_ops.py")]
        command += ["--only", *only] if only else []
        if context.dry_run:
            command += ["--device", "cpu"]
        elif shutil.which("compute-sanitizer") is None:
            raise Skipped("compute-sanitizer is not on PATH")
        else:
            watch = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "86"]
            command = [*watch, "--print-limit", "20", *command]
        start = time.perf_counter()
        done = _run(
            command,
            PYTORCH_NO_CUDA_MEMORY_CACHING="1",
            PYTHONPATH=f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        )
        summary = [line for line in done.stdout.splitlines() if "SUMMARY" in line]
        calls = [line for line in done.stdout.splitlines() if "equal the reference" in line]
        yield {"seconds": time.perf_counter() - start, "summary": summary, "calls": calls}
        if tool == "racecheck":
            yield {"limits": RACECHECK}
        if done.returncode or not (summary or context.dry_run):
            raise RuntimeError(f"{tool}, exit status {done.returncode}:\n{done.stdout[-TAIL:]}")

    return Step(run, limit_s)


def graphs(context: Context) -> Iterator[Result]:
    """Encoder and op in one graph at full size; the tests capture each alone."""
    size, encoder = SIZES[0], make_encoder(context)
    pixels, (_, noise) = frame(context, size, 0), size.latents(context, 0)
    ops.prepare_latents(encoder(pixels), noise)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        latents, _ = ops.prepare_latents(encoder(pixels), noise)
    pixels.copy_(frame(context, size, 9))
    graph.replay()
    gate_equal("noise in a graph", latents[:, :, 1:], noise[:, :, 1:])
    error = relative_error(latents[:, :, :1], encoder(pixels))
    yield {"encoder_and_op_error": error}
    if not error <= tolerance(torch.bfloat16):
        raise RuntimeError(f"encoder and op in a graph: error {error:.2g}")


def streams(context: Context) -> Iterator[Result]:
    """Encodes at full size over several streams; the tests have the op on one beside."""
    side = [torch.cuda.Stream() for _ in range(3)]
    encoder = make_encoder(context)
    frames = [frame(context, SIZES[0], seed) for seed in range(9)]
    alone = [encoder(each) for each in frames]
    torch.cuda.synchronize()
    got = []
    for i, each in enumerate(frames):
        with torch.cuda.stream(side[i % 3]):
            torch.cuda._sleep(5_000_000 * (i % 3))
            got.append(encoder(each * 1.0))
    torch.cuda.synchronize()
    for i, latents in enumerate(got):
        gate_equal(f"frame {i} on stream {i % 3}", latents, alone[i])
    yield {"encoder": f"{len(frames)} encodes over {len(side)} streams equal those on one"}


SELECTED_TESTS = Step(functools.partial(gpu_tests, selected=SELECTED, most=12), 90)
STEPS = {
    "gpu_tests": Step(gpu_tests, 240),
    "graphs": Step(graphs, 50, gpu_only=True),
    "streams": Step(streams, 50, gpu_only=True),
}
TOOLS = ("memcheck", "racecheck", "initcheck")
NEW_KERNELS = ("transform_frames", "pack_pixels", "unpack_pixels")
# What each command needs: the machine's name, and the library built for it.
FIRST = {"environment": Step(environment, 30), "build": Step(build, 200, gpu_only=True)}
