"""The engine for clusters: Ray Data reads, encodes and writes, with its own retries and limits.

Three stages stream into each other: read tasks decode and resize (`PictureSource`), an actor per
GPU, or per so many cores, encodes (`Encode`), and write tasks write shards (`ShardSink`). Tasks of
a process or node that is gone are run again by Ray; a shard that is written again has the same name
and content.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import torch
from ray.data import ActorPoolStrategy, DataContext, Datasink, Datasource, ReadTask
from ray.data.block import BlockMetadata
from ray.data.exceptions import SystemException, UserCodeException

from cosmos3_fast.bulk.batches import Batcher, encode_batch
from cosmos3_fast.bulk.folder import Folder, Settings
from cosmos3_fast.bulk.keys import KeySet
from cosmos3_fast.bulk.manifest import sample_row, sample_schema, write_names
from cosmos3_fast.bulk.reading import Failure, Known, Reader, Sample
from cosmos3_fast.bulk.shards import part_name, write_shard
from cosmos3_fast.bulk.sources import Piece, read_piece
from cosmos3_fast.bulk.summary import Summary
from cosmos3_fast.vae.source import VaeSource

if TYPE_CHECKING:
    import pyarrow as pa

# What a row is: pixels to encode, why there are none, or a picture whose content is known, under
# this name or under another one.
PIXELS, FAILURE, KNOWN, NAMED = "pixels", "failure", "known", "named"
# A row of a file that is left out; its source is the suffix.
LEFT_OUT = "left out"
_ROWS_PER_BLOCK = 16
# Reading is a few hundredths of encoding on a CPU, writing less.
_SMALL_SHARE = 0.25
_MOST_TASKS = 5000
# With buckets, so many batches are sorted by shape at a time.
_SORTED_BATCHES = 8


def name_key(source: str) -> str:
    """A name of any length as one that a `KeySet` takes."""
    return hashlib.sha256(source.encode()).hexdigest()[:32]


def row_schema() -> pa.Schema:
    """The schema of rows between the stages: a sample, and its pixels or latents as bytes."""
    import pyarrow as pa

    extra = [
        ("status", pa.string()),
        ("reason", pa.string()),
        ("pixels", pa.large_binary()),
        ("latents", pa.large_binary()),
        ("latent_shape", pa.list_(pa.int32())),
    ]
    return pa.schema([*sample_schema(), *extra])


class PictureSource(Datasource):
    """Ray's reader of pictures: rows with `pixels`, uint8 [T, H, W, 3] as bytes.

    Args:
        pieces: of the source.
        reader: without its known keys, which are shared through Ray's object store.
        known: keys of samples that the folder has.
        names: `name_key` of their names.
        size: pictures per task, about.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        reader: Reader,
        known: Container[str],
        names: Container[str],
        size: int,
    ) -> None:
        super().__init__()
        self._pieces, self._reader = pieces, reader
        self._known, self._names = ray.put(known), ray.put(names)
        self._size = max(size, math.ceil(len(pieces) / _MOST_TASKS))

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self,
        parallelism: int,
        per_task_row_limit: int | None = None,
        data_context: DataContext | None = None,
    ) -> list[ReadTask]:
        tasks = []
        for group in _groups(self._pieces, self._size):
            metadata = BlockMetadata(
                num_rows=None,
                size_bytes=None,
                exec_stats=None,
                input_files=tuple(dict.fromkeys(piece.url for piece in group)),
            )
            read = _Read(group, self._reader, self._known, self._names)
            tasks.append(ReadTask(read, metadata, row_schema()))
        return tasks


def _groups(pieces: Sequence[Piece], size: int) -> Iterator[list[Piece]]:
    """Single pictures together, tars and row groups alone."""
    group: list[Piece] = []
    for piece in pieces:
        if piece.kind != "file":
            yield [piece]
            continue
        group.append(piece)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


