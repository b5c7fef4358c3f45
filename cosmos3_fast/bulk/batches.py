"""Batches of pictures that have one shape, and their way through the encoder."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cosmos3_fast.bulk.reading import Failure, Sample
from cosmos3_fast.vae import FrameEncoder
from cosmos3_fast.vae.source import Encoder

BROKEN = (
    "its latents hold NaN or infinite values: the weights, or the dtype the encoder computes in, "
    "do not serve this picture"
)


_SHARED_MEMORY = "/dev/shm"


@dataclass
class Batch:
    """Pictures of one shape: what is known of them, and uint8 [B, T, H, W, 3]."""

    samples: list[Sample]
    pixels: Tensor

    def share(self, senders: int) -> Batch | Sent:
        """What a worker sends of it: through shared memory, or where that is too small, a pipe.

        A process that writes to more shared memory than there is, is killed, and in a container
        there are often 64 MB of it.

        Args:
            senders: processes that may do so at the same time.
        """
        try:
            status = os.statvfs(_SHARED_MEMORY)
            fits = status.f_bavail * status.f_frsize >= 2 * senders * self.pixels.nbytes
            if fits:
                self.pixels.share_memory_()  # now, while it is known to fit
                return self
        except (OSError, RuntimeError):  # there is none, or another process was faster
            pass
        return Sent(self.samples, self.pixels.numpy())

    def results(self, latents: Tensor) -> Iterator[tuple[Sample, Tensor | Failure]]:
        """Each sample with its latents [z, t, h, w] on the CPU, or why it has none."""
        finite = latents.isfinite().flatten(1).all(1).tolist()
        for sample, own, good in zip(self.samples, latents.cpu(), finite, strict=True):
            failure = Failure(
                sample.source, sample.file_index, sample.row, sample.content_hash, BROKEN
            )
            # A copy: a view would keep the whole batch.
            yield sample, own.clone() if good else failure


@dataclass
class Sent:
    """A batch on its way through a pipe, in which an array travels by its values."""

    samples: list[Sample]
    pixels: np.ndarray

    def received(self) -> Batch:
        return Batch(self.samples, torch.from_numpy(self.pixels))


class Batcher:
    """Sorts pictures by shape; a batch is full with `size` of them."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._waiting: dict[torch.Size, list[tuple[Sample, Tensor]]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def add(self, sample: Sample, pixels: Tensor) -> list[Batch]:
        """The batch that this picture completes, if it does."""
        waiting = self._waiting.setdefault(pixels.shape, [])
        waiting.append((sample, pixels))
        return [self._batch(pixels.shape)] if len(waiting) == self._size else []

    def add_batch(self, batch: Batch, keep: Sequence[bool]) -> list[Batch]:
        """The batch that some pictures of another one complete; a full one is taken as it is."""
        if len(batch.samples) == self._size and all(keep):
            return [batch]
        full: list[Batch] = []
        for sample, pixels, kept in zip(batch.samples, batch.pixels, keep, strict=True):
            if kept:
                full += self.add(sample, pixels)
        return full

    def rest(self) -> list[Batch]:
        """What is left, in batches that are not full."""
        return [self._batch(shape) for shape in list(self._waiting)]

    def _batch(self, shape: torch.Size) -> Batch:
        waiting = self._waiting.pop(shape)
        return Batch(
            [sample for sample, _ in waiting], torch.stack([pixels for _, pixels in waiting])
        )


@torch.inference_mode()
def encode_batch(encoder: Encoder, batch: Batch, dtype: torch.dtype) -> Tensor:
    """Latents [B, z, t, h, w] in `dtype`, on the encoder's device, which may still be at work."""
    pixels = batch.pixels
    if encoder.device.type == "cuda":  # from pinned memory the copy does not wait for the GPU
        pixels = pixels.pin_memory().to(encoder.device, non_blocking=True)
    frames = pixels[:, 0] if isinstance(encoder, FrameEncoder) else pixels
    return encoder(frames).to(dtype)
