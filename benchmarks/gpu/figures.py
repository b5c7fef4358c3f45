"""Steps of the GPU campaign that measure: ceilings and the op; networks and requests beside."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from benchmarks.cases import SEED
from benchmarks.gpu import networks, stages
from benchmarks.gpu.cases import SIZES, Size
from benchmarks.gpu.device import (
    Context,
    Result,
    Step,
    launches,
    median_s,
    sets_beyond_l2,
    time_calls,
)
from benchmarks.harness import Call, gate_equal, rotating_graph, tuned
from benchmarks.suites.op import clone_and_copy
from cosmos3_fast import ops
from cosmos3_fast.ops import registry
from cosmos3_fast.ops.prepare_latents import prepare_latents_formula

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


# The ceilings come first: shares of them follow.
CEILINGS = {"ceilings": Step(ceilings, 20)}
FRAMES = {
    "encoder_480x832": networks.encoder_step(SIZES[0]),
    "decoder_1024x1024": networks.decoder_step(networks.IMAGE),
    "stage": Step(stages.stage, 50),
}
# What clips add, and what little time is left for.
REST = {
    **{f"op_{size.name}x{size.num_frames}": op_step(size) for size in SIZES},
    "encoder_720x1280": networks.encoder_step(SIZES[1]),
    "encoder_480x832_compiled": Step(networks.compiled, 70, gpu_only=True),
    **{f"decoder_{size.name}": networks.decoder_step(size) for size in SIZES},
    **{f"encoder_{size.name}_clips": networks.whole_clip_step(size) for size in SIZES},
    "clips_5": networks.clip_step(5),
    "seam": Step(stages.seam, 30),
    "cold": Step(stages.cold_starts, 80),
}
