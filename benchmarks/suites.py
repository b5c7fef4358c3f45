"""What is measured: one function per suite, each behind a correctness gate.

A suite yields rows: {"suite", "case", "dtype", "path", "seconds", "median", "q10", "q90",
"speedup", "error"}; `speedup` is the baseline's median over this path's, in the same rounds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from harness import Timing, gate_equal, gate_error, measure

from cosmos3_fast import LatentPreparation, reference
from cosmos3_fast.pixels import load_pixels
from cosmos3_fast.vae import ConditioningEncoder, layers
from cosmos3_fast.vae.exact import encode_exact
from cosmos3_fast.vae.synthetic import COSMOS3_VAE_CONFIG, synthetic_vae

Row = dict[str, Any]
PHOTOGRAPH = Path(__file__).resolve().parent.parent / "examples" / "falcon9_dscovr.jpg"
SIZES = {"256x448": (256, 448), "480x832": (480, 832), "720x1280": (720, 1280)}
SHORT = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
SEED_PATH = "vae.encode of 1 frame"


def rows(
    suite: str,
    case: str,
    dtype: torch.dtype,
    timings: Mapping[str, Timing],
    baseline: str,
    errors: Mapping[str, float] | None = None,
    calls: int = 1,
) -> list[Row]:
    """One row per path; `calls` is how often a timed interval calls it."""
    print(
        f"{suite} {case} {SHORT[dtype]}: "
        + ", ".join(f"{name} {t.median / calls:.3g} s" for name, t in timings.items()),
        file=sys.stderr,
    )
    return [
        {
            "suite": suite,
            "case": case,
            "dtype": SHORT[dtype],
            "path": name,
            "seconds": [s / calls for s in timing.seconds],
            "median": timing.median / calls,
            "q10": timing.quantile(0.1) / calls,
            "q90": timing.quantile(0.9) / calls,
            "speedup": timings[baseline].median / timing.median,
            "error": (errors or {}).get(name),
        }
        for name, timing in timings.items()
    ]


def op(full: bool) -> Iterator[Row]:
    """The blend: the seed's formula, eager and compiled, a plain copy, and ours."""
    prepare, prepare_ = torch.ops.cosmos3.prepare_latents, torch.ops.cosmos3.prepare_latents_
    frames_of = {17: 5, 81: 21, 189: 48}
    compiled = torch.compile(reference.prepare_latents_formula, dynamic=True)
    cases = [
        (size, frames) for size in SIZES for frames in frames_of
        if full or (size, frames) in (("480x832", 81), ("720x1280", 189))
    ]  # fmt: skip
    for size, frames in cases:
        for dtype in SHORT:
            height, width = (edge // 16 for edge in SIZES[size])
            noise = torch.randn(1, 48, frames_of[frames], height, width).to(dtype)
            cond = torch.randn(1, 48, 1, height, width).to(dtype)
            work = noise.clone()
            wanted, wanted_mask = reference.prepare_latents_formula(cond, noise)
            for name, got in (("ours", prepare(cond, noise)), ("compiled", compiled(cond, noise))):
                gate_equal(f"op {size} {frames} {name}", got[0], wanted)
                gate_equal(f"op {size} {frames} {name} mask", got[1], wanted_mask)
            prepare_(cond, work)
            gate_equal(f"op {size} {frames} in place", work, wanted)

            def copy(noise: torch.Tensor = noise, cond: torch.Tensor = cond) -> torch.Tensor:
                latents = noise.clone()
                latents[:, :, 0] = cond[:, :, 0]
                return latents

            paths: dict[str, Callable[[], Any]] = {
                "eager formula": lambda c=cond, n=noise: reference.prepare_latents_formula(c, n),
                "compiled formula": lambda c=cond, n=noise: compiled(c, n),
                "clone + 1-frame copy": copy,
                "ours": lambda c=cond, n=noise: prepare(c, n),
                "ours, in place": lambda c=cond, n=work: prepare_(c, n),
            }
            # Long enough for the clock, and each result is freed before the next is made.
            calls = max(3, int(2e7 / noise.numel()))
            repeated = {
                name: lambda run=run, calls=calls: [None for _ in range(calls) if run() is None]
                for name, run in paths.items()
            }
            timings = measure(repeated, rounds=25 if full else 15, warmup=2)
            yield from rows(
                "op", f"{size}, {frames} frames", dtype, timings, "clone + 1-frame copy",
                calls=calls,
            )  # fmt: skip


@contextmanager
def unfused() -> Iterator[None]:
    """The folded encoder without this package's kernels: eager norms, oneDNN's convolutions."""
    tiles, norm = layers._WINOGRAD_TILES, layers.rms_norm_silu
    layers._WINOGRAD_TILES, layers.rms_norm_silu = sys.maxsize, reference.rms_norm_silu
    try:
        yield
    finally:
        layers._WINOGRAD_TILES, layers.rms_norm_silu = tiles, norm


def _without_kernels(encoder: ConditioningEncoder, pixels: torch.Tensor) -> torch.Tensor:
    with unfused():
        return encoder(pixels)


def _pair(dtype: torch.dtype) -> tuple[Any, ConditioningEncoder]:
    vae = synthetic_vae(COSMOS3_VAE_CONFIG, 0)
    vae = torch.nn.Module.to(vae, dtype)
    return vae, ConditioningEncoder.from_vae(vae)


@torch.no_grad()
def encoder(full: bool) -> Iterator[Row]:
    """One frame: the 3-D VAE, the folded network without and with this package's kernels."""
    for dtype in SHORT:
        vae, ours = _pair(dtype)
        for size in ("256x448", "480x832", "720x1280") if full else ("256x448", "480x832"):
            pixels = load_pixels(PHOTOGRAPH, *SIZES[size]).to(dtype)
            paths: dict[str, Callable[[], torch.Tensor]] = {
                SEED_PATH: lambda p=pixels, v=vae: encode_exact(v, p[:, :, None]),
                "folded, unfused": lambda p=pixels, e=ours: _without_kernels(e, p),
                "ours": lambda p=pixels, e=ours: e(p),
            }
            wanted = paths[SEED_PATH]()
            # Two bf16 networks differ by their roundings; `verify` judges those against float64.
            bound = 1e-5 if dtype == torch.float32 else 0.1
            errors = {
                name: gate_error(f"encoder {size} {name}", run(), wanted, bound)
                for name, run in paths.items()
                if name != SEED_PATH
            }
            rounds = {"256x448": 7, "480x832": 5, "720x1280": 3}[size] if full else 3
            timings = measure(paths, rounds=rounds, warmup=0)
            yield from rows("encoder", size, dtype, timings, SEED_PATH, errors)


@torch.no_grad()
def growth(full: bool) -> Iterator[Row]:
    """What the engines paid before they encoded one frame: `vae.encode` of T frames."""
    vae, ours = _pair(torch.float32)
    pixels = load_pixels(PHOTOGRAPH, 256, 448)
    for frames in (1, 5, 9, 17) if full else (1, 5):
        clip = pixels[:, :, None].expand(-1, -1, frames, -1, -1)
        first = encode_exact(vae, clip)[:, :, :1]
        error = gate_error(f"growth {frames}", ours(pixels), first, 1e-5)
        name = f"vae.encode of {frames} frame{'s' if frames > 1 else ''}"
        timings = measure(
            {name: lambda c=clip: encode_exact(vae, c), "ours": lambda: ours(pixels)},
            rounds=3 if frames == 1 else 1,
            warmup=0,
        )
        yield from rows(
            "growth", f"256x448, {frames} frames", torch.float32, timings, name, {"ours": error}
        )


@torch.no_grad()
def stage(full: bool) -> Iterator[Row]:
    """A photograph and a seed to conditioned latents, from the file on."""
    vae, ours = _pair(torch.float32)
    size, frames = ("480x832", 17) if full else ("256x448", 5)
    height, width = SIZES[size]
    prepare = LatentPreparation(ours)

    def engine(encoded_frames: int) -> torch.Tensor:
        """As SGLang (1 frame) and diffusers 0.42.1 (all frames) write the stage."""
        pixels = load_pixels(PHOTOGRAPH, height, width)
        clip = pixels[:, :, None].expand(-1, -1, encoded_frames, -1, -1)
        condition = encode_exact(vae, clip)[:, :, :1]
        shape = (1, 48, (frames - 1) // 4 + 1, height // 16, width // 16)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(42))
        return reference.prepare_latents_formula(condition, noise)[0]

    def accelerated() -> torch.Tensor:
        return prepare(
            PHOTOGRAPH, frames, height, width, seed=42, dtype=torch.float32, mode="fast"
        ).latents

    error = gate_error("stage", accelerated(), engine(1), 1e-5)
    case = f"{size}, {frames} frames"
    timings = measure(
        {SEED_PATH: lambda: engine(1), "ours": accelerated}, rounds=5 if full else 3, warmup=0
    )
    yield from rows("stage", case, torch.float32, timings, SEED_PATH, {"ours": error})
    every = f"vae.encode of {frames} frames"
    timings = measure(
        {every: lambda: engine(frames), "ours": accelerated}, rounds=2 if full else 1, warmup=0
    )
    yield from rows("stage", case, torch.float32, timings, every, {"ours": error})


SUITES: dict[str, Callable[[bool], Iterator[Row]]] = {
    "op": op,
    "encoder": encoder,
    "growth": growth,
    "stage": stage,
}


@torch.no_grad()
def profile() -> dict[str, float]:
    """Shares of the self CPU time of an fp32 encode at 480x832, above half a percent."""
    _, ours = _pair(torch.float32)
    pixels = load_pixels(PHOTOGRAPH, 480, 832)
    ours(pixels)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        ours(pixels)
    events = recorded.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    shares = {event.key: event.self_cpu_time_total / total for event in events}
    return {
        name: share
        for name, share in sorted(shares.items(), key=lambda item: -item[1])
        if share >= 0.005
    }
