"""Steps of the GPU campaign that measure: ceilings, op, encoder, stage, numerics."""

from __future__ import annotations

import copy
import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.cases import (
    SIZES,
    GraphedEncoder,
    Size,
    encoder_pair,
    frame,
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
from benchmarks.paths import SEED, engine_stage
from benchmarks.suites.op import clone_and_copy
from cosmos3_fast import ops
from cosmos3_fast.latents import LatentPreparation
from cosmos3_fast.ops import registry
from cosmos3_fast.ops.prepare_latents import prepare_latents_formula
from cosmos3_fast.pixels import load_pixels
from cosmos3_fast.vae import layers
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

    return Step(run, limit_s=60)


def with_eager_norms(encoder: nn.Module) -> nn.Module:
    """A copy whose norms are eager formulas instead of the fused kernel."""
    encoder = copy.deepcopy(encoder)
    norms = [module for module in encoder.modules() if isinstance(module, layers.NormSiLU)]
    if not norms:
        raise GateError("the encoder has no layers.NormSiLU: nothing was unfused")
    for norm in norms:
        norm.forward = functools.partial(  # type: ignore[method-assign]
            ops.rms_norm_silu, weight=norm.weight, silu=True, backend="eager"
        )
    return encoder


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


def convolutions_alone(context: Context, encoder: nn.Module, pixels: Tensor) -> Result:
    """Each distinct convolution of the encoder, tuned, and their sum: what fusion cannot beat."""
    shapes: dict[str, tuple[nn.Conv2d, Tensor, int]] = {}

    def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        assert isinstance(module, nn.Conv2d)
        kernel = "x".join(str(k) for k in module.kernel_size)
        name = (
            f"{kernel} stride {module.stride[0]}, {module.in_channels} to {module.out_channels}, "
            f"{x.shape[2]} x {x.shape[3]}"
        )
        count = shapes[name][2] if name in shapes else 0
        shapes[name] = module, torch.randn_like(x), count + 1

    handles = [
        module.register_forward_pre_hook(record)
        for module in encoder.modules()
        if isinstance(module, nn.Conv2d)
    ]
    try:
        encoder(pixels)
    finally:
        for handle in handles:
            handle.remove()
    paths = {name: functools.partial(conv, x) for name, (conv, x, _) in shapes.items()}
    with tuned():
        timed = time_calls(context, paths, seconds=2)
    counts = {name: count for name, (_, _, count) in shapes.items()}
    if context.dry_run:
        return {"each": timed}
    total = sum(timed[name]["median_us"] * counts[name] for name in timed)
    return {"each": timed, "times": counts, "sum_of_medians_us": total}


def _gate(name: str, ours: Tensor, exact: Tensor) -> None:
    if not (error := rms_error(ours, exact)) <= tolerance(BF16):
        raise GateError(f"{name}: rms error {error:.2e}, wanted at most {tolerance(BF16):.2e}")


def encoder_step(size: Size) -> Step:
    """One frame folded, fused and in a graph, against the VAE's own encode of 1, 17, 81 frames.

    The convolutions of every path are tuned by cuDNN, the VAE's too, except where it says so.
    """

    def run(context: Context) -> Iterator[Result]:
        encoder, exact = encoder_pair(context)
        pixels = frame(context, size, SEED)
        wanted = exact(pixels.double())
        del exact
        unfused = with_eager_norms(encoder)
        paths: dict[str, Callable[[], Tensor]] = {
            "folded, eager norms": lambda: unfused(pixels),
            "folded, fused kernels": lambda: encoder(pixels),
        }
        _, folded = count_flops(paths["folded, fused kernels"])
        operations = dict.fromkeys(paths, folded)
        vae = None
        try:
            vae = reference_vae(context)
        except Skipped as skipped:
            yield {"vae.encode": {"skipped": str(skipped)}}
        if vae is not None:
            paths["vae.encode, 1 frame"] = lambda: encode_exact(vae, pixels.unsqueeze(2))
            _, operations["vae.encode, 1 frame"] = count_flops(paths["vae.encode, 1 frame"])
        for name, path in paths.items():
            _gate(name, path(), wanted)
        # First, because what cuDNN has tuned stays with the process.
        untuned = time_calls(context, paths)
        yield {"with cuDNN untuned": _with_rates(context, untuned, operations)}

        on_cuda = {
            "folded, fused kernels, CUDA graph": lambda: GraphedEncoder(encoder),
            "folded, fused kernels, reduce-overhead": lambda: torch.compile(
                encoder, mode="reduce-overhead"
            ),
            "folded, eager norms, reduce-overhead": lambda: torch.compile(
                unfused, mode="reduce-overhead"
            ),
        }
        for name, make in on_cuda.items():
            if context.dry_run:
                yield {name: {"skipped": "dry run: CUDA only"}}
                continue
            run = make()
            paths[name], operations[name] = functools.partial(run, pixels), folded
            with tuned():
                _gate(name, run(pixels), wanted)
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

    return Step(run, limit_s=100)


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
    encoder, _ = encoder_pair(context)
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
    model = reference_vae(context, "cpu") if path == "engine" else encoder_pair(context, "cpu")[0]
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
    encoder, exact = encoder_pair(context)
    paths: dict[str, Callable[[Tensor], Tensor]] = {
        "folded, eager norms": with_eager_norms(encoder),
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


STEPS = {
    "ceilings": Step(ceilings, 60),
    **{f"op_{size.name}x{size.num_frames}": op_step(size) for size in SIZES},
    **{f"encoder_{size.name}": encoder_step(size) for size in SIZES},
    "stage": Step(stage, 150),
    "numerics": Step(numerics, 60),
}
