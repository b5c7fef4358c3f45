"""Steps of the GPU campaign about clips: errors, times, memory, kernels of all that decode them."""

from __future__ import annotations

import copy
import functools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from benchmarks.cases import SEED, channels_last
from benchmarks.gpu import cases
from benchmarks.gpu.cases import (
    BF16,
    Size,
    check_error,
    config,
    decoder_config,
    frame,
    make_clip_decoder,
    make_clip_encoder,
    reference_vae,
)
from benchmarks.gpu.device import (
    Context,
    Result,
    Skipped,
    Step,
    figure,
    kernel_times,
    median_s,
    peak_memory,
    time_calls,
)
from benchmarks.gpu.networks import own_vae, with_rates
from benchmarks.harness import GateError, count_flops, cuda_clock, measure, synchronize, tuned
from cosmos3_fast.ops.transform_frames import FrameArguments, transformed_bytes
from cosmos3_fast.vae.live.exact import decode_sample, encode_exact
from cosmos3_fast.vae.verify import rms

OURS, DIRECT = "ClipDecoder", "ClipDecoder, direct taps"
PLAIN, LAST = "vae.decode", "vae.decode, channels_last_3d"
FASTVAE = "fastvae"
SMALL = Size(128, 224, 17)  # what is compared with float64
Decoder = Callable[[Tensor], Tensor]


# The clip networks that the steps ask for.
FORMS: tuple[dict[str, Any], ...] = ({}, {"direct": True}, {"dtype": torch.float16})


def weights(context: Context, forms: Sequence[dict[str, Any]] = FORMS) -> Iterator[Result]:
    """The random VAE, and the clip networks folded from it: made once, side by side, and kept."""
    start = time.perf_counter()
    for part, cfg in (("encoder", config(context)), ("decoder", decoder_config(context))):
        cases.weights(context, cfg, part)
    with ThreadPoolExecutor() as pool:
        made = [pool.submit(make_clip_decoder, context, **form) for form in forms]
        for each in made:
            each.result()
    yield {"seconds": time.perf_counter() - start}


def decoders(context: Context, *names: str) -> tuple[dict[str, Decoder], Result]:
    """Latents on the VAE's scale [1, 48, T, h, w] to pixels, this package's first.

    Args:
        names: which; the others are not made.

    Returns:
        By name; and why some are missing.
    """
    found: dict[str, Decoder] = {OURS: make_clip_decoder(context).decode_unnormalized}
    if DIRECT in names:
        found[DIRECT] = make_clip_decoder(context, direct=True).decode_unnormalized
    vae, missing = own_vae(context, full_decoder=True)
    if vae is None:
        return found, missing
    if PLAIN in names:
        found[PLAIN] = functools.partial(decode_sample, vae)
    if LAST in names:
        found[LAST] = functools.partial(decode_sample, channels_last(vae))
    if FASTVAE in names:
        try:
            import fastvae
        except ImportError as error:
            missing[FASTVAE] = {"skipped": f"{error}: give its wheel with --wheels"}
        else:
            # What its `accelerate_vae` puts in the place of `vae.decode`.
            found[FASTVAE] = fastvae.FastVAEDecoder.from_vae(vae).to(context.device).decode
    return found, missing


def try_others(found: dict[str, Decoder], latents: Tensor) -> tuple[dict[str, Tensor], Result]:
    """What each decodes. Of the others one that fails is left out, and it is said why."""
    pixels, missing = {}, {}
    for name in list(found):
        try:
            pixels[name] = found[name](latents)
        except Exception as error:
            if name in (OURS, DIRECT):
                raise
            missing[name] = {"skipped": f"{type(error).__name__}: {error}"[:500]}
            del found[name]
    return pixels, missing


def small_latents(context: Context) -> Tensor:
    return SMALL.latents(context, SEED)[1]


def exact_pixels(context: Context, latents: Tensor) -> Tensor:
    """In float64, of the same weights: the VAE's; without diffusers those of direct taps."""
    try:
        vae = reference_vae(context, full_decoder=True).double()
    except Skipped:
        network = make_clip_decoder(context, torch.float64, direct=True)
        return network.decode_unnormalized(latents.double())
    return decode_sample(vae, latents.double())


