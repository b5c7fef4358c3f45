"""`python -m cosmos3_fast decode`: latents to a video, an animation, pictures, or one picture."""

from __future__ import annotations

import argparse
import pickle
import sys
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open

from cosmos3_fast.cli.options import UserError, add_vae, counted, step, vae_of
from cosmos3_fast.files import printable, replacing
from cosmos3_fast.frames import pixel_frames
from cosmos3_fast.images.video import CRF_KINDS, FOLDER, PICTURE, check_video, frame_rate, kind_of
from cosmos3_fast.vae.show import check_memory, decoded_picture, save_video
from cosmos3_fast.vae.source import VaeSource, compute_dtype

_SCALES = {"normalized": True, "vae": False}
_COMFYUI, _COMFYUI_MARK = "latent_tensor", "latent_format_version_0"


def add_decode(commands: Any) -> None:
    """Register the command with argparse's subparsers."""
    parser = commands.add_parser(
        "decode",
        help="latents to a video, or one latent frame to a picture",
        description="Decode latents [B, z, T, h, w] to a video, or one latent frame to a PNG. They "
        "come from `prepare`, from `encode` (--key), from ComfyUI, or from another safetensors "
        "file with `latents` or .pt file with a tensor, or a dictionary with `latents` or "
        "`samples`.",
    )
    parser.add_argument(
        "latents",
        metavar="FILE",
        help="a .safetensors, .latent or .pt file; with --key also a folder that `encode` wrote",
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="PATH",
        help=".mp4 (H.264), .webm (VP9) or .gif, a new folder for pictures of all frames, or .png "
        "for one latent frame; all but pictures need the extra [video]",
    )
    parser.add_argument("--frame", type=int, help="of a .png: the latent frame (default 0)")
    parser.add_argument("--fps", type=_rate, help="of a video or .gif (default 24)")
    parser.add_argument(
        "--crf",
        type=float,
        help="quality of .mp4 (0 to 51) and .webm (0 to 63), lower is better (default 18)",
    )
    parser.add_argument("--key", help="the tensor in the file, such as a sample's of `encode`")
    parser.add_argument(
        "--sample", type=int, default=0, help="the entry of the batch that is shown (default 0)"
    )
    parser.add_argument(
        "--scale",
        choices=tuple(_SCALES),
        help="of the latents: the model's or the VAE's own (default: the VAE's own for files of "
        "ComfyUI and dictionaries with `samples`, normalized for all others)",
    )
    add_vae(parser)
    parser.set_defaults(run=run)


def _rate(text: str) -> Fraction:
    try:
        return frame_rate(Fraction(text))
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(
            f"must be a number in [0.01, 1000] such as 24 or 30000/1001, got {text!r}"
        ) from None


@dataclass(frozen=True)
class Latents:
    """What a file holds.

    Attributes:
        values: [1, z, T, h, w].
        normalized: whether they have the model's scale, not the VAE's own.
        scale: the same in words, with how it is known.
        batch: how many entries the batch had.
        vae_hash: of the VAE that `encode` had; None where that is not known.
    """

    values: torch.Tensor
    normalized: bool
    scale: str
    batch: int
    vae_hash: str | None = None


def run(args: argparse.Namespace) -> int:
    inputs = [args.latents, *([args.vae] if args.vae else [])]
    kind = kind_of(args.out, "--out")
    if kind != PICTURE and args.frame is not None:
        raise UserError(f"--out must be a {PICTURE} for --frame, got {args.out!r}")
    if kind not in CRF_KINDS and args.crf is not None:
        raise UserError(f"--out must be {' or '.join(CRF_KINDS)} for --crf, got {args.out!r}")
    if kind in (PICTURE, FOLDER) and args.fps is not None:
        raise UserError(f"--out must be a video or .gif for --fps, got {args.out!r}")
    crf = 18 if args.crf is None else args.crf
    fps = Fraction(24) if args.fps is None else args.fps
    out = check_video(args.out, fps, crf, "--out", inputs)
    frame = (args.frame or 0) if kind == PICTURE else None
    latents = _read(args, frame)
    vae = vae_of(args.vae)
    _compare_vae(args, vae, latents)
    if kind == PICTURE:
        return _picture(args, vae, latents, out, frame or 0)
    values = latents.values
    frames = pixel_frames(values.shape[2])
    with step("loading the decoder"):
        decoder = vae.decoder(
            compute_dtype(args.vae_dtype, args.device), args.device, clips=values.shape[2] > 1
        )
    with counted(f"decoding {frames} frames", frames) as progress:
        save_video(decoder, values, args.out, fps, crf, latents.normalized, progress=progress)
    height, width = (size * decoder.spatial_factor for size in values.shape[3:])
    what = "pictures" if kind == FOLDER else "frames"
    rate = "" if kind == FOLDER else f" at {float(fps):g} fps"
    print(f"{printable(str(out))}: {frames} {what} of {width}x{height}{rate}")
    _say(args, latents)
    return 0


