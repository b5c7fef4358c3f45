"""`LatentDataset`: a folder of latents as a torch dataset."""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.utils.data import Dataset

from cosmos3_fast.arguments import as_int, quoted
from cosmos3_fast.bulk.folder import Folder, FolderError
from cosmos3_fast.bulk.manifest import read_manifest, read_names, sorted_by_name
from cosmos3_fast.vae.source import VaeSource

# Shards that are kept open; each takes a mapping of the process, not memory.
_OPEN_SHARDS = 64


class LatentDataset(Dataset[dict[str, Any]]):
    """The samples of a folder that `bulk.encode` wrote, sorted by name, whatever was added when.

    Numbers in names count by their value, so that frame 2 comes before frame 10.

    `dataset[i]` is a dictionary with

    - `latents`: [z, t, h, w], normalized, in the folder's dtype, in memory of its own;
    - `source`: the name of the picture or clip;
    - `key`: 32 hexadecimal digits, half of the SHA-256 of its file;
    - `size`: (height, width) of the upright picture;
    - `crop`: (left, top, right, bottom), in that picture's pixels, of what was encoded.

    Samples of one size are stacked by a DataLoader as they are; with buckets, batch by
    `dataset.shapes`. Workers, forked or spawned, open the shards for themselves.

    Args:
        folder: the `out` of `bulk.encode`, also while it is being filled: what is there is read.
        vae: a hash, or a VAE in any of the ways that `bulk.encode` takes: refuse the folder unless
            it was made with that one.

    Attributes:
        vae_hash: of the VAE that made the folder.
        shapes: [z, t, h, w] of each sample, without reading it.

    Raises:
        FolderError: no dataset, or one of another VAE or of several.
    """

    def __init__(self, folder: str | os.PathLike[str], vae: Any = None) -> None:
        self._folder = Folder(folder)
        settings = self._folder.settings()
        table = read_manifest(self._folder)
        hashes = {settings.vae_hash, *table["vae_hash"].unique().to_pylist()}
        if len(hashes) > 1:
            raise FolderError(
                f"{str(folder)!r} must hold latents of one VAE, got those of {sorted(hashes)}"
            )
        self.vae_hash = settings.vae_hash
        if vae is not None:
            is_hash = isinstance(vae, str) and re.fullmatch("[0-9a-f]{64}", vae)
            wanted = vae if is_hash else VaeSource(vae).fingerprint(settings.clips > 1)
            if wanted != self.vae_hash:
                raise FolderError(
                    f"{str(folder)!r} must hold latents of the VAE {wanted}, got {self.vae_hash}"
                )
        self._table = table = sorted_by_name(table)
        self.shapes: list[tuple[int, ...]] = [tuple(s) for s in table["latent_shape"].to_pylist()]
        self._open: OrderedDict[Path, Any] = OrderedDict()
        self._names: dict[str, list[str]] | None = None

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._row(index)
        return {
            "latents": self._latents(row["shard"], row["key"]),
            "source": row["source"],
            "key": row["key"],
            "size": (row["original_height"], row["original_width"]),
            "crop": tuple(row["crop"]),
        }

    def names(self, index: int) -> list[str]:
        """Every name under which the content of a sample was found."""
        if self._names is None:
            self._names = read_names(self._folder)
        return self._names[self._row(index)["key"]]

    def _row(self, index: int) -> dict[str, Any]:
        number = as_int(index)
        if number is None:
            raise TypeError(f"index must be an integer, got {quoted(index)}")
        if not -len(self) <= number < len(self):
            raise IndexError(f"index must be in [-{len(self)}, {len(self)}), got {number}")
        row: dict[str, Any] = self._table.slice(number % len(self), 1).to_pylist()[0]
        return row

    def _latents(self, shard: str, key: str) -> torch.Tensor:
        path = self._folder.shards / shard
        file = self._open.pop(path, None)
        try:
            if file is None:
                file = safe_open(path, framework="pt", device="cpu")
            latents: torch.Tensor = file.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise FolderError(
                f"{str(path)!r} cannot be read: {error}; run `encode` again to mend it"
            ) from error
        self._open[path] = file
        while len(self._open) > _OPEN_SHARDS:
            self._open.popitem(last=False)
        return latents.clone()  # it is the memory map itself, which the next read shows too

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}
