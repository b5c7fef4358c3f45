"""What is measured: one function per suite, each behind a correctness gate.

A suite yields rows: {"suite", "case", "dtype", "path", "seconds", "median", "q10", "q90",
"baseline", "speedup", "error"}. `speedup` is the median of the path named `baseline` over this
path's, in the same rounds. `error` is, in float32, the largest difference from the reference over
its largest value; in bfloat16 the rms error against a float32 run of the same weights over the rms.
"""

from __future__ import annotations

import copy
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from harness import GateError, Timing, gate_equal, gate_error, gate_rounding, measure
from torch.utils.flop_counter import FlopCounterMode

from cosmos3_fast import LatentPreparation
from cosmos3_fast.ops import winograd
from cosmos3_fast.ops.prepare_latents import prepare_latents_formula
from cosmos3_fast.ops.rms_norm_silu import rms_norm_silu_reference
from cosmos3_fast.pixels import load_pixels
from cosmos3_fast.vae import FrameEncoder, layers
from cosmos3_fast.vae.exact import encode_exact
from cosmos3_fast.vae.synthetic import COSMOS3_VAE_CONFIG, synthetic_vae

Row = dict[str, Any]
Paths = Mapping[str, Callable[[], Any]]
PHOTOGRAPH = Path(__file__).resolve().parent.parent / "examples" / "falcon9_dscovr.jpg"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FP32_BOUND = 1e-5
SEED = 42
OP_WORKING_SET = 64_000_000  # bytes, twice the last-level cache of a large part of a processor

FORMULA, COMPILED, COPY = "eager formula", "compiled formula", "clone + 1-frame copy"
OURS, IN_PLACE = "ours", "ours, in place"
ONE_FRAME, UNFUSED = "vae.encode of 1 frame", "folded, unfused"


def all_frames(frames: int) -> str:
    """The name of the path through `vae.encode` of a whole clip."""
    return ONE_FRAME if frames == 1 else f"vae.encode of {frames} frames"


@dataclass(frozen=True)
class Plan:
    """The sizes and rounds of a run; a size is "HEIGHTxWIDTH".

    `clip_rounds` are those of the stage through `vae.encode` of every frame, a long one.
    """

    name: str
    op_cases: tuple[tuple[str, int], ...]
    op_rounds: int
    encoder_rounds: Mapping[str, int]
    growth_size: str
    growth_frames: tuple[int, ...]
    growth_rounds: int
    stage_size: str
    stage_frames: int
    stage_rounds: int
    clip_rounds: int
    profile_size: str = "480x832"
    engine_options: tuple[str, ...] = ()
    vae_config: Mapping[str, Any] = field(default_factory=lambda: COSMOS3_VAE_CONFIG)


SIZES = ("256x448", "480x832", "720x1280")
USUAL = (("480x832", 81), ("720x1280", 189))  # what users of Cosmos3 run by default
USUAL_CASES = tuple(f"{size}, {frames} frames" for size, frames in USUAL)
SHORT = Plan(
    name="short",
    op_cases=USUAL,
    op_rounds=15,
    encoder_rounds={"256x448": 3, "480x832": 2},
    growth_size="256x448",
    growth_frames=(1, 5),
    growth_rounds=1,
    stage_size="256x448",
    stage_frames=5,
    stage_rounds=3,
    clip_rounds=1,
    engine_options=("--height", "128", "--width", "128", "--rounds", "1"),
)
FULL = Plan(
    name="full",
    op_cases=tuple(
        (size, frames) for size in ("256x448", "480x832", "720x1280") for frames in (17, 81, 189)
    ),
    op_rounds=41,
    encoder_rounds={"256x448": 7, "480x832": 5, "720x1280": 3},
    growth_size="256x448",
    growth_frames=(1, 5, 9, 17),
    growth_rounds=1,
    stage_size="480x832",
    stage_frames=17,
    stage_rounds=5,
    clip_rounds=2,
    engine_options=("--height", "256", "--width", "448", "--rounds", "2"),
)


def sides(size: str) -> tuple[int, int]:
    height, width = size.split("x")
    return int(height), int(width)


