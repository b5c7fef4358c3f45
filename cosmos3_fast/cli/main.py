"""``python -m cosmos3_fast``: prepare latents, verify the encoder, show the build."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from cosmos3_fast.cli.encode import add_encode
from cosmos3_fast.cli.options import (
    DTYPES,
    Progress,
    UserError,
    VaeSource,
    device_option,
    dtype_option,
    size_option,
)
from cosmos3_fast.files import check_target, replacing
from cosmos3_fast.frames import conditioned_span, latent_frames, pixel_frames
from cosmos3_fast.vae.verify import FLOAT32_BOUND, Comparison, compare, peak_signal_to_noise

if TYPE_CHECKING:
    from cosmos3_fast.vae.live.accelerated import Mode


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; None takes ``sys.argv``.

    Returns:
        0 on success, 1 where ``verify`` finds an error out of bounds, 2 for faulty arguments or
        inputs (one ``error:`` line on stderr).
    """
    parser = _parser()
    try:
        args = parser.parse_args(argv)
    except SystemExit as stop:  # --help and, below, _Parser.error
        return int(stop.code or 0)
    try:
        with _stoppable(), warnings.catch_warnings():
            warnings.showwarning = _show_warning
            return args.run(args)
    except _Stopped as stop:
        print(f"error: stopped by {stop.signal.name}", file=sys.stderr)
        return 128 + stop.signal
    except _FAULTS as error:
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130


# What faulty inputs raise somewhere below: sizes that overflow or do not fit memory included.
_FAULTS = (
    UserError,
    ValueError,
    TypeError,
    ArithmeticError,
    MemoryError,
    RuntimeError,
    OSError,
    SafetensorError,
)


class _Stopped(BaseException):
    """SIGTERM or SIGHUP came: unwinds as an interrupt does, so that partial files go."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.signal = signal.Signals(number)


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise `_Stopped`; an ignored SIGHUP (nohup) stays ignored."""

    def stop(number: int, frame: object) -> None:
        raise _Stopped(number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        print(f"error: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m cosmos3_fast",
        description="Conditioning image to NVIDIA Cosmos3 latents.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    prepare = commands.add_parser(
        "prepare",
        help="image and seed to conditioned latents",
        description="Encode an image and write the conditioned latents, the velocity mask and the "
        "condition latents to a safetensors file.",
    )
    prepare.add_argument("image", metavar="IMAGE", help="an image, animation or video file")
    prepare.add_argument("--out", required=True, metavar="FILE", help="the .safetensors to write")
    prepare.add_argument("--num-frames", type=int, default=81, help="pixel frames (default 81)")
    prepare.add_argument("--seed", type=_seed, default=42, help="seed of the noise (default 42)")
    prepare.add_argument(
        "--condition-frames",
        type=_frames,
        default=(0,),
        metavar="T[,T...]",
        help="latent frames to condition (default 0); an image is repeated for others than 0",
    )
    prepare.add_argument(
        "--dtype",
        type=dtype_option,
        default="bfloat16",
        help="dtype of the results (default bfloat16)",
    )
    prepare.add_argument(
        "--mode",
        choices=("fast", "exact"),
        default="fast",
        help="fast: the folded encoder; exact: diffusers' VAE itself (default fast)",
    )
    prepare.add_argument(
        "--keep",
        choices=("first", "last"),
        default="first",
        help="which end of a clip conditions (default first)",
    )
    prepare.add_argument(
        "--background",
        metavar="COLOR",
        help="paint it behind transparent pixels (default: alpha is dropped, as in the engines)",
    )
    prepare.add_argument("--preview", metavar="PNG", help="also draw a picture of the result")
    prepare.set_defaults(run=_prepare)

    decode = commands.add_parser(
        "decode",
        help="one latent frame to a picture",
        description="Decode one latent frame of a safetensors file that `prepare` wrote, or of "
        "another with normalized `latents` [B, z, T, h, w], to a PNG.",
    )
    decode.add_argument("latents", metavar="FILE", help="a .safetensors with `latents`")
    decode.add_argument("--out", required=True, metavar="PNG", help="the picture to write")
    decode.add_argument("--frame", type=int, default=0, help="latent frame (default 0)")
    decode.set_defaults(run=_decode)

    add_encode(commands)

    verify = commands.add_parser(
        "verify",
        help="compare the folded networks with the VAE on this machine",
        description="Encode one image, and decode it again, with the folded networks and with "
        f"diffusers' VAE. fp32: the largest difference must be within {FLOAT32_BOUND:g} of the "
        "largest value. bf16, fp16: the error (rms) against a float64 run of the same weights must "
        "not exceed the VAE's own. Ends with the PSNR of the round trip.",
    )
    verify.add_argument("--image", metavar="IMAGE", help="an image file (default: seeded noise)")
    verify.add_argument(
        "--dtypes",
        type=lambda text: [dtype_option(part) for part in text.split(",")],
        metavar="DTYPE[,...]",
        help="of fp32,bf16,fp16 (default all, but on a CPU not fp16: torch's 3-D convolution takes "
        "many minutes there)",
    )
    verify.set_defaults(run=_verify)

    for command, size in ((prepare, (480, 832)), (verify, (256, 448))):
        command.add_argument(
            "--size",
            type=size_option,
            default=size,
            metavar="HxW",
            help=f"pixel height and width (default {size[0]}x{size[1]})",
        )
    for command in (prepare, decode, verify):
        command.add_argument(
            "--vae",
            metavar="DIR_OR_REPO",
            help="a Cosmos3 checkpoint: a folder with vae/ in it, a file of weights, or a Hugging "
            "Face repository "
            "(default: random weights of the same topology, which make meaningless latents)",
        )
        command.add_argument("--device", type=device_option, default="cpu", help="default cpu")
    for command in (prepare, decode):
        command.add_argument(
            "--vae-dtype",
            type=dtype_option,
            help="dtype the network computes in (default float32 on cpu, bfloat16 elsewhere)",
        )

    info = commands.add_parser("info", help="list every op and backend as available or not")
    info.set_defaults(run=_info)
    return parser


def _seed(text: str) -> int:
    try:
        seed = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"want an integer, got {text!r}") from None
    if not -(2**63) <= seed < 2**64:
        raise argparse.ArgumentTypeError(f"want an integer in [-2^63, 2^64), got {seed}")
    return seed


