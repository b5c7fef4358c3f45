"""`python -m cosmos3_fast verify`: the folded networks against the VAE, on this machine."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch

from cosmos3_fast.arguments import dtype_name
from cosmos3_fast.cli.options import (
    DTYPES,
    UserError,
    add_size,
    add_vae,
    dtype_option,
    step,
    vae_of,
)
from cosmos3_fast.frames import is_whole
from cosmos3_fast.images.load import load_pixels
from cosmos3_fast.vae import ClipDecoder, ClipEncoder, FrameDecoder, FrameEncoder
from cosmos3_fast.vae.live.exact import decode_sample, denormalize_latents, encode_exact
from cosmos3_fast.vae.verify import (
    FLOAT32_BOUND,
    Comparison,
    compare,
    compare_changes,
    peak_signal_to_noise,
)


def add_verify(commands: Any) -> None:
    """Register the command with argparse's subparsers."""
    parser = commands.add_parser(
        "verify",
        help="compare the folded networks with the VAE on this machine",
        description="Encode one image or clip, and decode it again, with the folded networks and "
        f"with diffusers' VAE. float32: the largest difference must be within {FLOAT32_BOUND:g} of "
        "the largest value. bfloat16, float16: the error (rms) against a float64 run of the same "
        "weights must not exceed the VAE's own. Ends with the PSNR of the round trip.",
    )
    parser.add_argument("--image", metavar="IMAGE", help="an image file (default: seeded noise)")
    parser.add_argument(
        "--frames",
        type=int,
        default=1,
        metavar="N",
        help="1 + 4k frames: more than one are a clip, the picture moved along; its frames and how "
        "they change from one to the next are compared (default 1)",
    )
    parser.add_argument(
        "--dtypes",
        type=lambda text: [dtype_option(part) for part in text.split(",")],
        metavar="DTYPE[,...]",
        help="of fp32,bf16,fp16 (default all, but on a CPU not fp16: torch's 3-D convolution takes "
        "many minutes there)",
    )
    add_size(parser, 256, 448)
    add_vae(parser, with_dtype=False)
    parser.set_defaults(run=run)


@torch.no_grad()
def run(args: argparse.Namespace) -> int:
    height, width = args.size
    if args.image is not None:
        pixels = load_pixels(args.image, height, width)
    else:
        generator = torch.Generator().manual_seed(0)
        pixels = torch.rand(1, 3, height, width, generator=generator) * 2 - 1
    if args.frames < 1 or not is_whole(args.frames):
        raise UserError(f"--frames must be 1 + 4k, got {args.frames}")
    clip = torch.stack([pixels.roll(2 * i, -1) for i in range(args.frames)], 2)
    is_clip = args.frames > 1
    source = vae_of(args.vae)
    rows: list[tuple[str, Comparison]] = []
    psnr: dict[str, float] = {}
    dtypes = args.dtypes or list(DTYPES.values())
    if args.dtypes is None and args.device.type == "cpu":
        dtypes.remove(torch.float16)
        print("float16 is left out on a CPU; ask for it with --dtypes fp16", file=sys.stderr)
    for dtype in dtypes:
        name = dtype_name(dtype)
        with step(f"{name}: loading the VAE and folding it"):
            vae = source.live(dtype, args.device, decodes=True)
            encoder = (ClipEncoder if is_clip else FrameEncoder).from_vae(vae, dtype=dtype)
            decoder = (ClipDecoder if is_clip else FrameDecoder).from_vae(vae, dtype=dtype)
        factor = encoder.spatial_factor
        if height % factor or width % factor:
            raise UserError(f"--size must be multiples of {factor}, got {height}x{width}")
        rounded = clip.to(args.device, dtype)
        with step(f"{name}: folded encoder and decoder"):
            fast = encoder(rounded)
            # Both sides decode what the VAE's own decode is given.
            own_scale = denormalize_latents(fast, vae.config)
            picture = decoder.decode_unnormalized(own_scale)
        with step(f"{name}: the VAE's encoder and decoder"):
            latents = encode_exact(vae, rounded)
            reference = decode_sample(vae, own_scale)
        psnr[name] = peak_signal_to_noise(picture, clip.to(args.device))
        exact_latents = exact_picture = None
        if dtype != torch.float32:
            with step(f"{name}: the VAE in float64"):
                vae = vae.double()
                exact_latents = encode_exact(vae, rounded.double())
                exact_picture = decode_sample(vae, own_scale.double())
        rows.append(("encoder", compare(fast, latents, exact_latents)))
        rows.append(("decoder", compare(picture, reference, exact_picture)))
        if is_clip:
            rows.append(("decoder", compare_changes(picture, reference, exact_picture)))
    print(f"folded networks against diffusers' VAE, {height}x{width}, {args.device}, VAE: {source}")
    print(f"{'network':<9}{'dtype':<10}{'measure':<28}{'ours':>11}{'bound':>11}{'ratio':>8}")
    for network, row in rows:
        verdict = "ok" if row.passed else "OUT OF BOUNDS"
        print(
            f"{network:<9}{row.dtype:<10}{row.measure:<28}{row.error:>11.2e}{row.bound:>11.2e}"
            f"{row.error / row.bound:>8.2f}  {verdict}"
        )
    for name, decibels in psnr.items():
        print(f"round trip in {name}: PSNR {decibels:.1f} dB")
    return 0 if all(row.passed for _, row in rows) else 1
