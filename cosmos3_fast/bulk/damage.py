"""Whether the files of a folder of latents are still those that were written."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cosmos3_fast.bulk.folder import Folder, FolderError
from cosmos3_fast.bulk.manifest import manifest_schema, names_schema, read_part

_ASIDE = ".damaged"


@dataclass(frozen=True)
class Damage:
    """A file of a folder of latents that is not what was written.

    Attributes:
        path: of the file.
        reason: what is wrong with it.
    """

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def check(folder: str | os.PathLike[str]) -> list[Damage]:
    """Read every file of a folder that `bulk.encode` wrote, and compare the shards' checksums.

    Nothing is changed: `bulk.encode` with `check=True` sets aside what is damaged and encodes it
    again.

    Returns:
        What is damaged; nothing for a folder that is whole.

    Raises:
        FolderError: it is no folder of latents.
    """
    place = Folder(folder)
    place.settings()
    return list(find_damage(place, True))


def find_damage(folder: Folder, whole: bool) -> Iterator[Damage]:
    """What is damaged in a folder.

    Args:
        whole: compare the checksum of every shard, not its size alone.
    """
    for part in sorted(folder.names.glob("*.parquet")):
        try:
            read_part(part, names_schema())
        except FolderError as error:
            yield Damage(part, _reason(error))
    for part in sorted(folder.manifest.glob("*.parquet")):
        try:
            table = read_part(part, manifest_schema())
        except FolderError as error:
            yield Damage(part, _reason(error))
            continue
        columns = ("shard", "shard_bytes", "shard_sha256")
        rows = zip(*(table[name].to_pylist() for name in columns), strict=True)
        # Folders of earlier releases have no sizes and checksums.
        for shard, size, digest in dict.fromkeys(rows):
            path = folder.shards / shard
            if (reason := _shard_fault(path, size, digest if whole else None)) is not None:
                yield Damage(path, reason)


def set_aside(folder: Folder, damage: Damage) -> None:
    """Give a damaged file, and the one it belongs to, a name under which it counts for nothing.

    Rows whose shard is gone are left to `Folder.clean`. The caller has the lock.
    """
    if not damage.path.exists():
        return
    stem = damage.path.stem
    pair = [folder.shards / f"{stem}.safetensors", folder.manifest / f"{stem}.parquet"]
    for path in [damage.path] if damage.path.parent == folder.names else pair:
        if path.exists():
            path.replace(path.with_name(path.name + _ASIDE))


def _reason(error: FolderError) -> str:
    return f"it cannot be read: {error.__cause__}"


def _shard_fault(path: Path, size: int | None, digest: str | None) -> str | None:
    try:
        found = path.stat().st_size
        if size is not None and found != size:
            return f"it must have {size} bytes, got {found}"
        if digest is None:
            return None
        own = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(2**20):
                own.update(block)
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    if own.hexdigest() != digest:
        return f"it must have the SHA-256 {digest}, got {own.hexdigest()}"
    return None
