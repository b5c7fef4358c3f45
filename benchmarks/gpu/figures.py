"""Steps of the GPU campaign that measure: ceilings, op, encoder, stage, numerics."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu.cases import (
    SIZES,
    GraphedEncoder,
    Size,
    frame,
    make_encoder,
    reference_vae,
    rms_error,
    tolerance,
)
from benchmarks.gpu.timing import (
    NOT_MEASURED,
    Call,
    Context,
    Result,
    Skipped,
    Step,
    count_flops,
    figure,
    launches,
    median_s,
    peak_bytes,
    resident_bytes,
    rotating_graph,
    sets_beyond_l2,
    time_calls,
    tuned,
)
from benchmarks.harness import ROOT, GateError, gate_equal, measure
from benchmarks.paths import SEED, engine_stage, unfused
from benchmarks.suites.op import clone_and_copy
from cosmos3_fast import ops
from cosmos3_fast.latents import LatentPreparation
from cosmos3_fast.ops import registry
from cosmos3_fast.ops.prepare_latents import prepare_latents_formula
from cosmos3_fast.pixels import load_pixels
from cosmos3_fast.vae import FrameEncoder
from cosmos3_fast.vae.exact import encode_exact

BF16 = torch.bfloat16


def ceilings(context: Context) -> Iterator[Result]:
    """Copy bandwidth (bytes read plus bytes written) and the bf16 rates of cuDNN and cuBLAS."""
    device = context.device
    source = torch.randn(1 << (10 if context.dry_run else 29), device=device, dtype=BF16)
    copying = functools.partial(torch.empty_like(source).copy_, source)
    copied = time_calls(context, {"copy": copying}, flush=False)["copy"]
    yield {"copy": copied}
    if not context.dry_run:
        yield {"copy_bytes_per_s": 2 * source.numel() * source.element_size() / median_s(copied)}
    del source, copying

    shapes = ((8, 640, 60, 104), (4, 1024, 128, 128), (16, 512, 64, 64))
    rates: dict[str, Call] = {}
    operations: dict[str, int] = {}
    for batch, channels, height, width in ((1, 16, 8, 8),) if context.dry_run else shapes:
        x = torch.randn(batch, channels, height, width, device=device, dtype=BF16)
        x = x.contiguous(memory_format=torch.channels_last)
        conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False, device=device, dtype=BF16)
        conv = conv.to(memory_format=torch.channels_last).requires_grad_(False)  # type: ignore[call-overload]
        name = f"conv 3x3, {channels} channels, {batch} x {height} x {width}"
        rates[name] = functools.partial(conv, x)
        operations[name] = 2 * 9 * channels**2 * batch * height * width
    edge = 64 if context.dry_run else 8192
    a, b = (torch.randn(edge, edge, device=device, dtype=BF16) for _ in range(2))
    rates["matmul"] = functools.partial(torch.matmul, a, b)
    operations["matmul"] = 2 * edge**3
    with tuned():
        timed = time_calls(context, rates, seconds=2, flush=False)
    yield {"rates": timed}
    if not context.dry_run:
        reached = {name: operations[name] / median_s(each) for name, each in timed.items()}
        yield {
            "flops_per_s": reached,
            "conv_flops_per_s": max(rate for name, rate in reached.items() if name != "matmul"),
        }


def _inductor() -> Callable[..., Any]:
    return torch.compile(prepare_latents_formula, fullgraph=True, dynamic=False)


def op_step(size: Size) -> Step:
    """The op against what people would write, and against the copy that bounds it."""

    def run(context: Context) -> Iterator[Result]:
        cond, noise = size.latents(context, SEED)
        variants: dict[str, Callable[..., Any]] = {
            "eager formula": prepare_latents_formula,
            "clone and one-frame copy": clone_and_copy,
        }
        for backend in ("cpp", "triton"):
            if (error := registry.backend_error(backend, context.device)) is not None:
                yield {backend: {"skipped": error}}
                continue
            variants[backend] = functools.partial(ops.prepare_latents, backend=backend)
        if context.dry_run:
            yield {"Inductor": {"skipped": "dry run: compiles for a CUDA device"}}
        else:
            variants["Inductor"] = _inductor()
        wanted, _ = prepare_latents_formula(cond, noise)
        for name in list(variants):
            try:
                out = variants[name](cond, noise)
            except Exception as error:
                if name != "Inductor":
                    raise
                yield {name: {"skipped": f"torch.compile failed: {error}"[:500]}}
                del variants[name]
                continue
            gate_equal(name, out[0] if isinstance(out, tuple) else out, wanted)

        plane = cond.numel() * cond.element_size()
        moved = 2 * noise.numel() * noise.element_size()  # the conditioned frame replaces one
        calls = time_calls(
            context, {name: functools.partial(f, cond, noise) for name, f in variants.items()}
        )
        counted = {
            name: launches(context, functools.partial(f, cond, noise))
            for name, f in variants.items()
        }
        for name in variants:
            yield {name: {"call": calls[name], "launches": counted[name]}}
        yield {"bytes": moved, "condition_bytes": plane}
        if context.dry_run:
            return
        sets = [size.latents(context, seed) for seed in range(sets_beyond_l2(moved))]
        replays = {name: rotating_graph(f, sets) for name, f in variants.items()}
        on_device = time_calls(context, replays, seconds=2, flush=False, per_call=len(sets))
        copy_rate = context.ceiling("copy_bytes_per_s")
        for name in variants:
            rate = moved / median_s(on_device[name])
            yield {
                name: {
                    "call": calls[name],
                    "launches": counted[name],
                    "device": on_device[name],
                    "bytes_per_s": rate,
                    "share_of_copy_bandwidth": rate / copy_rate if copy_rate else None,
                }
            }

    return Step(run, limit_s=40)


def _with_rates(
    context: Context, timed: dict[str, Any], operations: dict[str, int]
) -> dict[str, Any]:
    """Each figure with its FLOP/s and their share of the convolution ceiling."""
    if context.dry_run:
        return timed
    ceiling = context.ceiling("conv_flops_per_s")
    return {
        name: {
            **each,
            "flops": operations[name],
            "flops_per_s": (rate := operations[name] / median_s(each)),
            "share_of_conv_ceiling": rate / ceiling if ceiling else None,
        }
        for name, each in timed.items()
    }


class _Convolutions(TorchDispatchMode):
    """The distinct convolutions that run inside, without their biases, and how often each does."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, Call] = {}
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.convolution.default:
            x, weight, _, stride, *rest = args
            out_channels, in_channels, height, width = weight.shape
            name = (
                f"{height}x{width} stride {stride[0]}, {in_channels} to {out_channels}, "
                f"{x.shape[2]} x {x.shape[3]}"
            )
            self.counts[name] += 1
            if name not in self.calls:
                noise = torch.randn_like(x)
                self.calls[name] = functools.partial(func, noise, weight, None, stride, *rest)
        return func(*args, **(kwargs or {}))


