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

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from benchmarks.harness import GateError, Row, count_flops, machine, measure
from benchmarks.report import engine_lines
from cosmos3_fast.vae import FrameEncoder

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
        with encoded_frames(vae) as (own, folded):
            results[mode], operations = count_flops(run)
        if mode == UNPATCHED and folded:
            raise GateError(f"{request}: the unpatched engine's VAE is accelerated")
        frames[mode], tflop[mode] = sum(own + folded), operations / 1e12
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

    # A hook of torch's, for all modules: a VAE with one of its own would run its own code.
    def called(module: nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(module, FrameEncoder):
            folded.append(1)
        elif isinstance(module, type(vae.encoder)):
            own.append(args[0].shape[2])

    handle = register_module_forward_pre_hook(called)
    try:
        yield own, folded
    finally:
        handle.remove()


def report(package: str, rows: list[Row], args: argparse.Namespace) -> None:
    """Print the rows' table; with --json also write the figures."""
    figures = {
        "version": metadata.version(package),
        "height": args.height,
        "width": args.width,
        "num_frames": args.num_frames,
        "vae_dtype": "float32",
        "machine": machine(),
        "rows": rows,
    }
    print(f"{figures['machine']}, {args.rounds} interleaved rounds")
    print("\n".join(engine_lines({package: figures})))
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
