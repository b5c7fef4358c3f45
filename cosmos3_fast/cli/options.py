"""What the options of several commands mean, and what commands say while they run."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import time
from collections.abc import Callable, Iterator

import torch

from cosmos3_fast.arguments import dtype_name
from cosmos3_fast.memory import why_not_in_memory
from cosmos3_fast.ops.checks import LATENT_DTYPES
from cosmos3_fast.vae.source import SYNTHETIC_SEED, VaeSource

DTYPES = {dtype_name(dtype): dtype for dtype in LATENT_DTYPES}
_SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


class UserError(Exception):
    """A fault of the command line or its inputs: one line, no traceback, exit status 2."""


def size_option(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text.strip().lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"must be HEIGHTxWIDTH such as 480x832, got {text!r}")
    return int(match[1]), int(match[2])


def dtype_option(text: str) -> torch.dtype:
    name = text.strip().lower()
    name = _SHORT_DTYPES.get(name, name)
    if name not in DTYPES:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(DTYPES)}, got {text!r}")
    return DTYPES[name]


def device_option(text: str) -> torch.device:
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used: {reason}") from None
    return device


def add_size(parser: argparse.ArgumentParser, height: int, width: int) -> None:
    parser.add_argument(
        "--size",
        type=size_option,
        default=(height, width),
        metavar="HxW",
        help=f"pixel height and width (default {height}x{width})",
    )


def add_vae(parser: argparse.ArgumentParser, with_dtype: bool = True) -> None:
    """`--vae`, `--device` and, unless the command has others, `--vae-dtype`."""
    parser.add_argument(
        "--vae",
        metavar="DIR_OR_REPO",
        help="a Cosmos3 checkpoint: a folder with vae/ in it, a file of weights, or a Hugging "
        "Face repository "
        "(default: random weights of the same topology, which make meaningless latents)",
    )
    parser.add_argument("--device", type=device_option, default="cpu", help="default cpu")
    if with_dtype:
        parser.add_argument(
            "--vae-dtype",
            type=dtype_option,
            help="dtype the network computes in (default float32 on cpu, bfloat16 elsewhere)",
        )


def vae_of(checkpoint: str | None) -> VaeSource:
    """The VAE that `--vae` names; that its weights are random is said on stderr."""
    if checkpoint is None:
        print(
            "NOTE: no --vae given. Using RANDOM weights of the Cosmos3 VAE's topology (seed "
            f"{SYNTHETIC_SEED}): the latents are MEANINGLESS to a Cosmos3 model.",
            file=sys.stderr,
        )
    return VaeSource(checkpoint)


def check_memory(what: str, needed: int, device: torch.device | None = None) -> None:
    """Refuse what cannot fit, before anything is done for it.

    Args:
        what: the subject of the message, in the plural.
        needed: bytes, a lower bound.
        device: where; None: in this machine's memory.

    Raises:
        UserError: there is less memory, used or not.
    """
    reason = why_not_in_memory(what, needed, device)
    if reason is not None:
        raise UserError(reason)


@contextlib.contextmanager
def step(text: str) -> Iterator[None]:
    """One line on stderr, with the seconds that the block took."""
    start = time.perf_counter()
    print(f"{text} ...", file=sys.stderr, end="", flush=True)
    try:
        yield
    except BaseException:
        print(file=sys.stderr)
        raise
    print(f" {time.perf_counter() - start:.1f} s", file=sys.stderr)


@contextlib.contextmanager
def counted(text: str, total: int) -> Iterator[Callable[[int], None]]:
    """`step` for work that is counted: on a terminal its line also says how much is done.

    Args:
        text: of the line.
        total: of what is counted.

    Yields:
        What to call with the number that is done.
    """
    shows = sys.stderr.isatty()

    def show(done: int) -> None:
        if shows:
            print(f"\r{text} ... {done} of {total}", file=sys.stderr, end="", flush=True)

    with step(text):
        yield show
        if shows:
            print(",", file=sys.stderr, end="")