def _frames(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"want integers such as 0,1, got {text!r}") from None


def _prepare(args: argparse.Namespace) -> int:
    from cosmos3_fast.images.load import load_frames, normalize_frames
    from cosmos3_fast.latents import LatentPreparation, check_request

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file name need not be text
            stream.reconfigure(errors="backslashreplace")
    start = time.perf_counter()
    inputs = [args.image, *([args.vae] if args.vae else [])]
    out = check_target(args.out, "--out", inputs)
    preview = check_target(args.preview, "--preview", inputs) if args.preview else None
    if preview is not None:
        if preview == out:
            raise UserError(f"--out and --preview are the same file: {out}")
        if preview.suffix.lower() != ".png":
            raise UserError(f"--preview must end in .png, got {args.preview!r}")
    height, width = args.size
    source = VaeSource(args.vae)
    progress = Progress()
    # Before the weights are loaded, which takes seconds; the stage checks again with their factors.
    factor = 16 if args.vae is None else 1
    check_request(args.num_frames, height, width, args.condition_frames, spatial_factor=factor)
    needed = pixel_frames(conditioned_span(args.condition_frames))
    _check_memory(args.num_frames, needed, height, width)
    mode: Mode = args.mode
    clips = args.condition_frames != (0,)
    vae_dtype = _vae_dtype(args)

    with progress.step(f"reading {args.image}"):
        frames = load_frames(
            args.image,
            height,
            width,
            max_frames=needed,
            keep=args.keep,
            background=args.background,
        )
    source.warn()
    with progress.step(f"loading the {'encoder' if mode == 'fast' else 'VAE'}"):
        stage = (
            LatentPreparation(source.encoder(vae_dtype, args.device, clips))
            if mode == "fast"
            else LatentPreparation(vae=source.vae(vae_dtype, args.device))
        )
    with progress.step(f"preparing {args.num_frames} frames of {height}x{width}, {mode} mode"):
        prepared = stage(
            frames[0],
            args.num_frames,
            height,
            width,
            args.condition_frames,
            seed=args.seed,
            dtype=DTYPES[args.dtype],
            mode=mode,
        )
    for name in ("latents", "condition_latents"):
        if not getattr(prepared, name).isfinite().all():
            raise UserError(
                f"the {name} hold NaN or infinite values, and are not written: the weights, or "
                f"--vae-dtype {str(vae_dtype).removeprefix('torch.')}, do not serve this picture"
            )
    metadata = {
        "cosmos3_fast": _version(),
        "torch": torch.__version__,
        "image": _text(Path(args.image).name),
        "height": str(height),
        "width": str(width),
        "num_frames": str(args.num_frames),
        "condition_frames": ",".join(str(frame) for frame in prepared.condition_frames),
        "seed": str(args.seed),
        "dtype": args.dtype,
        "mode": prepared.mode,
        "vae": _text(str(source)),
        "vae_dtype": str(vae_dtype).removeprefix("torch."),
        "device": args.device.type,
    }
    from safetensors.torch import save_file

    tensors = {
        name: getattr(prepared, name).contiguous().cpu()
        for name in ("latents", "velocity_mask", "condition_latents")
    }
    with contextlib.ExitStack() as stack:
        partial = stack.enter_context(replacing(out))
        save_file(tensors, partial, metadata)
        if preview is not None:
            from cosmos3_fast.images.preview import render_preview

            decoded = None
            if args.vae is not None:  # random weights would show noise
                with progress.step("decoding the first conditioned frame"):
                    first = prepared.condition_frames[0]
                    condition = prepared.condition_latents[:1, :, first : first + 1]
                    decoder = source.decoder(vae_dtype, args.device)
                    decoded = decoder(condition.to(args.device), output="uint8")[0]
            with progress.step("drawing the preview"):
                picture = render_preview(
                    normalize_frames(frames),
                    prepared,
                    title=f"{_text(Path(args.image).name)} as Cosmos3 latents",
                    notes=(
                        f"{args.num_frames} frames of {width}x{height}, seed {args.seed}, "
                        f"{args.dtype}, {prepared.mode} mode",
                        f"VAE: {Path(args.vae).name}"
                        if args.vae
                        else f"VAE: {source}; the latents mean nothing to a model",
                    ),
                    decoded=decoded,
                )
                partial_preview = stack.enter_context(replacing(preview))
                picture.save(partial_preview, format="PNG")

    print(f"{out}: {prepared.mode} mode, {time.perf_counter() - start:.1f} s in all")
    for name, tensor in tensors.items():
        print(f"  {name:<18}{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}")
    if preview is not None:
        print(f"{preview}: {picture.width}x{picture.height} picture")
    return 0


