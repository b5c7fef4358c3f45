"""`encode`: a source of pictures and clips to a folder of latents."""

from __future__ import annotations

import os
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from cosmos3_fast.arguments import dtype_name, positive_int, quoted
from cosmos3_fast.bulk.buckets import Sizes
from cosmos3_fast.bulk.damage import find_damage, set_aside
from cosmos3_fast.bulk.folder import Folder, Settings
from cosmos3_fast.bulk.keys import KeySet
from cosmos3_fast.bulk.local import run_local
from cosmos3_fast.bulk.manifest import read_manifest, read_names, write_errors
from cosmos3_fast.bulk.reading import Reader
from cosmos3_fast.bulk.shards import ShardWriter
from cosmos3_fast.bulk.sources import SourceLike, list_pieces
from cosmos3_fast.bulk.summary import Summary
from cosmos3_fast.frames import is_whole
from cosmos3_fast.images.decode import Color, parse_color
from cosmos3_fast.ops.checks import LATENT_DTYPES
from cosmos3_fast.vae.source import VaeSource, compute_dtype

SHARD_SIZE = 256


def encode(
    source: SourceLike,
    out: str | os.PathLike[str],
    *,
    vae: Any = None,
    size: tuple[int, int] | None = None,
    buckets: tuple[int, ...] = (),
    batch_size: int = 8,
    workers: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    vae_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    clips: int = 1,
    shard_size: int = SHARD_SIZE,
    column: str | None = None,
    background: Color | None = None,
    check: bool = False,
    ray: str | None = None,
    cores: int | None = None,
    progress: bool = False,
) -> Summary:
    """Encode every picture or clip of a source once, into a folder that `LatentDataset` reads.

    A run that was stopped, in whatever way, is continued by the same call: what has latents is
    skipped, by the hash of its content. A picture that cannot be read is a row in errors.parquet.

    Args:
        source: a folder, pattern, list, Parquet file, tar, zip or picture, here or at an fsspec
            URL; or a sequence of them (see `sources.list_pieces`).
        out: the folder to write, on a disk of this machine, no URL; made if missing.
        vae: a checkpoint (as for `FrameEncoder.from_pretrained`), a live VAE, a `FrameEncoder` or
            `ClipEncoder`; None: seeded random weights, whose latents mean nothing.
        size: (height, width) of every sample; default (480, 832), unless there are buckets.
        buckets: areas in pixels; each picture gets the size of about its own aspect ratio
            (`buckets.Sizes` has the formula).
        batch_size: pictures of one size that are encoded together.
        workers: processes that read and resize; 0: none. None: one for 16 cores, or with a GPU one
            for each core but one, at most 16.
        dtype: of the latents: float32, bfloat16 or float16.
        vae_dtype: in which the encoder computes; default float32 on a CPU, bfloat16 elsewhere, or
            that of the encoder that was given.
        device: of the encoder.
        clips: the most pixel frames, 1 + 4k, that are taken of an animation or video, from its
            start; shorter ones give the most 1 + 4k that they have.
        shard_size: samples per shard; also what a killed run may have to encode again.
        column: of Parquet files, the one with the bytes, or with paths.
        background: painted behind transparent pixels (see `load.load_pixels`).
        check: compare the checksum of every shard that is there. Without it only sizes are. What
            is damaged is set aside, under a name that ends in .damaged, and encoded again.
        ray: None: encode in this process. Otherwise on a Ray cluster, one that this process is
            connected to, or at this address, as `ray.init` takes it; "local" starts Ray here.
            `out` must then be at the same path on every node, and so must a local `source` and a
            `vae` that is a path. A picture that stands twice in the source is encoded twice where
            two nodes meet it at once, and still is one sample.
        cores: with Ray on CPUs, of each encoder; None: those of the smallest node.
        progress: show a bar on stderr; with Ray its own.

    Returns:
        What was done. The folder's files are described in `cosmos3_fast.bulk.folder`.

    Raises:
        SourceError: nothing to encode.
        FolderError: the folder holds latents made with other settings, or another run has it.
        OSError: a file cannot be written (a full disk): what was written before stays good.
        ValueError, TypeError: an argument out of range.
    """
    _check_packages(ray is not None)
    batch_size = positive_int("batch_size", batch_size)
    shard_size = positive_int("shard_size", shard_size)
    clips = positive_int("clips", clips)
    if not is_whole(clips):
        raise ValueError(f"clips must be 1 + 4k frames, got {clips}")
    if dtype not in LATENT_DTYPES:
        dtypes = [str(each) for each in LATENT_DTYPES]
        raise ValueError(f"dtype must be one of {dtypes}, got {dtype}")
    folder, weights, device = Folder(out), VaeSource(vae), torch.device(device)
    vae_dtype = compute_dtype(vae_dtype, device)
    cores = None if cores is None else positive_int("cores", cores)
    # The nodes of a cluster have encoders of their own; this one only tells what it is.
    encoder = weights.encoder(vae_dtype, device if ray is None else torch.device("cpu"), clips > 1)
    workers = _workers(workers, encoder.device)
    size = (480, 832) if size is None and not buckets else size
    sizes = Sizes(size and (int(size[0]), int(size[1])), tuple(buckets), encoder.spatial_factor)

    left_out: Counter[str] = Counter()
    pieces = list_pieces(source, column, exclude=folder.path, left_out=left_out)
    settings = Settings(
        weights.fingerprint(clips > 1),
        dtype_name(dtype),
        dtype_name(encoder.dtype),
        sizes.fixed,
        sizes.areas,
        clips,
        None if background is None else str(parse_color(background)),
    )
    folder.create()
    with folder.lock():
        folder.settle(settings)
        damaged = list(find_damage(folder, check))
        for each in damaged:
            set_aside(folder, each)
        folder.clean()
        known = KeySet(read_manifest(folder)["key"].to_pylist())
        names = {name for each in read_names(folder).values() for name in each}
        reader = Reader(sizes, clips, known, background)
        summary = Summary(Path(out), left_out=left_out, damaged=damaged)
        start = time.perf_counter()
        if ray is None:
            with ShardWriter(folder, settings, shard_size) as writer:
                run_local(
                    pieces,
                    reader,
                    encoder,
                    writer,
                    summary,
                    names=names,
                    batch_size=batch_size,
                    workers=workers,
                    dtype=dtype,
                    progress=progress,
                )
        else:
            from cosmos3_fast.bulk.ray_engine import run_ray

            run_ray(
                pieces,
                reader,
                weights.absolute(),
                folder,
                settings,
                summary,
                address=ray,
                names=names,
                batch_size=batch_size,
                shard_size=shard_size,
                vae_dtype=vae_dtype,
                device=device,
                cores=cores,
                progress=progress,
            )
        summary.seconds = time.perf_counter() - start
        write_errors(folder, summary.failures)
        summary.total = read_manifest(folder).num_rows
        # What Ray encoded twice counts once.
        summary.repeated += summary.samples - (summary.total - len(known))
        summary.samples = summary.total - len(known)
    return summary


def _check_packages(with_ray: bool) -> None:
    extras = {"bulk": ("pyarrow", "tqdm", "fsspec"), "ray": ("ray",) if with_ray else ()}
    for extra, packages in extras.items():
        if missing := [name for name in packages if not _found(name)]:
            raise ImportError(
                f"cosmos3_fast.bulk needs {', '.join(missing)}: pip install 'cosmos3-fast[{extra}]'"
            )


def _found(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ValueError:  # it stands in sys.modules as None: its import is blocked
        return False


def _workers(workers: int | None, device: torch.device) -> int:
    if workers is None:
        cores = len(os.sched_getaffinity(0))
        return max(1, cores // 16 if device.type == "cpu" else min(16, cores - 1))
    if workers == 0:
        return 0
    if isinstance(workers, bool) or workers < 0:
        raise ValueError(f"workers must be 0 or more, got {quoted(workers)}")
    return positive_int("workers", workers)