@dataclass
class _Read:
    pieces: list[Piece]
    reader: Reader
    known: ray.ObjectRef
    names: ray.ObjectRef

    def __call__(self) -> Iterator[pa.Table]:
        import pyarrow as pa

        torch.set_num_threads(1)
        reader = dataclasses.replace(self.reader, known=ray.get(self.known))
        names = ray.get(self.names)
        rows: list[dict[str, Any]] = []
        left_out: Counter[str] = Counter()
        for piece in self.pieces:
            for item in read_piece(piece, left_out=left_out):
                match reader.read(item):
                    case Failure() as failure:
                        row = {**dataclasses.asdict(failure), "status": FAILURE}
                    case Known() as known:
                        named = name_key(known.source) in names
                        row = {**dataclasses.asdict(known), "status": KNOWN if named else NAMED}
                    case (sample, frames):
                        row = {**sample_row(sample), "status": PIXELS}
                        row["pixels"] = frames.numpy().tobytes()
                rows.append(row)
                if len(rows) == _ROWS_PER_BLOCK:
                    yield pa.Table.from_pylist(rows, schema=row_schema())
                    rows = []
        rows += [{"source": kind, "status": LEFT_OUT} for kind in left_out.elements()]
        yield pa.Table.from_pylist(rows, schema=row_schema())


class Encode:
    """Ray's actor: rows with `pixels` to rows with `latents`, in the bytes of the dtype."""

    def __init__(
        self,
        weights: ray.ObjectRef,
        vae_dtype: torch.dtype,
        device: str,
        clips: bool,
        batch_size: int,
        dtype: torch.dtype,
        threads: int,
    ) -> None:
        torch.set_num_threads(threads)
        given: VaeSource = ray.get(weights)
        self._encoder = given.encoder(vae_dtype, torch.device(device), clips).to(device)
        self._batch_size, self._dtype = batch_size, dtype

    def __call__(self, table: pa.Table) -> pa.Table:
        import pyarrow as pa

        pixels = table["pixels"]
        rows = table.drop_columns(["pixels", "latents", "latent_shape"]).to_pylist()
        by_place = {(row["file_index"], row["row"]): row for row in rows}
        batcher, batches = Batcher(self._batch_size), []
        for row, stored in zip(rows, pixels, strict=True):
            if row["status"] == PIXELS:
                sample = to_sample(row)
                shape = (sample.pixel_frames, sample.pixel_height, sample.pixel_width, 3)
                frames = np.frombuffer(stored.as_buffer(), np.uint8).reshape(shape)
                batches += batcher.add(sample, torch.from_numpy(frames.copy()))
        for batch in [*batches, *batcher.rest()]:
            latents = encode_batch(self._encoder, batch, self._dtype)
            for sample, own in batch.results(latents):
                row = by_place[sample.file_index, sample.row]
                if isinstance(own, Failure):
                    row.update(status=FAILURE, reason=own.reason)
                else:
                    row["latents"] = own.contiguous().view(torch.uint8).numpy().tobytes()
                    row["latent_shape"] = list(own.shape)
        return pa.Table.from_pylist(rows, schema=row_schema())


def to_sample(row: dict[str, Any]) -> Sample:
    values = {each.name: row[each.name] for each in dataclasses.fields(Sample)}
    return Sample(**{**values, "crop": tuple(values["crop"])})


@dataclass
class Written:
    """What a write task did."""

    samples: int = 0
    known: int = 0
    failures: list[Failure] = field(default_factory=list)
    warnings: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)


class ShardSink(Datasink[Written]):
    """Ray's writer of shards. The folder is on a disk that every node has at the same path."""

    def __init__(self, folder: Folder, settings: Settings, shard_size: int) -> None:
        self._folder, self._settings, self._size = folder, settings, shard_size
        self.written: list[Written] = []

    def write(self, blocks: Iterable[Any], ctx: Any) -> Written:
        written = Written()
        samples: list[tuple[Sample, torch.Tensor]] = []
        named: list[Known] = []
        dtype = getattr(torch, self._settings.dtype)
        for block in blocks:
            for row in block.to_pylist():
                if row["status"] == FAILURE:
                    names = (each.name for each in dataclasses.fields(Failure))
                    written.failures.append(Failure(**{name: row[name] for name in names}))
                elif row["status"] == LEFT_OUT:
                    written.left_out[row["source"]] += 1
                elif row["status"] == PIXELS:
                    values = torch.frombuffer(bytearray(row["latents"]), dtype=dtype)
                    samples.append((to_sample(row), values.reshape(row["latent_shape"])))
                    if row["warnings"]:
                        written.warnings[row["warnings"]] += 1
                else:
                    written.known += 1
                    if row["status"] == NAMED:
                        named.append(Known(row["source"], row["content_hash"]))
        for start in range(0, len(samples), self._size):
            write_shard(self._folder, self._settings, samples[start : start + self._size])
        if named:
            part = part_name([f"{each.content_hash} {each.source}" for each in named])
            write_names(self._folder, named, part)
        written.samples = len(samples)
        return written

    def on_write_complete(self, write_result: Any) -> None:
        self.written = list(write_result.write_returns)

    @property
    def min_rows_per_write(self) -> int:
        return self._size