def _vae_dtype(args: argparse.Namespace) -> torch.dtype:
    return DTYPES[args.vae_dtype or ("float32" if args.device.type == "cpu" else "bfloat16")]


@torch.no_grad()
def _decode(args: argparse.Namespace) -> int:
    from PIL import Image
    from safetensors import safe_open

    out = check_target(args.out, "--out", [args.latents, *([args.vae] if args.vae else [])])
    if out.suffix.lower() != ".png":
        raise UserError(f"--out must end in .png, got {args.out!r}")
    if not Path(args.latents).is_file():
        raise UserError(f"{args.latents!r} is no file")
    with safe_open(args.latents, framework="pt", device="cpu") as file:
        if "latents" not in file.keys():  # noqa: SIM118 - no mapping
            raise UserError(f"{args.latents!r} has no tensor `latents`")
        shape = file.get_slice("latents").get_shape()
        if len(shape) != 5 or 0 in shape:
            raise UserError(f"`latents` must have shape [B, z, T, h, w], got {shape}")
        if not 0 <= args.frame < shape[2]:
            raise UserError(f"--frame must be in [0, {shape[2]}), got {args.frame}")
        latents = file.get_slice("latents")[:1, :, args.frame : args.frame + 1]
    source = VaeSource(args.vae)
    source.warn()
    progress = Progress()
    with progress.step("loading the decoder"):
        decoder = source.decoder(_vae_dtype(args), args.device)
    with progress.step(f"decoding latent frame {args.frame}"):
        picture = decoder(latents.to(args.device), output="uint8")[0].cpu()
    with replacing(out) as partial:
        Image.fromarray(picture.numpy()).save(partial, format="PNG")
    print(f"{out}: {picture.shape[1]}x{picture.shape[0]} picture of latent frame {args.frame}")
    return 0


