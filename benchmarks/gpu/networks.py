"""Steps of the GPU campaign that measure the folded networks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import SEED, last_taps
from benchmarks.gpu.cases import (
    SIZES,
    Size,
    check_error,
    frame,
    make_clip_encoder,
    make_decoder,
    make_encoder,
    reference_vae,
    rms_error,
)
from benchmarks.gpu.device import (
    Context,
    Result,
    Skipped,
    Step,
    kernel_times,
    launches,
    median_s,
    peak_bytes,
    resident_bytes,
    time_calls,
)
from benchmarks.harness import Graphed, count_flops, tuned
from cosmos3_fast.vae.live.exact import decode_sample, encode_exact

IMAGE = Size(1024, 1024, 1)  # Qwen-Image's usual size
FUSED = "folded, fused kernels"
CAPTURED = f"{FUSED}, capture()"
Calls = dict[str, Callable[[], Tensor]]


def own_vae(context: Context, full_decoder: bool = False) -> tuple[Any, Result]:
    """The VAE; or None, and why there is none."""
    try:
        return reference_vae(context, full_decoder=full_decoder), {}
    except Skipped as skipped:
        return None, {"the VAE": {"skipped": str(skipped)}}


def graphed(context: Context, calls: Calls, network: Callable[[Tensor], Tensor], x: Tensor) -> str:
    """Add the network in a CUDA graph; its name. A dry run replays nothing."""
    name = f"{next(iter(calls))}, CUDA graph"
    replayed = network if context.dry_run else Graphed(network)
    calls[name] = lambda: replayed(x)
    return name


def compare(
    context: Context,
    calls: Calls,
    wanted: Tensor,
    network: nn.Module,
    own: tuple[nn.Module, ...],
    like_first: tuple[str, ...] = (),
    **timing: Any,
) -> Iterator[Result]:
    """Gate, count and time calls, cuDNN tuned; then kernels, launches and memory.

    Args:
        calls: this package's first.
        wanted: in float64; of the same frames or the first ones.
        own: the VAE's modules that are called.
        like_first: those with the operations of the first, which a counter does not see.
        timing: see `time_calls`.
    """
    first = next(iter(calls))
    errors: dict[str, float] = {}
    operations: dict[str, int] = {}
    with tuned():
        for name, call in calls.items():
            if name in like_first:
                got, operations[name] = call(), operations[first]
            else:
                got, operations[name] = count_flops(call)
            frames = min(got.shape[2], wanted.shape[2])
            check_error(name, got[:, :, :frames], wanted[:, :, :frames])
            errors[name] = rms_error(got[:, :, :frames], wanted[:, :, :frames])
        del got
        yield {"rms error over standard deviation": errors}
        timed = time_calls(context, calls, **{"seconds": 4, **timing})
        yield with_rates(context, timed, operations)
        yield {"kernels": kernel_times(context, calls[first])}
    yield {"launches": {name: launches(context, call) for name, call in calls.items()}}
    yield {
        "memory": {
            "folded, resident bytes": resident_bytes(network),
            "the VAE's own, resident bytes": sum(map(resident_bytes, own)),
            "peak bytes of a call": {
                name: peak_bytes(context, call)
                for name, call in calls.items()
                if name not in like_first
            },
        }
    }


def with_rates(context: Context, timed: dict[str, Any], operations: Mapping[str, int]) -> Result:
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


def encoder_step(size: Size) -> Step:
    """One frame folded and in a graph, against the VAE's own encode of it and its last taps."""

    def run(context: Context) -> Iterator[Result]:
        pixels = frame(context, size, SEED)
        wanted = make_encoder(context, dtype=torch.float64)(pixels.double())
        encoder = make_encoder(context)
        calls: Calls = {FUSED: lambda: encoder(pixels)}
        graph = graphed(context, calls, encoder, pixels)
        captured = copy.deepcopy(encoder).capture()
        calls[CAPTURED] = lambda: captured(pixels)
        vae, missing = own_vae(context)
        yield missing
        own: tuple[nn.Module, ...] = ()
        if vae is not None:
            plain, clip = last_taps(vae), pixels.unsqueeze(2)
            calls["last taps, plain"] = lambda: encode_exact(plain, clip)
            calls["vae.encode, 1 frame"] = lambda: encode_exact(vae, clip)
            own = vae.encoder, vae.quant_conv
        yield from compare(context, calls, wanted, encoder, own, (graph, CAPTURED))

    return Step(run, limit_s=50)


