"""Steps of the GPU campaign that measure the folded networks and their attention."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu.cases import (
    SIZES,
    Graphed,
    Size,
    check_error,
    frame,
    make_clip_encoder,
    make_decoder,
    make_encoder,
    reference_vae,
    rms_error,
    tolerance,
)
from benchmarks.gpu.timing import (
    Call,
    Context,
    Result,
    Skipped,
    Step,
    count_flops,
    kernel_times,
    launches,
    median_s,
    peak_bytes,
    resident_bytes,
    time_calls,
    tuned,
)
from benchmarks.harness import GateError
from benchmarks.paths import SEED, unfused
from benchmarks.suites.decoder import plain
from cosmos3_fast.vae import FrameEncoder
from cosmos3_fast.vae.live.exact import decode_sample, encode_exact
from cosmos3_fast.vae.networks.layers import attend

BF16 = torch.bfloat16
# One image of Qwen-Image's usual size, beside the videos' sizes.
DECODED = (*SIZES, Size(1024, 1024, 1))


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


def convolutions_alone(
    context: Context, encoder: nn.Module, pixels: Tensor, plans: int = 10
) -> Result:
    """Each distinct convolution of the encoder without its bias, tuned, and their sum: what fusion
    cannot beat. `plans`: see `tuned`."""
    with _Convolutions() as convolutions:
        encoder(pixels)
    with tuned(plans):
        timed = time_calls(context, convolutions.calls, seconds=2)
    counts = dict(convolutions.counts)
    if context.dry_run:
        return {"each": timed}
    total = sum(timed[name]["median_us"] * counts[name] for name in timed)
    return {"each": timed, "times": counts, "sum_of_medians_us": total}


def _memory(
    context: Context,
    network: nn.Module,
    own: tuple[nn.Module, ...] | None,
    calls: Mapping[str, Call],
) -> Result:
    """Resident bytes of the folded network and of the VAE's own modules, and the calls' peaks."""
    return {
        "folded, resident bytes": resident_bytes(network),
        "the VAE's own, resident bytes": None if own is None else sum(map(resident_bytes, own)),
        "peak bytes of a call": {
            name: peak_bytes(context, call) for name, call in calls.items() if "graph" not in name
        },
    }


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
        check_error(name, call(), self.wanted)
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
    """One frame folded, fused and in a graph, against the VAE's own encode of it.

    The convolutions of every path are tuned by cuDNN, the VAE's too.
    """

    def run(context: Context) -> Iterator[Result]:
        with tuned():
            made = _encoder_paths(context, size)
        encoder, vae, pixels = made.encoder, made.vae, made.pixels
        paths, operations = made.calls, made.operations
        if vae is None:
            yield {"vae.encode": {"skipped": "diffusers cannot be imported: see --wheels"}}
        graph = "folded, fused kernels, CUDA graph"
        if context.dry_run:
            yield {graph: {"skipped": "dry run: CUDA only"}}
        else:
            graphed = functools.partial(Graphed(encoder), pixels)
            made.add(graph, graphed, operations["folded, fused kernels"])
        with tuned():
            timed = time_calls(context, paths, seconds=4)
        yield _with_rates(context, timed, operations)
        yield {"launches": {name: launches(context, path) for name, path in paths.items()}}
        with tuned():
            yield {"kernels": kernel_times(context, paths["folded, fused kernels"])}
        own = None if vae is None else (vae.encoder, vae.quant_conv)
        yield {"memory": _memory(context, encoder, own, paths)}
        yield {"convolutions alone": convolutions_alone(context, encoder, pixels)}

    return Step(run, limit_s=50)


def whole_clip_step(size: Size) -> Step:
    """One frame folded, against the VAE's own encode of 17 and of 81: as diffusers encodes."""

    def run(context: Context) -> Iterator[Result]:
        pixels = frame(context, size, SEED)
        encoder, vae = make_encoder(context), reference_vae(context)
        paths: dict[str, Call] = {"folded, fused kernels": lambda: encoder(pixels)}
        operations = {"folded, fused kernels": count_flops(lambda: encoder(pixels))[1]}
        peaks = {}
        with tuned():
            for frames in (5, 9) if context.dry_run else (17, 81):
                clip = frame(context, size, SEED, frames)
                clip[:, :, 0] = pixels
                name = f"vae.encode, {frames} frames"
                path = functools.partial(encode_exact, vae, clip)
                latents, operations[name] = count_flops(path)
                check_error(name, encoder(pixels), latents[:, :, :1])
                paths[name] = path
                peaks[name] = peak_bytes(context, path)
            timed = time_calls(context, paths, seconds=4, warmup=1, least=3)
        yield _with_rates(context, timed, operations)
        yield {"peak bytes of a call": peaks}

    return Step(run, limit_s=60)


