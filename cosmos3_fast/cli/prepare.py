"""`python -m cosmos3_fast prepare`: an image and a seed to conditioned latents."""

from __future__ import annotations

import argparse
import contextlib
import time
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from safetensors.torch import save_file

from cosmos3_fast import __version__
from cosmos3_fast.arguments import dtype_name
from cosmos3_fast.cli.options import (
    UserError,
    add_size,
    add_vae,
    check_memory,
    dtype_option,
    step,
    vae_of,
)
from cosmos3_fast.files import check_target, printable, replacing
from cosmos3_fast.frames import conditioned_span, latent_frames, pixel_frames
from cosmos3_fast.images.load import load_frames
from cosmos3_fast.images.preview import render_preview
from cosmos3_fast.latents import LatentPreparation, PreparedLatents, check_request
from cosmos3_fast.vae.show import decoded_picture
from cosmos3_fast.vae.source import VaeSource, compute_dtype

_TENSORS = ("latents", "velocity_mask", "condition_latents")


def add_prepare(commands: Any) -> None:
    """Register the command with argparse's subparsers."""
    parser = commands.add_parser(
        "prepare",
        help="image and seed to conditioned latents",
        description="Encode an image and write the conditioned latents, the velocity mask and the "
        "condition latents to a safetensors file.",
    )
    parser.add_argument("image", metavar="IMAGE", help="an image, animation or video file")
    parser.add_argument("--out", required=True, metavar="FILE", help="the .safetensors to write")
    parser.add_argument("--num-frames", type=int, default=81, help="pixel frames (default 81)")
    parser.add_argument("--seed", type=_seed, default=42, help="seed of the noise (default 42)")
    parser.add_argument(
        "--condition-frames",
        type=_frames,
        default=(0,),
        metavar="T[,T...]",
        help="latent frames to condition (default 0); an image is repeated for others than 0",
    )
    parser.add_argument(
        "--dtype",
        type=dtype_option,
        default="bfloat16",
        help="dtype of the results (default bfloat16)",
    )
    parser.add_argument(
        "--mode",
        choices=("fast", "exact"),
        default="fast",
        help="fast: the folded encoder; exact: diffusers' VAE itself (default fast)",
    )
    parser.add_argument(
        "--keep",
        choices=("first", "last"),
        default="first",
        help="which end of a clip conditions (default first)",
    )
    parser.add_argument(
        "--background",
        metavar="COLOR",
        help="paint it behind transparent pixels (default: alpha is dropped, as in the engines)",
    )
    parser.add_argument("--preview", metavar="PNG", help="also draw a picture of the result")
    add_size(parser, 480, 832)
    add_vae(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    start = time.perf_counter()
    out, preview = _targets(args)
    # What cannot be is said before the weights are loaded, which takes seconds.
    needed = _check(args)
    with step(f"reading {printable(args.image)}"):
        frames = load_frames(
            args.image,
            *args.size,
            max_frames=needed,
            keep=args.keep,
            background=args.background,
        )
    vae, vae_dtype = vae_of(args.vae), compute_dtype(args.vae_dtype, args.device)
    prepared = _prepared(args, frames, vae, vae_dtype)
    picture = None if preview is None else _picture(args, frames, prepared, vae, vae_dtype)

    tensors = {name: getattr(prepared, name).contiguous().cpu() for name in _TENSORS}
    metadata = {
        "cosmos3_fast": __version__,
        "torch": torch.__version__,
        "image": printable(Path(args.image).name),
        "height": str(args.size[0]),
        "width": str(args.size[1]),
        "num_frames": str(args.num_frames),
        "condition_frames": ",".join(map(str, prepared.condition_frames)),
        "seed": str(args.seed),
        "dtype": dtype_name(args.dtype),
        "mode": prepared.mode,
        "vae": printable(str(vae)),
        "vae_dtype": dtype_name(vae_dtype),
        "device": args.device.type,
    }
    with contextlib.ExitStack() as both:
        save_file(tensors, both.enter_context(replacing(out)), metadata)
        if picture is not None and preview is not None:
            picture.save(both.enter_context(replacing(preview)), format="PNG")

    print(f"{out}: {prepared.mode} mode, {time.perf_counter() - start:.1f} s in all")
    for name, tensor in tensors.items():
        print(f"  {name:<18}{list(tensor.shape)} {dtype_name(tensor.dtype)}")
    if picture is not None:
        print(f"{preview}: {picture.width}x{picture.height} picture")
    return 0


def _targets(args: argparse.Namespace) -> tuple[Path, Path | None]:
    """The files to write."""
    inputs = [args.image, *([args.vae] if args.vae else [])]
    out = check_target(args.out, "--out", inputs)
    if not args.preview:
        return out, None
    preview = check_target(args.preview, "--preview", inputs)
    if preview == out:
        raise UserError(f"--out and --preview are the same file: {out}")
    if preview.suffix.lower() != ".png":
        raise UserError(f"--preview must end in .png, got {args.preview!r}")
    return out, preview


def _check(args: argparse.Namespace) -> int:
    """Check the request as far as it can be without weights.

    Returns:
        The pixel frames that are needed.
    """
    height, width = args.size
    # The stage checks again with the factor of the weights.
    factor = 16 if args.vae is None else 1
    check_request(args.num_frames, height, width, args.condition_frames, spatial_factor=factor)
    needed = pixel_frames(conditioned_span(args.condition_frames))
    latents = 16 * latent_frames(args.num_frames) * (height // 16) * (width // 16)
    # Noise, latents and the file's copy in 16 bits; pixels as bytes and once as numbers.
    check_memory(
        f"{args.num_frames} frames of {height}x{width}",
        3 * 2 * latents + 3 * 3 * needed * height * width,
    )
    return needed


def _prepared(
    args: argparse.Namespace, frames: torch.Tensor, vae: VaeSource, vae_dtype: torch.dtype
) -> PreparedLatents:
    height, width = args.size
    with step(f"loading the {'encoder' if args.mode == 'fast' else 'VAE'}"):
        stage = (
            LatentPreparation(
                vae.encoder(vae_dtype, args.device, clips=args.condition_frames != (0,))
            )
            if args.mode == "fast"
            else LatentPreparation(vae=vae.live(vae_dtype, args.device))
        )
    with step(f"preparing {args.num_frames} frames of {height}x{width}, {args.mode} mode"):
        prepared = stage(
            frames[0],
            args.num_frames,
            height,
            width,
            args.condition_frames,
            seed=args.seed,
            dtype=args.dtype,
            mode=args.mode,
        )
    for name in ("latents", "condition_latents"):
        if not getattr(prepared, name).isfinite().all():
            raise UserError(
                f"the {name} hold NaN or infinite values, and are not written: the weights, or "
                f"--vae-dtype {dtype_name(vae_dtype)}, do not serve this picture"
            )
    return prepared


def _picture(
    args: argparse.Namespace,
    frames: torch.Tensor,
    prepared: PreparedLatents,
    vae: VaeSource,
    vae_dtype: torch.dtype,
) -> Image:
    """The preview."""
    height, width = args.size
    decoded = None
    if args.vae is not None:  # random weights would show noise
        with step("decoding the first conditioned frame"):
            first = prepared.condition_frames[0]
            condition = prepared.condition_latents[:1, :, first : first + 1]
            decoder = vae.decoder(vae_dtype, args.device)
            decoded = decoded_picture(decoder, condition, "the condition latents")
    weights = Path(args.vae).name if args.vae else f"{vae}; the latents mean nothing to a model"
    with step("drawing the preview"):
        return render_preview(
            frames,
            prepared,
            title=f"{printable(Path(args.image).name)} as Cosmos3 latents",
            notes=(
                f"{args.num_frames} frames of {width}x{height}, seed {args.seed}, "
                f"{dtype_name(args.dtype)}, {prepared.mode} mode",
                f"VAE: {weights}",
            ),
            decoded=decoded,
        )


def _seed(text: str) -> int:
    try:
        seed = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be an integer, got {text!r}") from None
    if not -(2**63) <= seed < 2**64:
        raise argparse.ArgumentTypeError(f"must be an integer in [-2^63, 2^64), got {seed}")
    return seed


def _frames(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be integers such as 0,1, got {text!r}") from None