def whole_clip_step(size: Size) -> Step:
    """One frame folded, against the VAE's own encode of 17 and of 81: as diffusers encodes."""

    def run(context: Context) -> Iterator[Result]:
        pixels = frame(context, size, SEED)
        wanted = make_encoder(context, dtype=torch.float64)(pixels.double())
        encoder, vae = make_encoder(context), reference_vae(context)
        calls: Calls = {FUSED: lambda: encoder(pixels)}
        graph = graphed(context, calls, encoder, pixels)
        for frames in (5, 9) if context.dry_run else (17, 81):
            clip = frame(context, size, SEED, frames)
            clip[:, :, 0] = pixels
            calls[f"vae.encode, {frames} frames"] = lambda x=clip: encode_exact(vae, x)
        own = vae.encoder, vae.quant_conv
        yield from compare(context, calls, wanted, encoder, own, (graph,), warmup=1, least=3)

    return Step(run, limit_s=60)


def clip_step(frames: int) -> Step:
    """A clip through `ClipEncoder`, against the VAE's own encode of it."""

    def run(context: Context) -> Iterator[Result]:
        clip = frame(context, SIZES[0], SEED, frames)
        wanted = make_clip_encoder(context, torch.float64)(clip.double())
        encoder = make_clip_encoder(context)
        calls: Calls = {f"ClipEncoder, {frames} frames": lambda: encoder(clip)}
        graph = graphed(context, calls, encoder, clip)
        vae, missing = own_vae(context)
        yield missing
        own: tuple[nn.Module, ...] = ()
        if vae is not None:
            calls[f"vae.encode, {frames} frames"] = lambda: encode_exact(vae, clip)
            own = vae.encoder, vae.quant_conv
        yield from compare(context, calls, wanted, encoder, own, (graph,), seconds=2)

    return Step(run, limit_s=40)


def compiled(context: Context) -> Iterator[Result]:
    """One frame at the smaller size through torch.compile, which takes longest of all steps."""
    pixels = frame(context, SIZES[0], SEED)
    wanted = make_encoder(context, dtype=torch.float64)(pixels.double())
    encoder = make_encoder(context)
    compiled_encoder = torch.compile(encoder, mode="reduce-overhead")
    calls: Calls = {FUSED: lambda: encoder(pixels)}
    graph = graphed(context, calls, encoder, pixels)
    name = "folded, fused kernels, reduce-overhead"
    calls[name] = lambda: compiled_encoder(pixels)
    yield from compare(context, calls, wanted, encoder, (), (graph, name))


def decoder_step(size: Size) -> Step:
    """One latent frame to pixels: folded, in a graph, the VAE's own decode and its last taps."""

    def run(context: Context) -> Iterator[Result]:
        latents = size.latents(context, SEED)[0]
        wanted = make_decoder(context, torch.float64).decode_unnormalized(latents.double())
        decoder = make_decoder(context)
        calls: Calls = {FUSED: lambda: decoder.decode_unnormalized(latents)}
        graph = graphed(context, calls, decoder.decode_unnormalized, latents)
        vae, missing = own_vae(context, full_decoder=True)
        yield missing
        own: tuple[nn.Module, ...] = ()
        if vae is not None:
            plain = last_taps(vae)
            calls["last taps, plain"] = lambda: decode_sample(plain, latents)
            calls["vae.decode, 1 frame"] = lambda: decode_sample(vae, latents)
            own = vae.decoder, vae.post_quant_conv
        yield from compare(context, calls, wanted, decoder, own, (graph,))

    return Step(run, limit_s=60)