def latent_frames(frames: int) -> int:
    return (frames - 1) // 4 + 1


def timed_rows(
    suite: str,
    case: str,
    dtype: str,
    paths: Paths,
    baseline: str,
    *,
    rounds: int,
    repeats: int = 1,
    errors: Mapping[str, float] | None = None,
) -> list[Row]:
    """Time paths that the gate has called already; one row each."""
    label = f"{suite} {case} {dtype}"
    print(f"{label} ...", file=sys.stderr, flush=True)
    timings: Mapping[str, Timing] = measure(paths, rounds=rounds, warmup=0, repeats=repeats)
    print(
        f"{label}: " + ", ".join(f"{name} {t.median:.3g} s" for name, t in timings.items()),
        file=sys.stderr,
    )
    return [
        {
            "suite": suite,
            "case": case,
            "dtype": dtype,
            "path": name,
            "seconds": list(timing.seconds),
            "median": timing.median,
            "q10": timing.quantile(0.1),
            "q90": timing.quantile(0.9),
            "baseline": baseline,
            "speedup": timings[baseline].median / timing.median,
            "error": (errors or {}).get(name),
        }
        for name, timing in timings.items()
    ]


def keeping(count: int, run: Callable[[], Any]) -> Callable[[], None]:
    """`run`, which keeps its latest `count` results, and has made so many."""
    kept: deque[Any] = deque(maxlen=count)
    for _ in range(count + 1):
        kept.append(run())
    return lambda: kept.append(run())


