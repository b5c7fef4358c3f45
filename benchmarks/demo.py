"""What `make demo` runs: a photograph to latents and back, then a clip, timed against the VAE."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.cases import PHOTOGRAPH, SEED, engine_stage, gate_stage, vae_and_encoder
from benchmarks.harness import ROOT, machine, measure, say, versions
from benchmarks.report import ratio, row_lines, seconds, size, spread, table
from benchmarks.suites.clips import clips
from benchmarks.suites.decoder import decoder
from cosmos3_fast.cli.main import main as command_line
from cosmos3_fast.images.load import load_pixels
from cosmos3_fast.latents import LatentPreparation

HEIGHT, WIDTH, NUM_FRAMES = 480, 832, 81
DECODED = "128x224"
# A clip at the VAE's own width takes a minute at any size, so a quarter of its channels.
CLIP, CLIP_FRAMES, CLIP_WIDTH = "64x112", 5, 64
ENGINE, OURS = "3-D vae.encode, eager formula", "cosmos3_fast, fast mode"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "out", help="folder for the results")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds (default 3)")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)

    status = command_line(
        [
            *("prepare", str(PHOTOGRAPH), "--size", f"{HEIGHT}x{WIDTH}"),
            *("--num-frames", str(NUM_FRAMES), "--seed", str(SEED)),
            *("--out", str(args.out / "latents.safetensors")),
            *("--preview", str(args.out / "preview.png")),
        ]
    )
    return (
        status
        or compare(args.rounds)
        or compare_decoders(args.rounds)
        or compare_clips(args.rounds)
    )


def compare(rounds: int) -> int:
    """Print the table of the engine's path against ours; abort where they disagree."""
    say("\nbuilding the 3-D VAE and folding it ...")
    try:
        vae, encoder = vae_and_encoder("float32")
    except ImportError as error:
        print(f"error: the engine's path needs diffusers ({error})", file=sys.stderr)
        return 2
    stage = LatentPreparation(encoder)
    request = (load_pixels(PHOTOGRAPH, HEIGHT, WIDTH), NUM_FRAMES, HEIGHT, WIDTH)

    def theirs() -> tuple[torch.Tensor, torch.Tensor]:
        return engine_stage(vae, *request)

    def ours() -> tuple[torch.Tensor, torch.Tensor]:
        prepared = stage(*request, seed=SEED, dtype=torch.float32, mode="fast")
        return prepared.latents, prepared.velocity_mask

    say("correctness gate ...")
    error = gate_stage("demo", ours(), theirs())
    # The gate has warmed both paths up.
    timings = measure({ENGINE: theirs, OURS: ours}, rounds=rounds, warmup=0, progress=True)
    rows = [
        (
            name,
            seconds(timing.median),
            spread(min(timing.seconds), max(timing.seconds)),
            ratio(timings[ENGINE].median / timing.median),
            f"{error:.1e}" if name == OURS else "",
        )
        for name, timing in timings.items()
    ]
    print(
        f"\nOne photograph to latents, {WIDTH}×{HEIGHT}, {NUM_FRAMES} frames, float32, "
        f"{rounds} interleaved rounds\n"
        f"{machine()}, diffusers {versions('diffusers')['diffusers']}\n"
    )
    print("\n".join(table(("path", "median", "range", "speed", "error / largest"), rows)))
    return 0


def compare_decoders(rounds: int) -> int:
    """Print the table of one latent frame to pixels; abort where the sides disagree."""
    rows = list(decoder(DECODED, rounds, ("float32",)))
    print(f"\nOne latent frame to a picture, {size(DECODED)}, {rounds} interleaved rounds\n")
    print("\n".join(row_lines(rows)))
    return 0


def compare_clips(rounds: int) -> int:
    """Print the table of a clip to pixels; abort where the sides disagree."""
    rows = list(clips(CLIP, CLIP_FRAMES, rounds, base_dim=CLIP_WIDTH, only=("decode",)))
    print(
        f"\nTwo latent frames to {CLIP_FRAMES} frames of a clip, {size(CLIP)}, by a VAE with a "
        f"quarter of Cosmos3's channels, {rounds} interleaved rounds\n"
    )
    print("\n".join(row_lines(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