def _compare_vae(args: argparse.Namespace, vae: VaeSource, latents: Latents) -> None:
    """Say on stderr where `--vae` is not the VAE that encoded the latents."""
    if latents.vae_hash is None or args.vae is None:
        return
    # That of a folder of clips covers all temporal taps, and pictures may be in one.
    is_clip = latents.values.shape[2] > 1
    try:
        found = vae.fingerprint(is_clip)
        if latents.vae_hash == found or latents.vae_hash == vae.fingerprint(not is_clip):
            return
    except ValueError as error:  # weights of the decoder alone
        encoded = f"the VAE that encoded {args.latents!r}"
        print(f"WARNING: --vae cannot be compared with {encoded}: {error}", file=sys.stderr)
        return
    print(
        f"WARNING: {args.latents!r} was encoded by a VAE with the hash {latents.vae_hash[:12]}, "
        f"--vae {args.vae!r} has {found[:12]}: the frames may be wrong. (A copy of the same VAE in "
        "another dtype has another hash too.)",
        file=sys.stderr,
    )


def _picture(
    args: argparse.Namespace, vae: VaeSource, latents: Latents, out: Path, frame: int
) -> int:
    with step("loading the decoder"):
        decoder = vae.decoder(compute_dtype(args.vae_dtype, args.device), args.device)
    check_memory(decoder, latents.values.shape)
    with step(f"decoding latent frame {frame}"):
        name = f"latent frame {frame} of {args.latents!r}"
        picture = decoded_picture(decoder, latents.values, name, latents.normalized)
    with replacing(out) as partial:
        Image.fromarray(picture.numpy()).save(partial, format="PNG")
    print(f"{out}: {picture.shape[1]}x{picture.shape[0]} picture of latent frame {frame}")
    _say(args, latents)
    return 0


def _say(args: argparse.Namespace, latents: Latents) -> None:
    if latents.batch > 1:
        print(f"  sample {args.sample} of {latents.batch} (--sample)")
    print(f"  latents taken as {latents.scale}")


def _read(args: argparse.Namespace, frame: int | None) -> Latents:
    """The latents of a file, of all frames or one."""
    path = Path(args.latents)
    if path.is_dir():
        path = _shard(path, args.key)
    elif not path.is_file():
        raise UserError(f"{args.latents!r} is no file")
    if path.suffix.lower() in (".pt", ".pth") or _begins_as_zip(path):
        return _read_torch(args, frame)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = list(file.keys())
            name = args.key or (_COMFYUI if _COMFYUI in names else "latents")
            if name not in names:
                raise UserError(f"{args.latents!r} has no tensor `{name}`{_others(names)}")
            metadata = file.metadata() or {}
            part = file.get_slice(name)
            label = f"`{name}` of {args.latents!r}"
            shape = part.get_shape()
            sample, frames = _chosen(args, label, shape, frame, in_dataset=args.key is not None)
            values = part[:, frames][None] if sample is None else part[sample, :, frames]
    except SafetensorError as error:
        raise UserError(f"{args.latents!r} is not a complete safetensors file: {error}") from error
    batch = 1 if sample is None else shape[0]
    if name == _COMFYUI:
        if _COMFYUI_MARK not in names and args.scale is None:
            raise UserError(
                f"{label} has an unknown scale, as no `{_COMFYUI_MARK}` is with it: give --scale"
            )
        return _latents(args, values, label, False, "as ComfyUI writes them", batch)
    known = "vae_hash" in metadata or "cosmos3_fast" in metadata
    writer = "encode" if "vae_hash" in metadata else "prepare"
    read = _latents(
        args, values, label, True, f"as `{writer}` writes them" if known else None, batch
    )
    return replace(read, vae_hash=metadata.get("vae_hash"))


