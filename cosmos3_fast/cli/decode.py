"""`python -m cosmos3_fast decode`: one latent frame to a picture."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open

from cosmos3_fast.cli.options import UserError, add_vae, check_memory, step, vae_of
from cosmos3_fast.files import check_target, replacing
from cosmos3_fast.vae import FrameDecoder
from cosmos3_fast.vae.show import decoded_picture
from cosmos3_fast.vae.source import compute_dtype


def add_decode(commands: Any) -> None:
    """Register the command with argparse's subparsers."""
    parser = commands.add_parser(
        "decode",
        help="one latent frame to a picture",
        description="Decode one latent frame of a safetensors file that `prepare` wrote, or of "
        "another with normalized `latents` [B, z, T, h, w], to a PNG.",
    )
    parser.add_argument("latents", metavar="FILE", help="a .safetensors with `latents`")
    parser.add_argument("--out", required=True, metavar="PNG", help="the picture to write")
    parser.add_argument("--frame", type=int, default=0, help="latent frame (default 0)")
    add_vae(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    out = check_target(args.out, "--out", [args.latents, *([args.vae] if args.vae else [])])
    if out.suffix.lower() != ".png":
        raise UserError(f"--out must end in .png, got {args.out!r}")
    latents = _latents(args.latents, args.frame)
    vae = vae_of(args.vae)
    with step("loading the decoder"):
        decoder = vae.decoder(compute_dtype(args.vae_dtype, args.device), args.device)
    _check_memory(decoder, latents)
    with step(f"decoding latent frame {args.frame}"):
        name = f"latent frame {args.frame} of {args.latents!r}"
        picture = decoded_picture(decoder, latents, name)
    with replacing(out) as partial:
        Image.fromarray(picture.numpy()).save(partial, format="PNG")
    print(f"{out}: {picture.shape[1]}x{picture.shape[0]} picture of latent frame {args.frame}")
    return 0


def _latents(path: str, frame: int) -> torch.Tensor:
    """The first sample's latents [1, z, 1, h, w] of one frame."""
    if not Path(path).is_file():
        raise UserError(f"{path!r} is no file")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            if "latents" not in file.keys():  # noqa: SIM118 - no mapping
                raise UserError(f"{path!r} has no tensor `latents`")
            part = file.get_slice("latents")
            shape = part.get_shape()
            if len(shape) != 5 or 0 in shape:
                raise UserError(
                    f"`latents` of {path!r} must have shape [B, z, T, h, w], got {shape}"
                )
            if not 0 <= frame < shape[2]:
                raise UserError(
                    f"--frame must be in [0, {shape[2]}), got {frame}: {path!r} has {shape[2]} "
                    "latent frames"
                )
            latents: torch.Tensor = part[:1, :, frame : frame + 1]
    except SafetensorError as error:
        raise UserError(f"{path!r} is not a complete safetensors file: {error}") from error
    if not latents.is_floating_point():
        raise UserError(f"`latents` of {path!r} must be floating point, got {latents.dtype}")
    return latents


def _check_memory(decoder: FrameDecoder, latents: torch.Tensor) -> None:
    """Refuse latents whose picture cannot fit; a lower bound."""
    height, width = (size * decoder.spatial_factor for size in latents.shape[-2:])
    # What the last stage reads and what it writes, and the pixels.
    cells = (height // decoder.topology.patch_size) * (width // decoder.topology.patch_size)
    channels = decoder.topology.stages[-1].out_channels
    size = decoder.dtype.itemsize
    check_memory(
        f"latents of {latents.shape[-2]}x{latents.shape[-1]} cells, {height}x{width} pixels,",
        2 * cells * channels * size + 3 * height * width * size,
        decoder.device,
    )
