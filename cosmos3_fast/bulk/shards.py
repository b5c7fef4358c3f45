"""Shards: safetensors files of latents, each followed by its rows of the manifest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from safetensors.torch import save
from torch import Tensor

from cosmos3_fast import __version__
from cosmos3_fast.bulk.folder import Folder, Settings, write_bytes
from cosmos3_fast.bulk.manifest import (
    manifest_schema,
    sample_row,
    write_names,
    write_table,
)
from cosmos3_fast.bulk.reading import Known, Sample

Encoded = tuple[Sample, Tensor]
"""A sample and its latents [z, t, h, w]."""


def write_shard(folder: Folder, settings: Settings, samples: Sequence[Encoded]) -> None:
    """Write a shard, then its rows.

    Its name is a hash of the keys in it, so that a task which is run again replaces what it wrote.
    Keys that are there twice are written once.
    """
    by_key = {sample.key: (sample, latents) for sample, latents in reversed(samples)}
    ordered = list(reversed(by_key.values()))
    name = part_name(list(reversed(by_key)))
    content = save(
        {sample.key: latents.contiguous() for sample, latents in ordered},
        {"cosmos3_fast": __version__, "vae_hash": settings.vae_hash},
    )
    offsets, digest = tensor_offsets(content), hashlib.sha256(content).hexdigest()
    rows = [
        {
            "key": sample.key,
            **sample_row(sample),
            "latent_shape": list(latents.shape),
            "dtype": settings.dtype,
            "shard": f"{name}.safetensors",
            "offset": offsets[sample.key],
            "shard_bytes": len(content),
            "shard_sha256": digest,
            "vae_hash": settings.vae_hash,
            "package_version": __version__,
        }
        for sample, latents in ordered
    ]
    write_bytes(folder.shards / f"{name}.safetensors", content)
    write_table(folder.manifest / f"{name}.parquet", rows, manifest_schema())
    repeated = [
        Known(sample.source, sample.content_hash)
        for sample, _ in samples
        if sample is not by_key[sample.key][0]
    ]
    if repeated:
        write_names(folder, repeated, name)


def part_name(parts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def tensor_offsets(content: bytes) -> dict[str, int]:
    """Where each tensor begins in a safetensors file: a length of 8 bytes, a JSON header, data."""
    length = int.from_bytes(content[:8], "little")
    header: dict[str, Any] = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items()}


class ShardWriter:
    """Collects samples and writes a shard whenever it is full, and the rest at the end.

    Used as a context. When the block fails, what was encoded until then is still written, unless
    it is writing that fails.

    Args:
        folder: to write to.
        settings: of the folder.
        shard_size: samples per shard.
    """

    def __init__(self, folder: Folder, settings: Settings, shard_size: int) -> None:
        self._folder, self._settings, self._size = folder, settings, shard_size
        self._samples: list[Encoded] = []
        self._names: list[Known] = []

    def add(self, sample: Sample, latents: Tensor) -> None:
        self._samples.append((sample, latents))
        if len(self._samples) == self._size:
            self._write()

    def add_name(self, known: Known) -> None:
        """A further name of a sample that was added, or is in the folder."""
        self._names.append(known)

    def _write(self) -> None:
        samples, self._samples = self._samples, []
        names, self._names = self._names, []
        if samples:
            write_shard(self._folder, self._settings, samples)
        if names:
            part = part_name([f"{each.content_hash} {each.source}" for each in names])
            write_names(self._folder, names, part)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not isinstance(error, OSError):
            self._write()