def run_ray(
    pieces: Sequence[Piece],
    reader: Reader,
    weights: VaeSource,
    folder: Folder,
    settings: Settings,
    summary: Summary,
    *,
    address: str,
    names: Iterable[str],
    batch_size: int,
    shard_size: int,
    vae_dtype: torch.dtype,
    device: torch.device,
    cores: int | None,
    progress: bool,
) -> None:
    """Encode everything that the reader does not know, on a cluster.

    Args:
        address: "local" starts Ray on this machine, where it does not run yet; others are as
            `ray.init` takes them.
        names: under which samples of the folder are known.
        device: of each encoder: with "cuda" there is one for each GPU of the cluster.
        cores: of each encoder on a CPU; None: those of the smallest node.
        progress: show Ray's bars.
        others: see `local.run_local` and `bulk.encode`.
    """
    with _connected(address), _context(progress):
        on_gpu = device.type == "cuda"
        encoders, threads, share, small_share = _plan(on_gpu, cores)
        source = PictureSource(
            pieces,
            dataclasses.replace(reader, known=()),
            reader.known,
            KeySet(map(name_key, names)),
            2 * batch_size,
        )
        sink = ShardSink(folder, settings, shard_size)
        read_share = 1 if on_gpu else small_share
        data = ray.data.read_datasource(source, num_cpus=read_share).map_batches(
            Encode,
            batch_size=batch_size if reader.sizes.fixed else _SORTED_BATCHES * batch_size,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(min_size=1, max_size=encoders),
            fn_constructor_args=(
                ray.put(weights),
                vae_dtype,
                str(device),
                reader.max_frames > 1,
                batch_size,
                getattr(torch, settings.dtype),
                threads,
            ),
            num_cpus=share,
            num_gpus=1 if on_gpu else None,
        )
        try:
            data.write_datasink(sink, ray_remote_args={"num_cpus": small_share})
        except (ray.exceptions.RayError, UserCodeException, SystemException) as error:
            raise _cause(error) from error
    for written in sink.written:
        summary.samples += written.samples
        summary.known += written.known
        summary.failures += written.failures
        summary.warnings += written.warnings
        summary.left_out += written.left_out


def _cause(error: BaseException) -> Exception:
    """What a task failed of, such as a full disk, without Ray's tracebacks around it."""
    while (inner := getattr(error, "cause", None) or error.__cause__) is not None:
        error = inner
    if isinstance(error, OSError):
        return type(error)(error.errno, error.strerror, error.filename)
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return RuntimeError(f"the run on Ray failed: {lines[-1]}")


def _plan(on_gpu: bool, cores: int | None) -> tuple[int, int, float, float]:
    """How many encoders, the threads of each, and the CPUs that Ray is to count for it and for a
    task beside it."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if on_gpu:
        return max(1, int(sum(node.get("GPU", 0) for node in nodes))), 1, 1, _SMALL_SHARE
    cpus = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
    if not cpus:
        raise ValueError("the cluster must have a node with a CPU, got none")
    cores = min(cpus) if cores is None else cores
    encoders = max(1, sum(count // cores for count in cpus))
    # Room for one task that reads and one that writes beside it. Ray keeps an idle process for each
    # whole CPU that is free: with one free beside a single encoder, the process that read also
    # writes. Several encoders of so small a share might be placed on one node.
    small_share = 0.5 if encoders == 1 and cores > 1 else _SMALL_SHARE
    return encoders, cores, cores - 2 * small_share, small_share


@contextlib.contextmanager
def _connected(address: str) -> Iterator[None]:
    """Ray, which is left as it was found."""
    if ray.is_initialized():
        yield
        return
    ray.init(address=address, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _context(progress: bool) -> Iterator[None]:
    context = DataContext.get_current()
    before = context.enable_progress_bars
    context.enable_progress_bars = progress
    try:
        yield
    finally:
        context.enable_progress_bars = before