def compiled(context: Context) -> Iterator[Result]:
    """One frame at the smaller size through torch.compile, which takes longest of all steps."""
    with tuned():
        made = _encoder_paths(context, SIZES[0])
        operations = made.operations["folded, fused kernels"]
        graphed = functools.partial(Graphed(made.encoder), made.pixels)
        made.add("folded, fused kernels, CUDA graph", graphed, operations)
        for name, wrap in (("fused kernels", lambda call: call), ("unfused", unfused_call)):
            encoder = torch.compile(made.encoder, mode="reduce-overhead")
            call = functools.partial(wrap(encoder), made.pixels)
            made.add(f"folded, {name}, reduce-overhead", call, operations)
        yield _with_rates(context, time_calls(context, made.calls), made.operations)


def every_plan(context: Context) -> Iterator[Result]:
    """The encoder at the smaller size where cuDNN may try all its plans, not torch's ten.

    In a process of its own, because what cuDNN has chosen for a shape stays with it.
    """
    encoder, pixels = make_encoder(context), frame(context, SIZES[0], SEED)
    wanted = make_encoder(context, dtype=torch.float64)(pixels.double())
    calls: dict[str, Callable[[], Tensor]] = {"folded, fused kernels": lambda: encoder(pixels)}
    with tuned(plans=0):
        if not context.dry_run:
            graphed = functools.partial(Graphed(encoder), pixels)
            calls["folded, fused kernels, CUDA graph"] = graphed
        for name, call in calls.items():
            check_error(name, call(), wanted)
        yield time_calls(context, calls, seconds=1)
        yield {"kernels": kernel_times(context, calls["folded, fused kernels"])}
    yield {"convolutions alone": convolutions_alone(context, encoder, pixels, plans=0)}


def decoder_step(size: Size) -> Step:
    """One latent frame to pixels: the last taps, the phases, a graph, and the VAE's own decode."""

    def run(context: Context) -> Iterator[Result]:
        latents = latent_frame(context, size)
        decoder = make_decoder(context)
        wanted = make_decoder(context, dtype=torch.float64).decode_unnormalized(latents.double())

        def plainly() -> Tensor:
            with plain():
                return decoder.decode_unnormalized(latents)

        calls: dict[str, Callable[[], Tensor]] = {
            "last taps, plain": plainly,
            "folded, fused kernels": lambda: decoder.decode_unnormalized(latents),
        }
        if context.dry_run:
            yield {"folded, fused kernels, CUDA graph": {"skipped": "dry run: CUDA only"}}
        else:
            graphed = Graphed(decoder.decode_unnormalized)
            calls["folded, fused kernels, CUDA graph"] = lambda: graphed(latents)
        vae = None
        try:
            vae = reference_vae(context, full_decoder=True)
            calls["vae.decode, 1 frame"] = lambda: decode_sample(vae, latents)
        except Skipped as skipped:
            yield {"vae.decode, 1 frame": {"skipped": str(skipped)}}
        _, operations = count_flops(calls["folded, fused kernels"])
        counted = dict.fromkeys(calls, operations)
        errors = {}
        with tuned():
            for name, call in calls.items():
                got = call()
                errors[name] = rms_error(got, wanted)
                check_error(name, got, wanted)
            del wanted, got
            for name in ("last taps, plain", "vae.decode, 1 frame"):
                if name in calls:
                    counted[name] = count_flops(calls[name])[1]
            yield {"rms error over standard deviation": errors}
            timed = time_calls(context, calls, seconds=4)
            yield _with_rates(context, timed, counted)
            yield {"kernels": kernel_times(context, calls["folded, fused kernels"])}
        yield {"launches": {name: launches(context, call) for name, call in calls.items()}}
        own = None if vae is None else (vae.decoder, vae.post_quant_conv)
        yield {"memory": _memory(context, decoder, own, calls)}

    return Step(run, limit_s=60)