@torch.inference_mode()
def op(plan: Plan) -> Iterator[Row]:
    """The blend: the seed's formula, eager and compiled, the plain copy that bounds it, and ours.

    In inference mode, as the engines run: outside of it torch's autograd wrapper, in Python, adds
    microseconds to each call of a custom op. Every side keeps its latest results up to a size that
    no cache holds, and so writes to memory that is mapped but not cached. If results were freed at
    once, malloc would decide which side is given two blocks in turn and which three.
    """
    prepare, prepare_ = torch.ops.cosmos3.prepare_latents, torch.ops.cosmos3.prepare_latents_
    for size, frames in plan.op_cases:
        height, width = (side // 16 for side in sides(size))
        for name, dtype in DTYPES.items():
            generator = torch.Generator().manual_seed(SEED)
            noise, cond = (
                torch.randn(1, 48, t, height, width, generator=generator).to(dtype)
                for t in (latent_frames(frames), 1)
            )
            work = noise.clone()
            # Compiled anew for each shape, as a user's own would be: no dynamic sizes.
            torch.compiler.reset()
            compiled = torch.compile(prepare_latents_formula, fullgraph=True, dynamic=False)

            def copy_frame(noise: torch.Tensor = noise, cond: torch.Tensor = cond) -> torch.Tensor:
                latents = noise.clone()
                latents[:, :, 0] = cond[:, :, 0]
                return latents

            paths: dict[str, Callable[[], Any]] = {
                FORMULA: lambda c=cond, n=noise: prepare_latents_formula(c, n),
                COMPILED: lambda c=cond, n=noise, run=compiled: run(c, n),
                COPY: copy_frame,
                OURS: lambda c=cond, n=noise: prepare(c, n),
                IN_PLACE: lambda c=cond, n=work: prepare_(c, n),
            }
            case = f"{size}, {frames} frames"
            wanted, wanted_mask = paths[FORMULA]()
            for path in (COMPILED, OURS):
                latents, mask = paths[path]()
                gate_equal(f"op {case} {name}, {path}", latents, wanted)
                gate_equal(f"op {case} {name}, {path}: mask", mask, wanted_mask)
            gate_equal(f"op {case} {name}, {COPY}", copy_frame(), wanted)
            gate_equal(f"op {case} {name}, {IN_PLACE}: mask", paths[IN_PLACE](), wanted_mask)
            gate_equal(f"op {case} {name}, {IN_PLACE}", work, wanted)
            del wanted, latents
            count = -(-OP_WORKING_SET // noise.nbytes)
            keepers = {path: keeping(count, run) for path, run in paths.items()}
            yield from timed_rows(
                *("op", case, name, keepers, COPY),
                rounds=plan.op_rounds,
                repeats=max(3, int(2e7 / noise.numel())),
            )


@contextmanager
def unfused() -> Iterator[None]:
    """The folded encoder without this package's kernels: eager norms, torch's convolutions."""
    tiles, norm = winograd.MIN_TILES, layers.rms_norm_silu
    winograd.MIN_TILES, layers.rms_norm_silu = sys.maxsize, rms_norm_silu_reference
    try:
        yield
    finally:
        winograd.MIN_TILES, layers.rms_norm_silu = tiles, norm


def without_kernels(encoder: FrameEncoder, pixels: torch.Tensor) -> torch.Tensor:
    with unfused():
        return encoder(pixels)


def vae_and_encoder(plan: Plan, dtype: str) -> tuple[Any, FrameEncoder]:
    vae = torch.nn.Module.to(synthetic_vae(plan.vae_config, 0), DTYPES[dtype])
    return vae, FrameEncoder.from_vae(vae)


@torch.no_grad()
def encoder(plan: Plan) -> Iterator[Row]:
    """One frame: the 3-D VAE, the folded network without and with this package's kernels."""
    for dtype, torch_dtype in DTYPES.items():
        vae, ours = vae_and_encoder(plan, dtype)
        for size, rounds in plan.encoder_rounds.items():
            pixels = load_pixels(PHOTOGRAPH, *sides(size)).to(torch_dtype)
            paths: dict[str, Callable[[], torch.Tensor]] = {
                ONE_FRAME: lambda p=pixels, v=vae: encode_exact(v, p[:, :, None]),
                UNFUSED: lambda p=pixels, e=ours: without_kernels(e, p),
                OURS: lambda p=pixels, e=ours: e(p),
            }
            errors = _encoder_gate(f"encoder {size} {dtype}", paths, vae, pixels)
            yield from timed_rows(
                "encoder", size, dtype, paths, ONE_FRAME, rounds=rounds, errors=errors
            )


def _encoder_gate(name: str, paths: Paths, vae: Any, pixels: torch.Tensor) -> dict[str, float]:
    print(f"{name}: correctness gate ...", file=sys.stderr, flush=True)
    wanted = paths[ONE_FRAME]()
    mine = [path for path in paths if path != ONE_FRAME]
    if pixels.dtype == torch.float32:
        return {
            path: gate_error(f"{name}, {path}", paths[path](), wanted, FP32_BOUND) for path in mine
        }
    # The error of float32 is four orders below that of bfloat16.
    exact = encode_exact(copy.deepcopy(vae).float(), pixels.float()[:, :, None])
    errors = {}
    for path in mine:
        errors[path], errors[ONE_FRAME] = gate_rounding(
            f"{name}, {path}", paths[path](), wanted, exact
        )
    return errors


@torch.no_grad()
def growth(plan: Plan) -> Iterator[Row]:
    """What the engines paid before they encoded one frame: `vae.encode` of T frames."""
    vae, ours = vae_and_encoder(plan, "float32")
    pixels = load_pixels(PHOTOGRAPH, *sides(plan.growth_size))
    for frames in plan.growth_frames:
        clip = pixels[:, :, None].expand(-1, -1, frames, -1, -1)
        case = f"{plan.growth_size}, T={frames}"
        paths: dict[str, Callable[[], torch.Tensor]] = {
            all_frames(frames): lambda c=clip: encode_exact(vae, c),
            OURS: lambda: ours(pixels),
        }
        first = paths[all_frames(frames)]()[:, :, :1]
        error = gate_error(f"growth {case}", ours(pixels), first, FP32_BOUND)
        yield from timed_rows(
            *("growth", case, "float32", paths, all_frames(frames)),
            rounds=plan.growth_rounds,
            errors={OURS: error},
        )


@torch.no_grad()
def stage(plan: Plan) -> Iterator[Row]:
    """A photograph and a seed to conditioned latents, from the file on.

    The engines' stage is written out here; `engines` has their own code.
    """
    vae, ours = vae_and_encoder(plan, "float32")
    frames = plan.stage_frames
    height, width = sides(plan.stage_size)
    prepare = LatentPreparation(ours)

    def engine(encoded_frames: int) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = load_pixels(PHOTOGRAPH, height, width)
        shape = (1, vae.config.z_dim, latent_frames(frames), height // 16, width // 16)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(SEED))
        clip = pixels[:, :, None].expand(-1, -1, encoded_frames, -1, -1)
        condition = encode_exact(vae, clip)[:, :, :1]
        return prepare_latents_formula(condition, noise)

    def accelerated() -> tuple[torch.Tensor, torch.Tensor]:
        prepared = prepare(
            PHOTOGRAPH, frames, height, width, seed=SEED, dtype=torch.float32, mode="fast"
        )
        return prepared.latents, prepared.velocity_mask

    case = f"{plan.stage_size}, {frames} frames"
    for encoded, rounds in ((1, plan.stage_rounds), (frames, plan.clip_rounds)):
        path = all_frames(encoded)
        print(f"stage {case}, {path}: correctness gate ...", file=sys.stderr, flush=True)
        wanted, wanted_mask = engine(encoded)
        latents, mask = accelerated()
        name = f"stage {case}, against {path}"
        error = gate_error(name, latents[:, :, :1], wanted[:, :, :1], FP32_BOUND)
        gate_equal(f"{name}: noise frames", latents[:, :, 1:], wanted[:, :, 1:])
        gate_equal(f"{name}: mask", mask, wanted_mask)
        yield from timed_rows(
            *("stage", case, "float32"),
            {path: lambda n=encoded: engine(n), OURS: accelerated},
            path,
            rounds=rounds,
            errors={OURS: error},
        )


SUITES: dict[str, Callable[[Plan], Iterator[Row]]] = {
    "op": op,
    "encoder": encoder,
    "growth": growth,
    "stage": stage,
}


@torch.no_grad()
def profile(plan: Plan) -> dict[str, Any]:
    """Where an encode spends its time, and how its arithmetic compares with a matrix product's.

    Returns, per dtype: `seconds` of an encode, its `tflop` (a Winograd convolution counted as the
    direct one that it replaces), the `tflop_per_s` that makes, the `matmul_tflop_per_s` of a square
    matrix product, and the `shares` of self CPU time of each operation above half a percent.
    """
    found: dict[str, Any] = {}
    size = sides(plan.profile_size)
    for dtype, torch_dtype in DTYPES.items():
        print(f"profile {plan.profile_size} {dtype} ...", file=sys.stderr, flush=True)
        _, ours = vae_and_encoder(plan, dtype)
        pixels = load_pixels(PHOTOGRAPH, *size).to(torch_dtype)
        with FlopCounterMode(display=False) as counter:
            without_kernels(ours, pixels)
        ours(pixels)
        start = time.perf_counter()
        ours(pixels)
        seconds = time.perf_counter() - start
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
            ours(pixels)
        events = recorded.key_averages()
        total = sum(event.self_cpu_time_total for event in events)
        shares = {event.key: event.self_cpu_time_total / total for event in events}
        tflop = counter.get_total_flops() / 1e12
        found[dtype] = {
            "size": plan.profile_size,
            "seconds": seconds,
            "tflop": tflop,
            "tflop_per_s": tflop / seconds,
            "matmul_tflop_per_s": _matmul_rate(torch_dtype) / 1e12,
            "shares": {
                name: share
                for name, share in sorted(shares.items(), key=lambda item: -item[1])
                if share >= 0.005
            },
        }
        if not found[dtype]["shares"]:
            raise GateError(f"profile {dtype}: the profiler recorded nothing")
    return found


def _matmul_rate(dtype: torch.dtype, side: int = 2048) -> float:
    """Floating-point operations per second of the best of five products."""
    left, right = (torch.randn(side, side).to(dtype) for _ in range(2))
    timing = measure({"matmul": lambda: left @ right}, rounds=5)["matmul"]
    return 2 * side**3 / min(timing.seconds)