def errors(ours: Tensor, exact: Tensor) -> Result:
    """rms errors over the clip's deviation: of all, by frame, of neighbours' differences."""
    difference, scale = ours.double() - exact, exact.std().item()
    by_frame = difference.movedim(2, 0)
    return {
        "clip": rms(difference) / scale,
        "frames": [rms(each) / scale for each in by_frame],
        "between neighbours": [rms(each) / scale for each in by_frame.diff(dim=0)],
    }


def above(ours: Result, own: Result) -> list[str]:
    """Where an error is larger than the VAE's own, or no number."""
    found = [] if ours["clip"] <= own["clip"] else ["clip"]
    for part in ("frames", "between neighbours"):
        pairs = enumerate(zip(ours[part], own[part], strict=True))
        found += [f"{part} {i}" for i, (a, b) in pairs if not a <= b]
    return found


def gate(context: Context, found: dict[str, Decoder]) -> Iterator[Result]:
    """A small clip against float64: none is far, this package's no further than the VAE's own."""
    latents = small_latents(context)
    exact = exact_pixels(context, latents)
    pixels, missing = try_others(found, latents)
    yield missing
    told = {name: errors(each, exact)["clip"] for name, each in pixels.items()}
    yield {"small clip, rms error over standard deviation": told}
    for name, each in pixels.items():
        check_error(name, each, exact)
    for name in (OURS, DIRECT):
        if name in told and not told[name] <= told.get(PLAIN, float("inf")):
            raise GateError(f"{name}: error {told[name]:.2e}, the VAE's own {told[PLAIN]:.2e}")


def decode_step(size: Size, rounds: int, limit_s: float, *names: str) -> Step:
    """A clip through all of `names` in turns, then the kernels of ours, then everyone's memory."""

    def run(context: Context) -> Iterator[Result]:
        found, missing = decoders(context, *names)
        yield missing
        yield from gate(context, found)
        latents = size.latents(context, SEED)[1]
        operations: dict[str, int] = {}
        with tuned():
            for name in list(found):
                # cuDNN looks for its plans, Triton compiles; operations are counted.
                start = time.perf_counter()
                counted = {name: lambda z, f=found[name]: count_flops(lambda: f(z))}
                results, missing = try_others(counted, latents)
                synchronize()
                yield missing
                if name not in results:
                    del found[name]
                    continue
                operations[name] = results.pop(name)[1]
                yield {"first call, s": {name: time.perf_counter() - start}}
            calls = {name: functools.partial(f, latents) for name, f in found.items()}
            for timed in in_rounds(context, calls, rounds):
                yield with_rates(context, timed, operations)
            yield {"kernels": kernel_times(context, calls[OURS], 1)}
            for name, call in calls.items():
                yield {"memory": {name: peak_memory(context, call)}}
        if context.dry_run:
            return
        yield {"ratios": {name: median_s(timed[name]) / median_s(timed[OURS]) for name in timed}}

    return Step(run, limit_s)


def in_rounds(
    context: Context, calls: dict[str, Callable[[], Tensor]], rounds: int
) -> Iterator[dict[str, Any]]:
    """Figures of interleaved rounds so far, after each: a clip takes seconds."""
    if context.dry_run:
        yield time_calls(context, calls)
        return
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    clock = cuda_clock(flush=False)
    for i in range(rounds):
        order = dict(list(calls.items())[:: 1 if i % 2 == 0 else -1])
        for name, timing in measure(order, rounds=1, warmup=0, clock=clock).items():
            seconds[name] += timing.seconds
        yield {name: figure(each) for name, each in seconds.items()}


