"""Steps of the GPU campaign that measure requests: the whole stage, and the seam in an engine."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import SEED, engine_stage
from benchmarks.gpu.cases import (
    SIZES,
    Size,
    check_error,
    frame,
    make_encoder,
    reference_vae,
)
from benchmarks.gpu.device import (
    NOT_MEASURED,
    Context,
    Result,
    Skipped,
    figure,
    resident_bytes,
    time_calls,
)
from benchmarks.harness import ROOT, Call, Graphed, gate_equal, measure
from cosmos3_fast import ops
from cosmos3_fast.acceleration import accelerate, last_encoding
from cosmos3_fast.images.load import load_pixels
from cosmos3_fast.latents import LatentPreparation
from cosmos3_fast.vae.live.announce import wanted_frames

BF16 = torch.bfloat16


def _photograph() -> Tensor:
    """A uint8 image [H, W, 3] on the host, larger than the video."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(0, 256, (1080, 1920, 3), generator=generator, dtype=torch.uint8)


def _engine_stage(vae: Any, image: Any, size: Size) -> Tensor:
    return engine_stage(vae, image, size.num_frames, size.height, size.width, dtype=BF16)[0]


def _our_stage(encoder: Any, image: Any, size: Size) -> Tensor:
    return LatentPreparation(encoder)(
        image, size.num_frames, size.height, size.width, seed=SEED, dtype=BF16
    ).latents


def _offloaded(module: nn.Module, device: str, stage: Call) -> object:
    """The stage where the weights come to the device and go again for each request."""
    module.to(device)
    try:
        return stage()
    finally:
        module.to("cpu")


def _host(context: Context, paths: Mapping[str, Call], rounds: int) -> dict[str, Any]:
    """Host-clock figures, the device synchronized around each call."""
    if context.dry_run:
        return time_calls(context, paths)
    timings = measure(paths, rounds=rounds, warmup=2)
    return {name: figure(timing.seconds) for name, timing in timings.items()}


