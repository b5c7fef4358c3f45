"""SGLang's Cosmos3 latent preparation before and after: the real stage, on a CPU.

The VAE has Cosmos3's topology and full width with seeded random weights. SGLang's conditioning
cache is off: it is active only inside the engine's executor, which is not run here. Needs the
environment of `make test-sglang`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import gate_equal, gate_error, machine, measure, table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "engines" / "sglang"))

import sglang_stage  # noqa: E402

# The stage rounds its latents to bfloat16: half an ulp each, and what float32 adds.
FAST_BOUND = 2**-8 + 1e-5

Forward = Callable[..., Any]


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

    vae = sglang_stage.make_vae(torch.float32, base_dim=160)
    stage = sglang_stage.make_stage(vae)
    generator = torch.Generator().manual_seed(0)
    clip = torch.rand(1, 3, args.num_frames, args.height, args.width, generator=generator) * 2 - 1
    size = {"height": args.height, "width": args.width, "num_frames": args.num_frames}
    requests = {"I2V": {"image": clip[:, :, 0]}, "V2V": {"video": clip}}
    forwards = {
        "unpatched": sglang_stage.Cosmos3LatentPreparationStage.forward,
        "exact": patched_forward("exact"),
        "fast": patched_forward("fast"),
    }

    rows = []
    for kind, request in requests.items():
        # Clips are exact in fast mode too.
        modes = ["unpatched", "exact", "fast"] if kind == "I2V" else ["unpatched", "exact"]

        def prepare(mode: str, request: dict[str, Tensor] = request) -> Any:
            batch = sglang_stage.make_batch(**request, **size)
            with torch.inference_mode():
                return forwards[mode](stage, batch, sglang_stage.SERVER_ARGS)

        print(f"{kind}: correctness gate ...", file=sys.stderr)
        prepare(modes[-1])  # folds the encoder, which probes the VAE
        counted = {mode: count(stage, lambda mode=mode: prepare(mode)) for mode in modes}
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


def patched_forward(mode: str) -> Forward:
    """The stage's forward as SGLang's plugin registry leaves it in `mode`."""
    with sglang_stage.patched(mode):
        return sglang_stage.Cosmos3LatentPreparationStage.forward


def count(stage: Any, prepare: Callable[[], Any]) -> tuple[Any, int, int]:
    """The batch that `prepare` returns, the pixel frames it encodes and its FLOPs.

    A pixel frame counts whichever encoder it goes through.
    """
    from cosmos3_fast.vae import ConditioningEncoder

    folded: list[int] = []
    forward = ConditioningEncoder.forward

    def counting(encoder: ConditioningEncoder, pixels: Tensor) -> Tensor:
        folded.append(1)
        return forward(encoder, pixels)

    ConditioningEncoder.forward = counting  # type: ignore[method-assign]
    try:
        with (
            sglang_stage.pixel_frames_encoded(stage.vae) as seen,
            FlopCounterMode(display=False) as counter,
        ):
            batch = prepare()
    finally:
        ConditioningEncoder.forward = forward  # type: ignore[method-assign]
    return batch, sum(seen) + sum(folded), counter.get_total_flops()


def gate(name: str, mode: str, ours: Any, reference: Any) -> None:
    """Equal but for what the folded encoder made, which is within `FAST_BOUND`."""
    gate_equal(f"{name}: mask", ours.extra["velocity_mask"], reference.extra["velocity_mask"])
    for label, mine, theirs in (
        ("latents", ours.latents, reference.latents),
        ("condition", ours.extra["condition_latents"], reference.extra["condition_latents"]),
    ):
        if mode == "exact":
            gate_equal(f"{name}: {label}", mine, theirs)
        else:
            gate_error(f"{name}: {label}", mine[:, :, :1], theirs[:, :, :1], FAST_BOUND)
            gate_equal(f"{name}: other {label}", mine[:, :, 1:], theirs[:, :, 1:])


def report(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    version = importlib.metadata.version("sglang")
    size = f"{args.width}x{args.height}, {args.num_frames} frames"
    print(
        f"\nCosmos3LatentPreparationStage of SGLang {version}, {size}, fp32 VAE, "
        f"{args.rounds} interleaved rounds, medians\n{machine()}\n"
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
    print(table(["stage", "pixel frames", "TFLOP", "median", "range", "ratio"], cells))
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        figures = {
            "sglang": version,
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