def convolutions_alone(context: Context, encoder: nn.Module, pixels: Tensor) -> Result:
    """Each distinct convolution of the encoder without its bias, tuned, and their sum: what fusion
    cannot beat."""
    with _Convolutions() as convolutions:
        encoder(pixels)
    with tuned():
        timed = time_calls(context, convolutions.calls, seconds=2)
    counts = dict(convolutions.counts)
    if context.dry_run:
        return {"each": timed}
    total = sum(timed[name]["median_us"] * counts[name] for name in timed)
    return {"each": timed, "times": counts, "sum_of_medians_us": total}


def _gate(name: str, ours: Tensor, exact: Tensor) -> None:
    if not (error := rms_error(ours, exact)) <= tolerance(BF16):
        raise GateError(f"{name}: rms error {error:.2e}, wanted at most {tolerance(BF16):.2e}")


def unfused_call(encoder: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The folded encoder, or what torch.compile made of it, with torch's own operations."""

    def call(pixels: Tensor) -> Tensor:
        with unfused():
            return encoder(pixels)

    return call


@dataclass
class _Paths:
    """What encodes `pixels`, and the operations of each."""

    encoder: FrameEncoder
    vae: Any
    pixels: Tensor
    wanted: Tensor
    calls: dict[str, Callable[[], Tensor]]
    operations: dict[str, int]

    def add(self, name: str, call: Callable[[], Tensor], operations: int) -> None:
        """Compared with the result in float64 before anything is timed."""
        _gate(name, call(), self.wanted)
        self.calls[name], self.operations[name] = call, operations


def _encoder_paths(context: Context, size: Size) -> _Paths:
    """The folded encoder, unfused and fused, and the VAE where there is one."""
    pixels = frame(context, size, SEED)
    wanted = make_encoder(context, dtype=torch.float64)(pixels.double())
    encoder = make_encoder(context)
    try:
        vae = reference_vae(context)
    except Skipped:
        vae = None
    paths = _Paths(encoder, vae, pixels, wanted, {}, {})
    _, operations = count_flops(lambda: encoder(pixels))
    plain = unfused_call(encoder)
    paths.add("folded, unfused", lambda: plain(pixels), operations)
    paths.add("folded, fused kernels", lambda: encoder(pixels), operations)
    if vae is not None:
        own: Callable[[], Tensor] = lambda: encode_exact(vae, pixels.unsqueeze(2))  # noqa: E731
        paths.add("vae.encode, 1 frame", own, count_flops(own)[1])
    return paths


def untuned_encoder_step(size: Size) -> Step:
    """One frame with the algorithms that cuDNN's heuristics choose: as an engine runs, untuned.

    In a process of its own, because what cuDNN has chosen for a shape stays with it.
    """

    def run(context: Context) -> Iterator[Result]:
        paths = _encoder_paths(context, size)
        yield _with_rates(context, time_calls(context, paths.calls), paths.operations)

    return Step(run, limit_s=30)


def encoder_step(size: Size) -> Step:
    """One frame folded, fused and in a graph, against the VAE's own encode of 1, 17, 81 frames.

    The convolutions of every path are tuned by cuDNN, the VAE's too.
    """

    def run(context: Context) -> Iterator[Result]:
        with tuned():
            made = _encoder_paths(context, size)
        encoder, vae, pixels, wanted = made.encoder, made.vae, made.pixels, made.wanted
        paths, operations = made.calls, made.operations
        if vae is None:
            yield {"vae.encode": {"skipped": "diffusers cannot be imported: see --wheels"}}
        on_cuda: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
            "folded, fused kernels, CUDA graph": lambda: GraphedEncoder(encoder),
            "folded, fused kernels, reduce-overhead": lambda: torch.compile(
                encoder, mode="reduce-overhead"
            ),
            "folded, unfused, torch.compile": lambda: unfused_call(torch.compile(encoder)),
            "folded, unfused, reduce-overhead": lambda: unfused_call(
                torch.compile(encoder, mode="reduce-overhead")
            ),
        }
        for name, make in on_cuda.items():
            if context.dry_run:
                yield {name: {"skipped": "dry run: CUDA only"}}
                continue
            with tuned():
                made.add(
                    name,
                    functools.partial(make(), pixels),
                    operations["folded, fused kernels"],
                )
        with tuned():
            timed = time_calls(context, paths, seconds=4)
        yield _with_rates(context, timed, operations)
        yield {"launches": {name: launches(context, path) for name, path in paths.items()}}
        yield {
            "memory": {
                "folded, resident bytes": resident_bytes(encoder),
                "vae encoder, resident bytes": (
                    None
                    if vae is None
                    else resident_bytes(vae.encoder) + resident_bytes(vae.quant_conv)
                ),
                "peak bytes of a call": {
                    name: peak_bytes(context, path)
                    for name, path in paths.items()
                    if "graph" not in name
                },
            }
        }
        yield {"convolutions alone": convolutions_alone(context, encoder, pixels)}
        if vae is None:
            return
        for frames in (5, 9) if context.dry_run else (17, 81):
            clip = frame(context, size, SEED, frames)
            clip[:, :, 0] = pixels
            name = f"vae.encode, {frames} frames"
            path = functools.partial(encode_exact, vae, clip)
            with tuned():
                latents, counted = count_flops(path)
                _gate(name, latents[:, :, :1], wanted)
                longer = time_calls(context, {name: path}, seconds=3, warmup=1, least=3)
            yield _with_rates(context, longer, {name: counted})
            yield {f"{name}, peak bytes": peak_bytes(context, path)}

    return Step(run, limit_s=90)


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
    """Host-clock figures, the device synchronised around each call."""
    if context.dry_run:
        return time_calls(context, paths)
    timings = measure(paths, rounds=rounds, warmup=2)
    return {name: figure(timing.seconds) for name, timing in timings.items()}


