"""What `make demo` runs: a photograph to latents, then the time of the seed path against ours."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from harness import gate_equal, gate_error, machine, measure, table

from cosmos3_fast import cli
from cosmos3_fast.latents import LatentPreparation, PreparedLatents
from cosmos3_fast.pixels import load_pixels

ROOT = Path(__file__).resolve().parent.parent
PHOTOGRAPH = ROOT / "examples" / "falcon9_dscovr.jpg"
HEIGHT, WIDTH, NUM_FRAMES, SEED = 480, 832, 81, 42
BOUND = 1e-5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "out", help="folder for the results")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds (default 3)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    status = cli.main(
        [
            *("prepare", str(PHOTOGRAPH), "--size", f"{HEIGHT}x{WIDTH}"),
            *("--num-frames", str(NUM_FRAMES), "--seed", str(SEED)),
            *("--out", str(args.out / "latents.safetensors")),
            *("--preview", str(args.out / "preview.png")),
        ]
    )
    return status or compare(args.rounds)


@torch.no_grad()
def seed_stage(vae: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The stage as SGLang writes it since its one-frame encode, in fp32 on the CPU.

    Args:
        pixels: [1,3,H,W] in [-1, 1].

    Returns:
        latents [1,C,T,h,w] and velocity mask [1,1,T,1,1].
    """
    latent = vae.encode(pixels.unsqueeze(2)).latent_dist.mode()
    mean = torch.as_tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.as_tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    condition = (latent - mean) / std
    frames = (NUM_FRAMES - 1) // 4 + 1
    shape = (1, condition.shape[1], frames, *condition.shape[3:])
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(SEED))
    condition_latents = torch.zeros_like(noise)
    condition_latents[:, :, :1] = condition
    mask = torch.zeros(1, 1, frames, 1, 1)
    mask[:, :, 0] = 1.0
    return mask * condition_latents + (1.0 - mask) * noise, 1.0 - mask


def compare(rounds: int) -> int:
    """Print the table of the seed path against ours; abort where they disagree."""
    try:
        import diffusers
    except ImportError as error:
        print(f"error: the seed path needs diffusers ({error})", file=sys.stderr)
        return 2
    from cosmos3_fast.vae import FrameEncoder
    from cosmos3_fast.vae.synthetic import COSMOS3_VAE_CONFIG, synthetic_vae

    print("\nbuilding the 3-D VAE and folding it ...", file=sys.stderr)
    vae = synthetic_vae(COSMOS3_VAE_CONFIG, cli.SYNTHETIC_SEED)
    stage = LatentPreparation(FrameEncoder.from_vae(vae))
    pixels = load_pixels(PHOTOGRAPH, HEIGHT, WIDTH)

    def ours() -> PreparedLatents:
        return stage(pixels, NUM_FRAMES, HEIGHT, WIDTH, seed=SEED, dtype=torch.float32)

    print("correctness gate ...", file=sys.stderr)
    reference, reference_mask = seed_stage(vae, pixels)
    prepared = ours()
    error = gate_error("condition", prepared.latents[:, :, :1], reference[:, :, :1], BOUND)
    gate_equal("noise frames", prepared.latents[:, :, 1:], reference[:, :, 1:])
    gate_equal("velocity mask", prepared.velocity_mask, reference_mask)

    # The gate has warmed both paths up.
    timings = measure(
        {"seed": lambda: seed_stage(vae, pixels), "ours": ours},
        rounds=rounds,
        warmup=0,
        progress=True,
    )
    baseline = timings["seed"].median
    rows = [
        [
            label,
            f"{timings[key].median:.2f} s",
            f"{min(timings[key].seconds):.2f}-{max(timings[key].seconds):.2f} s",
            f"{baseline / timings[key].median:.2f}x",
            largest,
        ]
        for key, label, largest in (
            ("seed", f"3-D vae.encode (diffusers {diffusers.__version__}), eager formula", "-"),
            ("ours", f"cosmos3_fast {prepared.mode} mode", f"{error:.1e}"),
        )
    ]
    print(
        f"\nOne photograph to latents, {WIDTH}x{HEIGHT}, {NUM_FRAMES} frames, fp32, "
        f"{rounds} interleaved rounds\n{machine()}\n"
    )
    print(table(["path", "median", "range", "speed", "error / max"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