def _begins_as_zip(path: Path) -> bool:
    """Whether a file begins as `torch.save` begins one."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _read_torch(args: argparse.Namespace, frame: int | None) -> Latents:
    try:
        content = torch.load(args.latents, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{args.latents!r} cannot be read as a file of tensors: {reason[0]}"
        ) from error
    name, label = args.key, f"the tensor of {args.latents!r}"
    if isinstance(content, dict):
        name = name or next((each for each in ("latents", "samples") if each in content), "latents")
        if name not in content:
            names = [each for each, value in content.items() if isinstance(value, torch.Tensor)]
            raise UserError(f"{args.latents!r} has no tensor `{name}`{_others(names)}")
        content, label = content[name], f"`{name}` of {args.latents!r}"
    elif name is not None:
        raise UserError(f"--key must name a tensor of a dictionary, got one of {label}")
    if not isinstance(content, torch.Tensor):
        raise UserError(f"{label} must be a tensor, got {type(content).__name__}")
    shape = list(content.shape)
    sample, frames = _chosen(args, label, shape, frame, in_dataset=False)
    values = content[sample, :, frames]
    if name == "samples":
        return _latents(args, values, label, False, "as ComfyUI has `samples`", shape[0])
    return _latents(args, values, label, True, None, shape[0])


def _others(names: list[str]) -> str:
    if not names:
        return ""
    shown = ", ".join(f"`{each}`" for each in names[:3])
    return f", but {len(names)} others: --key takes one, such as {shown}"


def _chosen(
    args: argparse.Namespace, label: str, shape: list[int], frame: int | None, in_dataset: bool
) -> tuple[slice | None, slice]:
    """Which entry of the batch, None where there is no batch, and which frames."""
    wanted = "[B, z, T, h, w]" + (" or [z, T, h, w]" if in_dataset else "")
    if 0 in shape or not (len(shape) == 5 or (in_dataset and len(shape) == 4)):
        raise UserError(f"{label} must have shape {wanted}, got {shape}")
    batch, total = (shape[0], shape[2]) if len(shape) == 5 else (1, shape[1])
    if not 0 <= args.sample < batch:
        raise UserError(f"--sample must be in [0, {batch}), got {args.sample}: {label} has {batch}")
    if frame is not None and not 0 <= frame < total:
        raise UserError(
            f"--frame must be in [0, {total}), got {frame}: {args.latents!r} has {total} "
            "latent frames"
        )
    frames = slice(None) if frame is None else slice(frame, frame + 1)
    return slice(args.sample, args.sample + 1) if len(shape) == 5 else None, frames


def _latents(
    args: argparse.Namespace,
    values: torch.Tensor,
    label: str,
    normalized: bool,
    known: str | None,
    batch: int,
) -> Latents:
    if not values.is_floating_point():
        raise UserError(f"{label} must be floating point, got {values.dtype}")
    if args.scale is not None:
        normalized, known = _SCALES[args.scale], "by --scale"
    scale = "normalized" if normalized else "on the VAE's own scale"
    return Latents(values, normalized, f"{scale}, {known or 'by default (--scale)'}", batch)


def _shard(folder: Path, key: str | None) -> Path:
    """The shard of a folder from `encode` that has a key."""
    shards = sorted((folder / "shards").glob("*.safetensors"))
    if not shards:
        raise UserError(f"{str(folder)!r} is no file, and no folder that `encode` wrote")
    if key is None:
        raise UserError(f"--key must say which sample of {str(folder)!r} is shown, got none")
    for shard in shards:
        try:
            with safe_open(shard, framework="pt", device="cpu") as file:
                if key in file.keys():  # noqa: SIM118 - no mapping
                    return shard
        except SafetensorError as error:
            raise UserError(
                f"{str(shard)!r} is not a complete safetensors file: {error}"
            ) from error
    raise UserError(f"--key must be one of the folder {str(folder)!r}, got {key!r}")