def stage(context: Context) -> Iterator[Result]:
    """From a uint8 image on the host to latents on the device; host clock, synchronized."""
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise Skipped(f"the stage resizes its image with Pillow ({error})") from error
    size, device = SIZES[0].on(context), context.device
    encoder = make_encoder(context)
    # Graphs are CUDA's: a dry run tries the rest with the encoder itself.
    graphed = encoder if context.dry_run else Graphed(encoder)
    photograph = _photograph()
    sized = load_pixels(photograph, size.height, size.width)
    as_bytes = ((sized[0].permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).contiguous()
    resident: dict[str, Callable[[], Tensor]] = {
        "fast, CUDA graph, sized image": lambda: _our_stage(graphed, as_bytes, size),
        "fast, eager, sized image": lambda: _our_stage(encoder, as_bytes, size),
        "fast, CUDA graph, 1080p image": lambda: _our_stage(graphed, photograph, size),
    }
    vae = None
    try:
        vae = reference_vae(context, full_decoder=True)
    except Skipped as skipped:
        yield {"engine": {"skipped": str(skipped)}}
    if vae is not None:
        resident["engine, sized image"] = lambda: _engine_stage(vae, as_bytes, size)
        theirs, ours = resident["engine, sized image"](), resident["fast, eager, sized image"]()
        gate_equal("noise frames", ours[:, :, 1:], theirs[:, :, 1:])
        check_error("condition latents against the engine's", ours[:, :, :1], theirs[:, :, :1])
    yield {"warm, resident": _host(context, resident, 20)}

    pixels = sized.to(device, BF16)
    condition, noise = SIZES[0].latents(context, SEED)
    parts: dict[str, Call] = {
        "read and resize a 1080p image": lambda: load_pixels(photograph, size.height, size.width),
        "read a sized image": lambda: load_pixels(as_bytes, size.height, size.width),
        "pixels to the device": lambda: sized.to(device),
        "encode": lambda: encoder(pixels),
        "noise": lambda: torch.randn_like(noise),
        "blend": lambda: ops.prepare_latents(condition, noise),
        "encoder to the device and back": lambda: _offloaded(encoder, device, lambda: None),
    }
    if vae is not None:
        parts["VAE to the device and back"] = lambda: _offloaded(vae, device, lambda: None)
    # The transfers leave their module on the host, so they come after everything else.
    moving = {name: parts.pop(name) for name in list(parts) if name.endswith("and back")}
    yield {"parts": _host(context, parts, 20)}
    yield {"weights": _host(context, moving, 5)}
    offloaded: dict[str, Call] = {
        "fast": lambda: _offloaded(encoder, device, lambda: _our_stage(encoder, as_bytes, size))
    }
    if vae is not None:
        offloaded["engine"] = lambda: _offloaded(
            vae, device, lambda: _engine_stage(vae, as_bytes, size)
        )
    yield {"warm, offloaded": _host(context, offloaded, 5)}
    yield {
        "resident bytes": {
            "folded encoder": resident_bytes(encoder),
            "VAE": None if vae is None else resident_bytes(vae),
        }
    }


def cold_starts(context: Context) -> Iterator[Result]:
    """The first calls of a new process, by path."""
    for path in ("graph", "fast", "engine"):
        if context.dry_run and path != "graph":
            yield {path: {"skipped": "dry run: one new process shows that they work"}}
        else:
            yield {path: _cold_in_new_process(context, path)}


def _cold_in_new_process(context: Context, path: str) -> Any:
    command = [sys.executable, "-m", "benchmarks.gpu.campaign", "--cold", path]
    command += ["--cache", str(context.cache)]
    runs = []
    for _ in range(1 if context.dry_run else 2):
        done = subprocess.run(
            [*command, *(["--dry-run"] if context.dry_run else [])],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"cold {path}: {done.stderr[-2000:]}")
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    return NOT_MEASURED if context.dry_run else runs


def cold(context: Context, path: str) -> Result:
    """First calls in this process, in seconds of the host clock; it must be a new one."""
    parts: dict[str, float] = {}

    def timed(name: str, run: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = run()
        if not context.dry_run:
            torch.cuda.synchronize()
        parts[name] = time.perf_counter() - start
        return result

    size, image = SIZES[0].on(context), _photograph()
    model = reference_vae(context, "cpu") if path == "engine" else make_encoder(context, "cpu")
    if not context.dry_run:
        timed("CUDA context", lambda: torch.zeros(1, device="cuda"))
    timed("weights to the device", lambda: model.to(context.device))
    if path == "graph" and not context.dry_run:
        model = Graphed(model)
    if path == "engine":
        call = functools.partial(_engine_stage, model, image, size)
    else:
        call = functools.partial(_our_stage, model, image, size)
    for number in range(1, 6):
        timed(f"call {number}", call)
    return {f"{name}, s": seconds for name, seconds in parts.items()}


def seam(context: Context) -> Iterator[Result]:
    """What a live VAE's `encode` costs a request beyond the folded encoder: host time.

    A host that waits for nothing between calls: as long as it is ahead of the device, only the
    first figure of each pair matters to a request.
    """
    try:
        vae = reference_vae(context)
    except Skipped as skipped:
        yield {"seam": {"skipped": str(skipped)}}
        return
    encoder = make_encoder(context)
    clip = frame(context, SIZES[0], SEED, 9).contiguous()
    fast = accelerate(vae, "fast")

    def announced() -> Any:
        with wanted_frames(1):
            return fast.encode(clip)

    announced()
    last = last_encoding(vae)
    if last is None or last.path != "fast":
        raise RuntimeError(f"the seam did not take the fast path: {last}")
    calls: dict[str, Call] = {
        "FrameEncoder": lambda: encoder(clip[:, :, :1]),
        "vae.encode, accelerated": announced,
    }
    yield {"call and wait": _host(context, calls, 30)}
    if context.dry_run:
        return
    enqueued = {}
    for name, call in calls.items():
        samples = []
        for _ in range(30):
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            samples.append(time.perf_counter() - start)
        enqueued[name] = figure(samples)
    torch.cuda.synchronize()
    yield {"call only": enqueued}