def stage(context: Context) -> Iterator[Result]:
    """From a uint8 image on the host to latents on the device; host clock, synchronised."""
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise Skipped(f"the stage resizes its image with Pillow ({error})") from error
    size, device = SIZES[0].on(context), context.device
    encoder = make_encoder(context)
    # Graphs are CUDA's: a dry run tries the rest with the encoder itself.
    graphed = encoder if context.dry_run else GraphedEncoder(encoder)
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
        _gate("condition latents against the engine's", ours[:, :, :1], theirs[:, :, :1])
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
    for path in ("graph", "fast", *(("engine",) if vae is not None else ())):
        if context.dry_run and path != "graph":
            yield {f"cold, {path}": {"skipped": "dry run: one new process shows that they work"}}
        else:
            yield {f"cold, {path}": _cold_in_new_process(context, path)}


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
        model = GraphedEncoder(model)
    if path == "engine":
        call = functools.partial(_engine_stage, model, image, size)
    else:
        call = functools.partial(_our_stage, model, image, size)
    for number in range(1, 6):
        timed(f"call {number}", call)
    return {f"{name}, s": seconds for name, seconds in parts.items()}


def numerics(context: Context) -> Iterator[Result]:
    """bf16 against float64 of the same weights and pixels: the folded encoder and the VAE."""
    encoder, exact = make_encoder(context), make_encoder(context, dtype=torch.float64)
    paths: dict[str, Callable[[Tensor], Tensor]] = {
        "folded, unfused": unfused_call(encoder),
        "folded, fused kernels": encoder,
    }
    if context.dry_run:
        yield {"folded, fused kernels, CUDA graph": {"skipped": "dry run: CUDA only"}}
    else:
        paths["folded, fused kernels, CUDA graph"] = GraphedEncoder(encoder)
    try:
        vae = reference_vae(context)
        paths["vae.encode, 1 frame"] = lambda pixels: encode_exact(vae, pixels.unsqueeze(2))
    except Skipped as skipped:
        yield {"vae.encode, 1 frame": {"skipped": str(skipped)}}
    errors: dict[str, list[float]] = {name: [] for name in paths}
    peaks: dict[str, list[float]] = {name: [] for name in paths}
    for seed in range(3):
        pixels = frame(context, SIZES[0], seed)
        wanted = exact(pixels.double())
        for name, path in paths.items():
            got = path(pixels)
            errors[name].append(rms_error(got, wanted))
            peaks[name].append(((got - wanted).abs().max() / wanted.abs().max()).item())
    yield {
        name: {
            "rms error over standard deviation, per image": errors[name],
            "largest error over largest value, per image": peaks[name],
        }
        for name in paths
    }
    worst = max(max(each) for each in errors.values())
    if not worst <= tolerance(BF16):
        raise GateError(f"rms error {worst:.2e} against float64")


# The ceilings come first: shares of them follow.
STEPS = {
    "ceilings": Step(ceilings, 30),
    **{f"op_{size.name}x{size.num_frames}": op_step(size) for size in SIZES},
    **{f"encoder_{size.name}_untuned": untuned_encoder_step(size) for size in SIZES},
    **{f"encoder_{size.name}": encoder_step(size) for size in SIZES},
    "numerics": Step(numerics, 40),
    "stage": Step(stage, 100),
}
