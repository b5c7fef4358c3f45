"""The folder of latents: where its files are, who may write, and what its samples have in common.

    dataset.json       the settings that all samples share, written first
    shards/            <name>.safetensors, a tensor per sample
    manifest/          <name>.parquet, the rows of the shard of that name, written after it
    names/             Parquet: further names of samples, where a source has the same content twice
    errors.parquet     what the latest run could not encode, and why

Every file is written beside its place and renamed, so that it is there whole or not at all. A shard
without rows is what a killed run left, and counts for nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import re
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosmos3_fast.files import replacing

FORMAT = 1
_guard = threading.Lock()
# Folders that are locked, with the process: one that was forked has no lock of its own.
_locked: set[tuple[int, str]] = set()
# With one slash too: `Path` makes "s3:/bucket" of "s3://bucket".
_SCHEME = re.compile(r"(?i)[a-z][a-z0-9+.-]+:/")


class FolderError(ValueError):
    """A folder that cannot take these latents, or has none."""


@dataclass(frozen=True)
class Settings:
    """What all samples of a folder have in common.

    Attributes:
        vae_hash: see `VaeSource.fingerprint`.
        dtype: of the latents, "bfloat16" and so on.
        vae_dtype: in which the encoder computes.
        size: (height, width) for all; None with `areas`.
        areas: of the buckets, in pixels.
        clips: the most pixel frames of a sample; the hash is of what acts on clips where it is
            more than one.
        background: painted behind transparent pixels.
    """

    vae_hash: str
    dtype: str
    vae_dtype: str
    size: tuple[int, int] | None
    areas: tuple[int, ...]
    clips: int
    background: str | None = None


class Folder:
    """The paths in a folder of latents.

    Args:
        path: of the folder, which need not exist.

    Raises:
        FolderError: it is a URL.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        text = os.fspath(path)
        if _SCHEME.match(text):
            raise FolderError(
                f"the folder of latents must be on a disk of this machine, got the URL {text!r}"
            )
        # Absolute: the process may go to another folder, and so may one that it starts.
        self.path = Path(os.path.abspath(text))
        self.shards = self.path / "shards"
        self.manifest = self.path / "manifest"
        self.names = self.path / "names"
        self.errors = self.path / "errors.parquet"
        self.description = self.path / "dataset.json"

    def create(self) -> None:
        for folder in (self.shards, self.manifest, self.names):
            folder.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other runs out until the block ends or the process is gone.

        Where the file system has no locks, a warning says so.

        Raises:
            FolderError: another process, or another thread of this one, has it.
        """
        taken = FolderError(f"{str(self.path)!r} is being written by another run")
        # The lock is the process's: unlike flock's, it is not inherited by workers that outlive a
        # killed run. A second one in the same process would get it too, and end the first's when it
        # closes its file.
        place = os.path.realpath(self.path)
        with _guard:
            if (os.getpid(), place) in _locked:
                raise taken
            _locked.add((os.getpid(), place))
        try:
            with (self.path / ".lock").open("w") as file:
                try:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as error:
                    if error.errno in (errno.EACCES, errno.EAGAIN):
                        raise taken from None
                    warnings.warn(
                        f"the file system of {str(self.path)!r} has no locks ({error.strerror}): "
                        "see to it that no other run writes there",
                        stacklevel=4,
                    )
                yield
        finally:
            with _guard:
                _locked.discard((os.getpid(), place))

    def settle(self, settings: Settings) -> None:
        """Write the settings down, or check that they are those of the folder.

        Raises:
            FolderError: the folder's are different ones.
        """
        if self.description.exists():
            found = self.settings()
            wanted = dataclasses.asdict(settings)
            changed = [
                f"{name} {value!r}, not {wanted[name]!r}"
                for name, value in dataclasses.asdict(found).items()
                if value != wanted[name]
            ]
            if changed:
                raise FolderError(
                    f"{str(self.path)!r} holds latents made with {'; '.join(changed)}: choose "
                    "another folder"
                )
            return
        content = {"format": FORMAT, **dataclasses.asdict(settings)}
        write_bytes(self.description, (json.dumps(content, indent=2) + "\n").encode())

    def settings(self) -> Settings:
        """Read the settings that its samples have in common.

        Raises:
            FolderError: it has none that this version reads.
        """
        try:
            content: dict[str, Any] = json.loads(self.description.read_text(encoding="utf-8"))
            if content.pop("format") != FORMAT:
                raise ValueError("another version of this package wrote it")
            content["size"] = content["size"] and tuple(content["size"])
            content["areas"] = tuple(content["areas"])
            return Settings(**content)
        except FileNotFoundError:
            raise FolderError(f"{str(self.path)!r} holds no dataset of latents") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FolderError(f"{str(self.description)!r} cannot be read: {error}") from error

    def clean(self) -> None:
        """Remove what a killed run left: partial files, shards without rows, rows without a shard.

        The caller has the lock.
        """
        for folder in (self.path, self.shards, self.manifest, self.names):
            for partial in folder.glob(".cosmos3-*.partial"):
                partial.unlink(missing_ok=True)
        shards = {path.stem: path for path in self.shards.glob("*.safetensors")}
        parts = {path.stem: path for path in self.manifest.glob("*.parquet")}
        for name, path in (shards | parts).items():
            if name not in shards or name not in parts:
                shards.get(name, path).unlink(missing_ok=True)
                path.unlink(missing_ok=True)


def write_bytes(target: Path, content: bytes) -> None:
    """A file that is there whole, also after a power cut, or not at all."""
    with replacing(target) as partial, partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
