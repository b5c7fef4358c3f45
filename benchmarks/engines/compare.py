"""What the engines' scripts share: the command line, what is counted and timed, the report."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.formatting import table
from benchmarks.harness import GateError, machine, measure
from cosmos3_fast.vae import FrameEncoder

Row = dict[str, Any]
UNPATCHED = "unpatched"


def arguments(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--height", type=int, default=256)
    parser.add_argument("--width", type=int, default=448)
    parser.add_argument("--num-frames", type=int, default=17)
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds (default 3)")
    parser.add_argument("--base-dim", type=int, help="width of the VAE (default Cosmos3's)")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    args = parser.parse_args()
    if args.num_frames < 9:
        parser.error("--num-frames must be at least 9: V2V conditions on 5 of them")
    return args


def compare(
    request: str,
    paths: Mapping[str, Callable[[], Any]],
    vae: Any,
    gate: Callable[[str, str, Any, Any], None],
    rounds: int,
) -> list[Row]:
    """Gate, count and time one request; a row per mode.

    Args:
        request: its name.
        paths: mode to call, `UNPATCHED` first.
        vae: the engine's, whose encoder is watched.
        gate: called with a name, a mode and the results of that mode and of the unpatched engine;
            aborts where they differ by more than the mode allows.
        rounds: timed calls of each mode.
    """
    print(f"{request}: correctness gate ...", file=sys.stderr)
    results, frames, tflop = {}, {}, {}
    for mode, run in paths.items():
        with encoded_frames(vae) as (own, folded), flop_counter() as counter:
            results[mode] = run()
        if mode == UNPATCHED and folded:
            raise GateError(f"{request}: the unpatched engine's VAE is accelerated")
        frames[mode], tflop[mode] = sum(own + folded), counter.get_total_flops() / 1e12
        if mode != UNPATCHED:
            gate(f"{request}, {mode}", mode, results[mode], results[UNPATCHED])
    timings = measure(paths, rounds=rounds, warmup=0, progress=True)  # the gate was a warm-up
    return [
        {
            "request": request,
            "mode": mode,
            "pixel_frames_encoded": frames[mode],
            "tflop": tflop[mode],
            "seconds": list(timings[mode].seconds),
            "median_s": timings[mode].median,
            "ratio": timings[UNPATCHED].median / timings[mode].median,
        }
        for mode in paths
    ]


@contextmanager
def encoded_frames(vae: Any) -> Iterator[tuple[list[int], list[int]]]:
    """The pixel frames that go through the VAE's own and the folded encoder inside the block."""
    own: list[int] = []
    folded: list[int] = []
    forward = FrameEncoder.forward

    # Not by a hook: an accelerated VAE with one runs its own code.
    own_class: Any = type(vae.encoder)
    own_forward = own_class.forward

    def through_vae(module: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        own.append(x.shape[2])
        return own_forward(module, x, *args, **kwargs)

    def through_fold(encoder: FrameEncoder, pixels: Tensor) -> Tensor:
        folded.append(1)
        return forward(encoder, pixels)

    own_class.forward = through_vae
    FrameEncoder.forward = through_fold  # type: ignore[method-assign]
    try:
        yield own, folded
    finally:
        FrameEncoder.forward = forward  # type: ignore[method-assign]
        own_class.forward = own_forward


def flop_counter() -> FlopCounterMode:
    """Counts a Winograd convolution as the direct one that it replaces."""

    def winograd(x: torch.Size, weight: torch.Size, *rest: Any, **out: torch.Size) -> int:
        batch, channels, height, width = x
        return 2 * 9 * batch * channels * out["out_shape"][1] * height * width

    op = torch.ops.cosmos3.winograd_conv3x3
    return FlopCounterMode(display=False, custom_mapping={op: winograd})


def report(package: str, stage: str, rows: list[Row], args: argparse.Namespace) -> None:
    """Print the rows; with --json also write them."""
    version = metadata.version(package)
    size = f"{args.width}x{args.height}, {args.num_frames} frames"
    print(
        f"\n{stage} of {package} {version}, {size}, fp32 VAE, {args.rounds} interleaved rounds, "
        f"medians\n{machine()}\n"
    )
    cells = [
        [
            f"{row['request']} {row['mode']}",
            str(row["pixel_frames_encoded"]),
            f"{row['tflop']:.2f}",
            f"{row['median_s']:.2f} s",
            f"{min(row['seconds']):.2f}-{max(row['seconds']):.2f} s",
            f"{row['ratio']:.2f}x",
        ]
        for row in rows
    ]
    header = ("request", "pixel frames", "TFLOP", "median", "range", "ratio")
    print("\n".join(table(header, cells)))
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        figures = {
            "version": version,
            "height": args.height,
            "width": args.width,
            "num_frames": args.num_frames,
            "vae_dtype": "float32",
            "machine": machine(),
            "rows": rows,
        }
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