def numerics(context: Context) -> Iterator[Result]:
    """16 bits against float64 of the same weights, by frame: a small clip both ways.

    The VAE's own error in the same dtype, on the same device, bounds each.
    """
    latents, faults = small_latents(context), []
    exact = exact_pixels(context, latents)
    vae, missing = own_vae(context, full_decoder=True)
    yield missing
    own: dict[torch.dtype, Result] = {}
    for dtype in (BF16, torch.float16) if vae is not None else ():
        rounded = copy.deepcopy(vae).to(dtype)
        own[dtype] = errors(decode_sample(rounded, latents.to(dtype)), exact)
        yield {f"vae.decode, {dtype}": own[dtype]}
    for options in FORMS:
        network = make_clip_decoder(context, **options)
        name, bound = f"ClipDecoder, {options}", own.get(network.dtype)
        of_ours = errors(network.decode_unnormalized(latents.to(network.dtype)), exact)
        yield {name: of_ours}
        faults += [f"{name}: {each}" for each in above(of_ours, bound or of_ours)]
        del network
    del exact

    clip = frame(context, SMALL, SEED, SMALL.on(context).num_frames)
    wanted = make_clip_encoder(context, torch.float64)(clip.double())
    for dtype in (BF16, torch.float16):
        of_ours = errors(make_clip_encoder(context, dtype)(clip.to(dtype)), wanted)
        yield {f"ClipEncoder, {dtype}": of_ours}
        if vae is not None:
            rounded = copy.deepcopy(vae).to(dtype)
            theirs = errors(encode_exact(rounded, clip.to(dtype)), wanted)
            yield {f"vae.encode, {dtype}": theirs}
            faults += [f"ClipEncoder, {dtype}: {each}" for each in above(of_ours, theirs)]
    yield {"above the VAE's own": faults}
    if faults and not context.dry_run:  # a narrow network on a CPU says nothing here
        raise RuntimeError(f"{len(faults)} errors above the VAE's own: {'; '.join(faults)}"[:500])


class Recorder(TorchFunctionMode):
    """Counts the calls of `transform_frames` inside the block, by their arguments without values.

    Attributes:
        called: how often, by `spelled`.
        given: the arguments, by `spelled`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.called: Counter[str] = Counter()
        self.given: dict[str, FrameArguments] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.cosmos3.transform_frames.default:
            given = tree_map_only(Tensor, lambda x: x.to("meta"), FrameArguments(*args))
            self.called[spelled(given)] += 1
            self.given[spelled(given)] = given
        return func(*args, **(kwargs or {}))


def transforms(context: Context) -> Iterator[Result]:
    """`transform_frames` alone, as a decode of a clip calls it, against the copy's bandwidth."""
    latents = Size(480, 832, 81).latents(context, SEED)[1]
    with Recorder() as recorder:
        make_clip_decoder(context).decode_unnormalized(latents)
    called, given = recorder.called, recorder.given
    copy_rate, total = context.ceiling("copy_bytes_per_s"), 0.0
    for name in sorted(called, key=lambda name: -called[name] * bytes_of(given[name])):
        moved = bytes_of(given[name])
        arguments = tree_map_only(
            Tensor, lambda x: torch.randn_like(x, device=context.device), given[name]
        )
        call = functools.partial(torch.ops.cosmos3.transform_frames, *arguments)
        told = time_calls(context, {"call": call}, seconds=0.2, most=30)["call"]
        yield {name: {"calls of a decode": called[name], "bytes": moved, "call": told}}
        if context.dry_run:
            continue
        rate = moved / median_s(told)
        total += called[name] * median_s(told)
        share = rate / copy_rate if copy_rate else None
        yield {name: {"bytes_per_s": rate, "share_of_copy_bandwidth": share}}
        yield {"seconds of a decode, so far": total}


def spelled(given: FrameArguments) -> str:
    """The arguments in words."""
    first = given.first
    parts = [f"{len(given.products)} of {list(first.shape)} {first.dtype}, {given.frames} frames"]
    for name, usual in FrameArguments._field_defaults.items():
        value = getattr(given, name)
        if isinstance(value, Tensor):
            parts.append(name)
        elif name == "to" or (name != "scales" and value != usual):
            parts.append(f"{name}={value}")
    return ", ".join(parts).replace("torch.", "")


def bytes_of(given: FrameArguments) -> int:
    """`transformed_bytes` of a call's arguments."""
    return transformed_bytes(
        len(given.products),
        given.to,
        given.frames,
        math.prod(given.image),
        product_size=given.first.dtype.itemsize,
        sum_size=given.dtype_of_sum.itemsize,
        frames_size=given.dtype_of_frames.itemsize,
        residual=given.residual is not None,
        keep_sum=given.keep_sum,
        past=given.past is not None,
    )


USUAL = decode_step(Size(480, 832, 81), 4, 150, DIRECT, PLAIN, LAST, FASTVAE)
AGAIN = decode_step(Size(480, 832, 81), 3, 90, PLAIN)
LARGE = decode_step(Size(720, 1280, 189), 2, 90, PLAIN)