def _text(name: str) -> str:
    """A file name as text: bytes that are not UTF-8 are written out."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _check_memory(num_frames: int, needed: int, height: int, width: int) -> None:
    """Refuse what cannot fit this machine before anything is loaded; a lower bound."""
    latents = 16 * latent_frames(num_frames) * (height // 16) * (width // 16)
    pixels = 3 * needed * height * width
    # Noise, latents and the file's copy in 16 bits; pixels as bytes and once as numbers.
    bytes_needed = 3 * 2 * latents + 3 * pixels
    try:
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return
    if bytes_needed > available:
        raise UserError(
            f"{num_frames} frames of {height}x{width} need at least {bytes_needed / 1e9:.3g} GB of "
            f"memory, this machine has {available / 1e9:.3g}"
        )


def _version() -> str:
    import cosmos3_fast

    return str(getattr(cosmos3_fast, "__version__", "unknown"))


@torch.no_grad()
def _verify(args: argparse.Namespace) -> int:
    from cosmos3_fast.images.load import load_pixels
    from cosmos3_fast.vae import FrameDecoder, FrameEncoder
    from cosmos3_fast.vae.live.exact import decode_sample, denormalize_latents, encode_exact

    height, width = args.size
    source = VaeSource(args.vae)
    progress = Progress()
    if args.image is not None:
        pixels = load_pixels(args.image, height, width)
    else:
        generator = torch.Generator().manual_seed(0)
        pixels = torch.rand(1, 3, height, width, generator=generator) * 2 - 1
    source.warn()
    rows: list[tuple[str, Comparison]] = []
    psnr: dict[str, float] = {}
    dtypes = args.dtypes or list(DTYPES)
    if args.dtypes is None and args.device.type == "cpu":
        dtypes.remove("float16")
        print("float16 is left out on a CPU; ask for it with --dtypes fp16", file=sys.stderr)
    for name in dtypes:
        dtype = DTYPES[name]
        with progress.step(f"{name}: loading the VAE and folding it"):
            vae = source.vae(dtype, args.device, decodes=True)
            encoder = FrameEncoder.from_vae(vae, dtype=dtype)
            decoder = FrameDecoder.from_vae(vae, dtype=dtype)
        factor = encoder.spatial_factor
        if height % factor or width % factor:
            raise UserError(f"--size must be multiples of {factor}, got {height}x{width}")
        rounded = pixels.to(args.device, dtype)
        with progress.step(f"{name}: folded encoder and decoder"):
            fast = encoder(rounded)
            # Both sides decode what the VAE's own decode is given.
            own_scale = denormalize_latents(fast, vae.config)
            picture = decoder.decode_unnormalized(own_scale)
        with progress.step(f"{name}: the VAE's encoder and decoder"):
            latents = encode_exact(vae, rounded[:, :, None])
            reference = decode_sample(vae, own_scale)
        psnr[name] = peak_signal_to_noise(picture[:, :, 0], pixels.to(args.device))
        exact_latents = exact_picture = None
        if dtype != torch.float32:
            with progress.step(f"{name}: the VAE in float64"):
                vae = vae.double()
                exact_latents = encode_exact(vae, rounded[:, :, None].double())
                exact_picture = decode_sample(vae, own_scale.double())
        rows.append(("encoder", compare(fast, latents, exact_latents)))
        rows.append(("decoder", compare(picture, reference, exact_picture)))
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


def _info(args: argparse.Namespace) -> int:
    from cosmos3_fast.cli.info import format_info

    print(format_info())
    return 0
