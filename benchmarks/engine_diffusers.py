"""diffusers' Cosmos3 latent preparation before and after: the real pipeline, on a CPU.

The VAE has Cosmos3's topology and full width with seeded random weights; the transformer, which
takes no part, is tiny. Needs the environment of `make test-diffusers`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from harness import gate_equal, gate_error, machine, measure, table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cosmos3_fast.engines.diffusers import accelerate, last_encoding, restore
from cosmos3_fast.vae.synthetic import COSMOS3_VAE_CONFIG, synthetic_vae

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "engines" / "diffusers"))

import tiny_pipeline  # noqa: E402

# DESIGN's bound of the folded encoder in float32, relative to the largest value.
FAST_BOUND = 1e-5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--height", type=int, default=256)
    parser.add_argument("--width", type=int, default=448)
    parser.add_argument("--num-frames", type=int, default=17)
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds (default 3)")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    args = parser.parse_args()
    if args.num_frames < 9:
        parser.error("--num-frames must be at least 9: V2V conditions on 5 of them")

    vae = synthetic_vae(COSMOS3_VAE_CONFIG, seed=0)
    pipe = tiny_pipeline.make_pipe(vae=vae)
    generator = torch.Generator().manual_seed(0)
    clip = torch.rand(args.num_frames, 3, args.height, args.width, generator=generator)
    size = {"height": args.height, "width": args.width, "num_frames": args.num_frames}
    requests: dict[str, dict[str, Any]] = {
        "T2V": {},
        "I2V": {"image": clip[0]},
        "V2V": {"video": clip},
    }

    rows: list[dict[str, Any]] = []
    for kind, request in requests.items():
        # Text encodes nothing and clips are exact in either mode.
        modes = ["unpatched", "exact", "fast"] if kind == "I2V" else ["unpatched", "exact"]

        def prepare(mode: str, request: dict[str, Any] = request) -> tuple[Any, ...]:
            if mode == "unpatched":
                restore(pipe)
            else:
                accelerate(pipe, mode)
            with torch.no_grad():
                return pipe.prepare_latents(
                    **request, **size, generator=torch.Generator().manual_seed(0),
                    device="cpu", dtype=torch.float32,
                )  # fmt: skip

        print(f"{kind}: correctness gate ...", file=sys.stderr)
        prepare(modes[-1])
        counted = {mode: count(pipe, mode, prepare) for mode in modes}
        for mode in modes[1:]:
            gate(f"{kind}, {mode}", mode, counted[mode][0], counted["unpatched"][0])
        timings = measure(
            {mode: lambda mode=mode: prepare(mode) for mode in modes},
            rounds=args.rounds,
            warmup=0,  # the gate was one
            progress=True,
        )
        for mode in modes:
            _, frames, flops = counted[mode]
            rows.append(
                {
                    "request": kind,
                    "mode": mode,
                    "pixel_frames_encoded": frames,
                    "tflop": flops / 1e12,
                    "seconds": list(timings[mode].seconds),
                    "median_s": timings[mode].median,
                    "ratio": timings["unpatched"].median / timings[mode].median,
                }
            )
    report(rows, args)
    return 0


def count(
    pipe: Any, mode: str, prepare: Callable[[str], tuple[Any, ...]]
) -> tuple[tuple[Any, ...], int, int]:
    """What `prepare` returns, the pixel frames it encodes and its FLOPs.

    A pixel frame counts whichever encoder it goes through.
    """
    with (
        tiny_pipeline.counting(pipe.vae) as seen,
        FlopCounterMode(display=False) as counter,
    ):
        result = prepare(mode)
    frames = sum(seen)
    encoding = last_encoding(pipe)
    if encoding is not None and encoding.path == "fast":
        frames += encoding.pixel_frames
    return result, frames, counter.get_total_flops()


def gate(name: str, mode: str, ours: tuple[Any, ...], reference: tuple[Any, ...]) -> None:
    """Equal in every output but for what the folded encoder made, which is within its bound."""
    for i, (mine, theirs) in enumerate(zip(ours, reference, strict=True)):
        if not isinstance(theirs, Tensor):
            if mine != theirs:
                raise SystemExit(f"correctness gate failed: {name}: output {i} differs")
        elif i == 0 and mode == "fast":
            gate_error(f"{name}: latent frame 0", mine[:, :, :1], theirs[:, :, :1], FAST_BOUND)
            gate_equal(f"{name}: other latents", mine[:, :, 1:], theirs[:, :, 1:])
        else:
            gate_equal(f"{name}: output {i}", mine, theirs)


def report(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    size = f"{args.width}x{args.height}, {args.num_frames} frames"
    print(
        f"\nCosmos3OmniPipeline.prepare_latents of diffusers {diffusers.__version__}, {size}, "
        f"fp32 VAE, {args.rounds} interleaved rounds, medians\n{machine()}\n"
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
    print(table(["prepare_latents", "pixel frames", "TFLOP", "median", "range", "ratio"], cells))
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        figures = {
            "diffusers": diffusers.__version__,
            "height": args.height,
            "width": args.width,
            "num_frames": args.num_frames,
            "vae_dtype": "float32",
            "machine": machine(),
            "rows": rows,
        }
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
