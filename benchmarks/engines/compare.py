"""What the engines' scripts share: the command line, what is counted and timed, the report."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.cases import seeded_clip
from benchmarks.harness import GateError, Row, count_flops, gate_error, machine, measure
from benchmarks.report import engine_lines
from cosmos3_fast.engines.selftest import frames_through
from cosmos3_fast.frames import latent_frames
from cosmos3_fast.vae.live.exact import decode_sample

UNPATCHED = "unpatched"
DECODED_FRAMES = 9


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
    vaes: Mapping[str, Any],
    gate: Callable[[str, str, Any, Any], None],
    rounds: int,
) -> list[Row]:
    """Gate, count and time one request; a row per mode.

    Args:
        request: its name.
        paths: mode to call, `UNPATCHED` first.
        vaes: the engine's, by mode.
        gate: called with a name, a mode and the results of that mode and of the unpatched engine;
            aborts where they differ by more than the mode allows.
        rounds: timed calls of each mode.
    """
    print(f"{request}: correctness gate ...", file=sys.stderr)
    results, frames, tflop = {}, {}, {}
    for mode, run in paths.items():
        vae, folds = vaes[mode], mode.startswith("fast")
        if folds:
            run()  # the first call folds, and tries both on something tiny
        with (
            frames_through(vae.encoder.conv_in) as encoded,
            frames_through(vae.decoder.conv_in) as decoded,
            Folded() as folded,
        ):
            results[mode], operations = count_flops(run)
        by_own, by_folded = sum(encoded + decoded), folded.encoded + folded.decoded
        if (by_own or not by_folded) if folds else by_folded:
            raise GateError(
                f"{request}, {mode}: {by_own} frames went through the VAE's own networks, "
                f"{by_folded} through folded ones"
            )
        frames[mode], tflop[mode] = sum(encoded) + folded.encoded, operations / 1e12
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


def compare_decodes(vaes: Mapping[str, Any], args: argparse.Namespace) -> list[Row]:
    """Rows of the decode of a few frames, half as high and as wide as the encoded ones.

    Args:
        vaes: the engine's VAE by mode, `UNPATCHED` first.
        args: of the command line.
    """
    height, width = (side // 32 * 16 for side in (args.height, args.width))
    size = f"{height}x{width}"
    latents = seeded_clip(48, latent_frames(DECODED_FRAMES), size, 16)

    def run(mode: str) -> Tensor:
        with torch.inference_mode():
            return decode_sample(vaes[mode], latents)

    def gate(name: str, mode: str, ours: Tensor, reference: Tensor) -> None:
        gate_error(name, ours, reference)

    paths = {mode: lambda mode=mode: run(mode) for mode in vaes}
    request = f"decode {DECODED_FRAMES} frames of {size.replace('x', '×')}"
    return compare(request, paths, vaes, gate, args.rounds)


class Folded(TorchDispatchMode):
    """Counts the pixel frames that folded networks encode, and those that they decode.

    Without hooks: with one, a VAE would run its own code.
    """

    def __init__(self) -> None:
        super().__init__()
        self.encoded, self.decoded = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.cosmos3.pack_pixels.default:
            self.encoded += args[0].shape[0]
        elif func is torch.ops.cosmos3.unpack_pixels.default:
            self.decoded += args[0].shape[0]
        return func(*args, **(kwargs or {}))


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