def latent_frame(context: Context, size: Size) -> Tensor:
    """Seeded noise [1, 48, 1, H/16, W/16] on the VAE's own scale."""
    return size.latents(context, SEED)[0]


def clips(context: Context) -> Iterator[Result]:
    """Five and nine frames through `ClipEncoder`, against the VAE's own encode of the same."""
    encoder = make_clip_encoder(context)
    try:
        vae = reference_vae(context)
    except Skipped as skipped:
        vae = None
        yield {"vae.encode": {"skipped": str(skipped)}}
    for frames in (5, 9):
        clip = frame(context, SIZES[0], SEED, frames)
        calls: dict[str, Callable[[], Tensor]] = {
            f"ClipEncoder, {frames} frames": lambda clip=clip: encoder(clip)
        }
        if vae is not None:
            calls[f"vae.encode, {frames} frames"] = lambda clip=clip: encode_exact(vae, clip)
        if not context.dry_run:
            graphed = Graphed(encoder)
            calls[f"ClipEncoder, {frames} frames, CUDA graph"] = lambda clip=clip, g=graphed: g(
                clip
            )
        with tuned():
            results = {name: call() for name, call in calls.items()}
            ours = results.pop(f"ClipEncoder, {frames} frames")
            for name, other in results.items():
                if not (error := rms_error(ours, other)) <= 2 * tolerance(BF16):
                    raise GateError(f"{name}: rms of the difference {error:.2e}")
            operations = {name: count_flops(call)[1] for name, call in calls.items()}
            for name in calls:
                if "graph" in name:
                    operations[name] = operations[f"ClipEncoder, {frames} frames"]
            timed = time_calls(context, calls, seconds=2)
        yield _with_rates(context, timed, operations)
        yield {"launches": {name: launches(context, call) for name, call in calls.items()}}


def attention(context: Context) -> Iterator[Result]:
    """The single head of encoder (640 channels) and decoder (1024), by what torch can choose."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def by(backend: SDPBackend, *qkv: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*qkv)

    for channels, size in ((640, SIZES[0]), (640, SIZES[1]), (1024, DECODED[-1])):
        on = size.on(context)
        tokens = on.height // 16 * (on.width // 16)
        generator = torch.Generator(context.device).manual_seed(SEED)
        qkv = torch.randn(
            (1, tokens, 3 * channels), generator=generator, device=context.device, dtype=BF16
        )
        q, k, v = qkv.unsqueeze(1).chunk(3, dim=-1)
        wanted = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
        calls: dict[str, Callable[[], Tensor]] = {
            "torch's choice": functools.partial(F.scaled_dot_product_attention, q, k, v),
            "layers.attend": functools.partial(attend, q * channels**-0.5, k, v),
            **{
                backend.name: functools.partial(by, backend, q, k, v)
                for backend in (
                    SDPBackend.FLASH_ATTENTION,
                    SDPBackend.EFFICIENT_ATTENTION,
                    SDPBackend.CUDNN_ATTENTION,
                    SDPBackend.MATH,
                )
            },
        }
        name = f"{channels} channels, {tokens} tokens"
        errors: dict[str, Any] = {}
        for variant in list(calls):
            try:
                errors[variant] = rms_error(calls[variant](), wanted)
            except RuntimeError as error:
                errors[variant] = {"refused": str(error).splitlines()[0][:200]}
                del calls[variant]
        operations = dict.fromkeys(calls, 4 * tokens**2 * channels)
        timed = time_calls(context, calls, seconds=1)
        yield {name: _with_rates(context, timed, operations)}
        yield {name: {"rms error over standard deviation": errors}}
        counted = {variant: launches(context, call) for variant, call in calls.items()}
        yield {name: {"launches": counted}}


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
        paths["folded, fused kernels, CUDA graph"] = Graphed(encoder)
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
