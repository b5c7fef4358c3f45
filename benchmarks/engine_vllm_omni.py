"""vLLM-Omni's Cosmos3 latent preparation before and after: the real pipeline method, on a CPU.

The VAE has Cosmos3's topology and full width with seeded random weights. vLLM-Omni encodes no
more frames than it needs by itself, so that exact mode is the unpatched engine. Needs the
environment of `make test-vllm-omni`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from harness import gate_equal, gate_error, machine, measure, table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "engines" / "vllm_omni")]

import omni_pipeline  # noqa: E402

from cosmos3_fast.engines.vllm_omni_pipeline import Cosmos3OmniDiffusersPipeline  # noqa: E402
from cosmos3_fast.vae import ConditioningEncoder  # noqa: E402
from cosmos3_fast.vae.synthetic import COSMOS3_VAE_CONFIG  # noqa: E402

BOUND = 1e-5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--height", type=int, default=256)
    parser.add_argument("--width", type=int, default=448)
    parser.add_argument("--num-frames", type=int, default=17)
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds (default 3)")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    args = parser.parse_args()

    vae = omni_pipeline.make_vae(config=COSMOS3_VAE_CONFIG)
    pipelines = {
        "unpatched": omni_pipeline.make_pipeline(omni_pipeline.EnginePipeline, vae),
        "fast": omni_pipeline.make_pipeline(Cosmos3OmniDiffusersPipeline, vae),
    }
    image = omni_pipeline.clip(1, 0, args.height, args.width)[:, :, 0]

    def prepare(mode: str) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(42)
        size = args.height, args.width, args.num_frames
        with torch.inference_mode():
            return pipelines[mode]._prepare_latents_i2v(image, *size, generator)

    print("I2V: correctness gate ...", file=sys.stderr)
    prepare("fast")  # folds the encoder, which probes the VAE
    results, frames, tflop = {}, {}, {}
    for mode in pipelines:
        with encoded_frames(vae) as seen, flop_counter() as counter:
            results[mode] = prepare(mode)
        frames[mode], tflop[mode] = sum(seen), counter.get_total_flops() / 1e12
    (latents, mask, condition), (ours, our_mask, our_condition) = results.values()
    error = gate_error("condition", our_condition, condition, BOUND)
    gate_error("conditioned latents", ours[:, :, :1], latents[:, :, :1], BOUND)
    gate_equal("other latents", ours[:, :, 1:], latents[:, :, 1:])
    gate_equal("mask", our_mask, mask)

    timings = measure(
        {mode: lambda mode=mode: prepare(mode) for mode in pipelines},
        rounds=args.rounds,
        warmup=0,  # the gate was one
        progress=True,
    )
    rows = [
        {
            "request": "I2V",
            "mode": mode,
            "pixel_frames_encoded": frames[mode],
            "tflop": tflop[mode],
            "seconds": list(timings[mode].seconds),
            "median_s": timings[mode].median,
            "ratio": timings["unpatched"].median / timings[mode].median,
        }
        for mode in pipelines
    ]
    report(rows, error, args)
    return 0


@contextmanager
def encoded_frames(vae: Any) -> Iterator[list[int]]:
    """The pixel frames that are encoded inside the block, whichever encoder they go through."""
    seen: list[int] = []
    forward = ConditioningEncoder.forward

    def through_vae(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0].shape[2])

    def through_fold(encoder: ConditioningEncoder, pixels: Tensor) -> Tensor:
        seen.append(pixels.shape[2])
        return forward(encoder, pixels)

    handle = vae.encoder.conv_in.register_forward_pre_hook(through_vae)
    ConditioningEncoder.forward = through_fold  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        ConditioningEncoder.forward = forward  # type: ignore[method-assign]
        handle.remove()


def flop_counter() -> FlopCounterMode:
    """Counts a Winograd convolution as the direct one that it replaces."""

    def winograd(x: torch.Size, weight: torch.Size, *rest: Any, **out: torch.Size) -> int:
        batch, channels, height, width = x
        return 2 * 9 * batch * channels * out["out_shape"][1] * height * width

    op = torch.ops.cosmos3.winograd_conv3x3
    return FlopCounterMode(display=False, custom_mapping={op: winograd})


def report(rows: list[dict[str, Any]], error: float, args: argparse.Namespace) -> None:
    version = importlib.metadata.version("vllm-omni")
    size = f"{args.width}x{args.height}, {args.num_frames} frames"
    print(
        f"\n_prepare_latents_i2v of vLLM-Omni {version}, {size}, fp32 VAE, "
        f"{args.rounds} interleaved rounds, medians, error {error:.1e} of the largest value\n"
        f"{machine()}\n"
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
    print(table(["pipeline", "pixel frames", "TFLOP", "median", "range", "ratio"], cells))
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        figures = {
            "vllm_omni": version,
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
