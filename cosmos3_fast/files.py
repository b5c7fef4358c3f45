"""Write a file whole or not at all, and only where a file belongs; names of files as text."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

_partials: set[Path] = set()


class TargetError(ValueError):
    """A path that must not be written to; the message names the option and says why."""


def printable(name: str) -> str:
    """A file name as text: bytes that are not UTF-8 are written out."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


@contextlib.contextmanager
def _looking_at(path: str, label: str) -> Iterator[None]:
    """What is wrong with a path that cannot be looked at becomes a TargetError."""
    try:
        path.encode("utf-8")
        yield
    except UnicodeEncodeError:
        raise TargetError(f"{label} must be a name in UTF-8") from None
    except (OSError, RuntimeError, ValueError) as error:
        raise TargetError(f"{label} cannot be used: {error}") from None


def _check_folder(folder: Path, label: str) -> None:
    if not folder.is_dir():
        raise TargetError(f"{label}: the folder {str(folder)!r} does not exist")
    if not os.access(folder, os.W_OK):
        raise TargetError(f"{label}: the folder {str(folder)!r} is not writable")


def check_target(path: str, option: str, inputs: Sequence[str] = ()) -> Path:
    """The file that `path` stands for, new or regular; a symlink's target.

    Args:
        path: what the user gave.
        option: how messages call it.
        inputs: paths that must not be overwritten; of a folder, neither may the files in it.

    Raises:
        TargetError: it is a folder, a device, a FIFO or a socket, an input, read-only, or in a
            folder that is missing or not writable.
    """
    label = f"{option} {path!r}"
    with _looking_at(path, label):
        target = Path(path).resolve()
        found = target.stat() if target.exists() else None
    if found is not None:
        if stat.S_ISDIR(found.st_mode):
            raise TargetError(f"{label} is a folder")
        if not stat.S_ISREG(found.st_mode):
            raise TargetError(f"{label} is no regular file (a device, FIFO or socket)")
        # By the mode too: root may write everything.
        if not found.st_mode & 0o222 or not os.access(target, os.W_OK):
            raise TargetError(f"{label} is read-only")
        for source in map(Path, inputs):
            with contextlib.suppress(OSError):
                if source.samefile(target) or (
                    source.is_dir() and target.is_relative_to(source.resolve())
                ):
                    raise TargetError(f"{label} is an input: {str(source)!r}")
    _check_folder(target.parent, label)
    return target


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A path beside `target` to write to, which replaces it at the end of the block.

    If the block fails, nothing is left of it. Its mode is that of the file it replaces, or by the
    umask. Several writers have different ones, and the last to finish wins.
    """
    partial = target.with_name(f".cosmos3-{os.getpid()}-{secrets.token_hex(4)}.partial")
    _partials.add(partial)
    try:
        os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        mode = (target if target.exists() else partial).stat().st_mode
        yield partial
        partial.chmod(stat.S_IMODE(mode))
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
        _partials.discard(partial)


def check_new_folder(path: str, option: str) -> Path:
    """The folder that `path` stands for, which is to be written: new, or there and empty.

    Args:
        path: what the user gave.
        option: how messages call it.

    Raises:
        TargetError: it is a file, a folder that holds something, or in a folder that is missing or
            not writable.
    """
    label = f"{option} {path!r}"
    with _looking_at(path, label):
        target = Path(path).resolve()
        holds = target.exists() and (not target.is_dir() or any(target.iterdir()))
    if holds:
        what = "a folder that holds something" if target.is_dir() else "a file"
        raise TargetError(f"{label} must be a new or empty folder, got {what}")
    _check_folder(target.parent, label)
    return target


@contextlib.contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` to write into, which becomes it at the end of the block.

    If the block fails, nothing is left of it. There must be no `target`, or an empty folder.
    """
    partial = target.with_name(f".cosmos3-{os.getpid()}-{secrets.token_hex(4)}.partial")
    _partials.add(partial)
    try:
        partial.mkdir()
        yield partial
        partial.replace(target)
    finally:
        _remove(partial)
        _partials.discard(partial)


def remove_partials() -> None:
    """Remove what this process has begun to write, before it ends without unwinding."""
    for partial in tuple(_partials):
        with contextlib.suppress(OSError):
            _remove(partial)


def _remove(partial: Path) -> None:
    """A partial file or folder, which another thread may still be writing into."""
    for _ in range(_REMOVALS):
        if not partial.is_dir():
            partial.unlink(missing_ok=True)
            return
        shutil.rmtree(partial, ignore_errors=True)


_REMOVALS = 8
