"""`python -m cosmos3_fast encode`: a dataset of pictures to a folder of latents."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from cosmos3_fast.bulk.buckets import areas_option
from cosmos3_fast.bulk.contact import write_contact_sheet
from cosmos3_fast.bulk.damage import check
from cosmos3_fast.bulk.job import SHARD_SIZE, encode
from cosmos3_fast.cli.options import UserError, add_vae, dtype_option, size_option, vae_of


def add_encode(commands: Any) -> None:
    """Register the command with argparse's subparsers."""
    parser = commands.add_parser(
        "encode",
        help="a dataset of pictures or clips to latents",
        description="Encode every picture or clip of a source once, to safetensors shards and a "
        "Parquet manifest. Run it again after it was stopped: it goes on where it was. Exit status "
        "0 also where pictures are broken (they are listed in errors.parquet), 1 with --strict.",
    )
    parser.add_argument(
        "source",
        nargs="*",
        metavar="SOURCE",
        help="a folder, a quoted pattern, a text file of paths, a Parquet file with a column of "
        "bytes, a WebDataset tar, a zip or a picture; a path or an fsspec URL. With --check none: "
        "the folder is only checked, with exit status 1 where it is damaged",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--size", type=size_option, metavar="HxW", help="of every sample (default 480x832)"
    )
    size.add_argument(
        "--bucket",
        type=areas_option,
        default=(),
        metavar="AREA[,...]",
        help="areas such as 0.25M,1M (1M is 1024x1024): each picture gets the size next to its "
        "own aspect ratio",
    )
    parser.add_argument("--batch-size", type=int, default=8, help="default 8")
    parser.add_argument(
        "--workers", type=int, help="processes that read pictures (default: by the cores)"
    )
    parser.add_argument(
        "--dtype", type=dtype_option, default="bfloat16", help="of the latents (default bfloat16)"
    )
    add_vae(parser)
    parser.add_argument(
        "--clips",
        type=int,
        default=1,
        metavar="FRAMES",
        help="take the first so many frames, 1 + 4k, of a video or animation (default 1)",
    )
    parser.add_argument(
        "--shard-size", type=int, default=SHARD_SIZE, help=f"samples (default {SHARD_SIZE})"
    )
    parser.add_argument("--column", help="of a Parquet file, the one with the bytes or paths")
    parser.add_argument(
        "--background",
        metavar="COLOR",
        help="paint it behind transparent pixels (default: alpha is dropped, as in the engines)",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="compare the checksum of every shard; what is damaged is encoded again",
    )
    parser.add_argument(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="encode on a Ray cluster, at ADDRESS or started here",
    )
    parser.add_argument(
        "--cores", type=int, help="with --ray on CPUs, of each encoder (default: a whole node)"
    )
    parser.add_argument(
        "--preview", type=int, metavar="N", help="also draw N samples, decoded, to preview.png"
    )
    parser.add_argument(
        "--strict", action="store_true", help="exit status 1 if a picture could not be encoded"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if not args.source:
        if not args.check:
            raise UserError("the following arguments are required: SOURCE")
        return _check(args.out)
    vae_of(args.vae)
    summary = encode(
        args.source,
        args.out,
        vae=args.vae,
        size=args.size,
        buckets=args.bucket,
        batch_size=args.batch_size,
        workers=args.workers,
        dtype=args.dtype,
        vae_dtype=args.vae_dtype,
        device=args.device,
        clips=args.clips,
        shard_size=args.shard_size,
        column=args.column,
        background=args.background,
        check=args.check,
        ray=args.ray,
        cores=args.cores,
        progress=sys.stderr.isatty(),
    )
    if args.preview is not None:
        picture = write_contact_sheet(args.out, args.preview, args.vae, args.vae_dtype, args.device)
        print(f"{picture}: {args.preview} samples at most, decoded")
    print("\n".join(summary.lines()))
    return 1 if args.strict and summary.failures else 0


def _check(folder: str) -> int:
    damaged = check(folder)
    print(f"{folder}: {len(damaged)} damaged files")
    for each in damaged:
        print(f"  {each}")
    return 1 if damaged else 0
