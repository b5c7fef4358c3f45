"""The engine without further dependencies: DataLoader workers read while the encoder runs."""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from cosmos3_fast.bulk.batches import Batch, Batcher, Sent, encode_batch
from cosmos3_fast.bulk.reading import Failure, Known, Reader, Sample
from cosmos3_fast.bulk.shards import ShardWriter
from cosmos3_fast.bulk.sources import Piece, read_piece
from cosmos3_fast.bulk.summary import Summary, known_total, progress_bar
from cosmos3_fast.vae.source import Encoder

_PREFETCHED = 2
_PR_SET_PDEATHSIG = 1


@dataclass
class Message:
    """What a worker sends: pictures that it read, their pixels stacked by shape."""

    batches: list[Batch | Sent] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    known: list[Known] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        samples = sum(len(batch.samples) for batch in self.batches)
        return samples + len(self.failures) + len(self.known)


class Reading(IterableDataset[Message]):
    """The messages of one worker, of `size` pictures each."""

    def __init__(self, pieces: Sequence[Piece], reader: Reader, size: int) -> None:
        self._pieces, self._reader, self._size = pieces, reader, size

    def __iter__(self) -> Iterator[Message]:
        worker = get_worker_info()
        part, parts = (worker.id, worker.num_workers) if worker else (0, 1)
        message, pixels = Message(), Batcher(self._size)

        def sendable(batches: list[Batch]) -> list[Batch | Sent]:
            return [batch.share(parts) if worker else batch for batch in batches]

        for piece in self._pieces:
            for item in read_piece(piece, part, parts, message.left_out):
                match self._reader.read(item):
                    case Failure() as failure:
                        message.failures.append(failure)
                    case Known() as known:
                        message.known.append(known)
                    case (sample, frames):
                        message.batches += sendable(pixels.add(sample, frames))
                if len(message) + len(pixels) >= self._size:
                    message.batches += sendable(pixels.rest())
                    yield message
                    message = Message()
        message.batches += sendable(pixels.rest())
        if len(message) or message.left_out:
            yield message


def run_local(
    pieces: Sequence[Piece],
    reader: Reader,
    encoder: Encoder,
    writer: ShardWriter,
    summary: Summary,
    *,
    names: set[str],
    batch_size: int,
    workers: int,
    dtype: torch.dtype,
    progress: bool,
) -> None:
    """Encode everything that the reader does not know.

    Args:
        pieces: of the source.
        names: under which samples of the folder are known; others are added to them.
        batch_size: pictures of one shape that are encoded together.
        workers: processes that read; 0: this one does, in turns with the encoder.
        dtype: of the latents.
        progress: show a bar.
    """
    loader = DataLoader(
        Reading(pieces, reader, batch_size),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=_PREFETCHED if workers else None,
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=functools.partial(_end_with, os.getpid()),
    )
    waiting = Batcher(batch_size)
    seen: set[str] = set()

    def note(sample: Sample, latents: Tensor | Failure) -> None:
        if isinstance(latents, Failure):
            summary.failures.append(latents)
            return
        writer.add(sample, latents)
        summary.samples += 1

    def is_new(sample: Sample) -> bool:
        if sample.key in seen:
            summary.repeated += 1
            _name(Known(sample.source, sample.content_hash), names, writer)
            return False
        seen.add(sample.key)
        if sample.warnings:
            summary.warnings[sample.warnings] += 1
        return True

    running: tuple[Batch, Tensor] | None = None

    def encode(batch: Batch | None) -> None:
        """Start on a batch, then take up what the one before it gave: a GPU is kept busy so."""
        nonlocal running
        before = running
        running = None if batch is None else (batch, encode_batch(encoder, batch, dtype))
        if before is not None:
            for sample, latents in before[0].results(before[1]):
                note(sample, latents)

    with progress_bar(known_total([piece.rows for piece in pieces]), progress) as bar:
        for message in _started(loader):
            summary.failures += message.failures
            summary.left_out += message.left_out
            for known in message.known:
                summary.known += 1
                _name(known, names, writer)
            for sent in message.batches:
                batch = sent.received() if isinstance(sent, Sent) else sent
                for full in waiting.add_batch(batch, list(map(is_new, batch.samples))):
                    encode(full)
            bar.update(len(message))
        for rest in waiting.rest():
            encode(rest)
        encode(None)


def _started(loader: DataLoader[Message]) -> Iterator[Message]:
    """The messages of a loader, whose workers do not collect the garbage of this process.

    A worker that frees, say, a video's decoder waits for its threads, which a fork does not copy.
    """
    gc.collect()
    gc.freeze()
    try:
        return iter(loader)
    finally:
        gc.unfreeze()


def _end_with(driver: int, worker: int) -> None:
    """Have the kernel end this worker with the process that started it.

    torch's own watch misses a driver that is killed while the worker starts.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != driver:
        os._exit(1)


def _name(known: Known, names: set[str], writer: ShardWriter) -> None:
    if known.source not in names:
        names.add(known.source)
        writer.add_name(known)
