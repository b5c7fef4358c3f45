"""Which files a source stands for: folders, patterns, braces, lists, archives, here or at a URL."""

from __future__ import annotations

import codecs
import fnmatch
import functools
import glob
import itertools
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cosmos3_fast.files import printable
from cosmos3_fast.images.clips import VIDEO_SUFFIXES, is_media

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib"),
    *(".tif", ".tiff", ".avif", ".avifs", ".heic", ".heif", ".hif", ".jxl", ".tga", ".qoi"),
    *(".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
)
"""Of pictures that are read by their name alone; others are looked into."""

_PICTURES = (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)
_TARS = (".tar", ".tar.gz", ".tgz")
_ZIPS = (".zip",)
_LISTS = (".txt", ".lst", ".list")
_PARQUET = (".parquet",)
# Of files beside pictures; they are not looked into.
_OTHERS = (
    *(".txt", ".md", ".rst", ".csv", ".tsv", ".json", ".jsonl", ".yaml", ".yml", ".xml", ".html"),
    *(".npy", ".npz", ".pt", ".pth", ".safetensors", ".pkl", ".arrow", ".caption", ".cls", ".log"),
    *(".lst", ".list", ".zip", ".gz", ".py", ".toml", ".ini", ".pdf", ".wav", ".mp3", ".srt"),
)
_ARCHIVES = ("zip", "tar", "libarchive")
_BOMS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # begins as UTF-16's does, and is asked first
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_MOST_BRACES = 1_000_000


class SourceError(ValueError):
    """A source that cannot be listed, or in which there is nothing."""


@dataclass(frozen=True)
class Found:
    """A file of a source.

    Attributes:
        url: a path or an fsspec URL.
        given: it was named by itself, not found in a folder, by a pattern or in a list.
        fault: why it cannot be read, where that is known already.
    """

    url: str
    given: bool = False
    fault: str = ""


def is_url(path: str) -> bool:
    return "://" in path


def is_tar(url: str) -> bool:
    return _has_suffix(url, _TARS)


def is_parquet(url: str) -> bool:
    return _has_suffix(url, _PARQUET)


def may_be_media(name: str) -> bool | None:
    """Whether a file is a picture or clip by its name; None: its content says."""
    if _has_suffix(name, _PICTURES):
        return True
    return False if _has_suffix(name, _OTHERS) else None


def ending(name: str) -> str:
    """How messages call the kind of a file that is left out."""
    return os.path.splitext(printable(name))[1].lower() or "no suffix"


def list_files(source: str, exclude: Path | None, left_out: Counter[str]) -> list[Found]:
    """The files that one source stands for, in its order.

    Args:
        source: see `sources.list_pieces`.
        exclude: a local folder that is left out.
        left_out: counts the files that are left out, by `ending`.

    Raises:
        SourceError: it does not exist, or there is nothing in it.
    """
    if is_url(source):
        return _at_url(source, left_out)
    # A run from another folder finds the same names.
    path = os.path.abspath(source)
    if os.path.isdir(path):
        return _some(path, _in_folder(path, exclude, left_out))
    if os.path.isfile(path):
        if _has_suffix(path, _LISTS):
            return _some(path, _listed(path, exclude, left_out))
        if _has_suffix(path, _ZIPS):
            return _at_url(f"zip://::{path}", left_out)
        if may_be_media(path) is False and not is_tar(path):
            raise SourceError(
                f"source {printable(path)!r} must be a folder, a pattern, a list "
                f"({', '.join(_LISTS)}), a Parquet file, a tar, a zip, a picture or a clip, "
                f"got {ending(path)}"
            )
        return [Found(path, given=True)]
    if os.path.lexists(path) and os.path.exists(path):
        raise SourceError(f"source {printable(path)!r} is no regular file (a device or FIFO)")
    names = expand_braces(source)
    if len(names) > 1:
        found = [each for name in names for each in _named(name, exclude, left_out)]
        if not any(is_url(each.url) or os.path.exists(each.url) for each in found):
            raise SourceError(f"source {printable(path)!r} does not exist")
        return found
    if not glob.has_magic(source):
        raise SourceError(f"source {printable(path)!r} does not exist")
    if not os.path.isabs(source):
        source = os.path.join(glob.escape(os.getcwd()), source)
    # A FIFO or a link to nothing is an error of its own.
    matches = [each for each in _matches(source, left_out) if not os.path.isdir(each)]
    return _some(path, [Found(each) for each in sorted(matches)])


def open_url(url: str) -> IO[bytes]:
    """A file, here or at a URL, open for reading."""
    if not is_url(url):
        return open(url, "rb")
    files, inner = file_system(url)
    opened: IO[bytes] = files.open(inner, "rb")
    return opened


def file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and its path in it."""
    import fsspec

    parts = url.split("::")
    protocol, _, inner = parts[0].partition("://")
    if protocol in _ARCHIVES and len(parts) > 1:
        # Not over a fork: processes that share an open file share its position.
        return _archive(os.getpid(), protocol, "::".join(parts[1:])), inner
    files, inner = fsspec.core.url_to_fs(url)
    return files, inner


@functools.lru_cache(maxsize=4)
def _archive(process: int, protocol: str, target: str) -> Any:
    """An open archive: reading its directory anew for each member takes the square of the time."""
    import fsspec

    return fsspec.core.url_to_fs(f"{protocol}://::{target}")[0]


def _has_suffix(path: str, suffixes: Sequence[str]) -> bool:
    return path.lower().endswith(tuple(suffixes))


def _some(source: str, found: list[Found]) -> list[Found]:
    if not found:
        raise SourceError(
            f"source {printable(source)!r} holds no picture, video, tar or Parquet file"
        )
    return found


def _taken(path: str, looked_into: bool, left_out: Counter[str]) -> bool:
    """Whether a file that was found is of the source; one that is not is counted."""
    if is_tar(path) or is_parquet(path):
        return True
    taken = may_be_media(path)
    if taken is None:
        taken = looked_into and _is_regular(path) and is_media(Path(path))
    if not taken:
        left_out[ending(path)] += 1
    return taken


def _is_regular(path: str) -> bool:
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False


def _is_latents(entries: Sequence[os.DirEntry[str]]) -> bool:
    """Whether a folder is one that `bulk.encode` wrote."""
    return {"dataset.json", "shards", "manifest"} <= {entry.name for entry in entries}


def _in_folder(folder: str, exclude: Path | None, left_out: Counter[str]) -> list[Found]:
    """The files below a folder, sorted by path; each real folder is gone through once."""
    excluded = None if exclude is None else exclude.resolve()
    found: list[Found] = []
    seen: set[tuple[int, int]] = set()
    waiting, links = [folder], list[str]()
    while waiting or links:
        # Links come last, so that files are called by their real names where there are two.
        here = waiting.pop() if waiting else links.pop(0)
        try:
            status = os.stat(here)
            entries = list(os.scandir(here))
        except OSError as error:
            found.append(Found(here, fault=f"the folder cannot be read: {error.strerror}"))
            continue
        place = (status.st_dev, status.st_ino)
        if place in seen or (excluded is not None and Path(here).resolve() == excluded):
            continue
        seen.add(place)
        if _is_latents(entries):
            left_out["folders of latents"] += 1
            continue
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                waiting.append(entry.path)
            elif entry.is_symlink() and os.path.isdir(entry.path):
                links.append(entry.path)
            elif _taken(entry.path, True, left_out):
                found.append(Found(entry.path))
        links.sort()
    return sorted(found, key=lambda each: each.url)


def _matches(pattern: str, left_out: Counter[str]) -> Iterator[str]:
    """The paths that a pattern matches, as `glob.glob(pattern, recursive=True)` has them.

    Below `**` each real folder is gone through once: glob follows links that lead back into
    themselves, in two such links for ever.
    """
    parts = pattern.split(os.sep)
    if "**" not in parts:
        yield from glob.glob(pattern)
        return
    deep = parts.index("**")
    rest = parts[deep + 1 :]
    hidden = any(part.startswith(".") for part in rest)
    for base in glob.glob(os.sep.join(parts[:deep]) or os.sep):
        for below in _below(base, hidden, left_out):
            if _fits(below, rest):
                yield os.path.join(base, *below)


def _below(base: str, hidden: bool, left_out: Counter[str]) -> Iterator[tuple[str, ...]]:
    """The files below a folder, as parts of paths.

    Args:
        hidden: go through folders whose names begin with a dot too.
        left_out: counts folders of latents.
    """
    seen: set[tuple[int, int]] = set()
    waiting: list[tuple[str, ...]] = [()]
    links: list[tuple[str, ...]] = []
    while waiting or links:
        here = waiting.pop() if waiting else links.pop(0)
        path = os.path.join(base, *here)
        try:
            status = os.stat(path)
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        except OSError:
            continue
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        if _is_latents(entries):
            left_out["folders of latents"] += 1
            continue
        for entry in entries:
            if not entry.is_dir():
                yield (*here, entry.name)
            elif hidden or not entry.name.startswith("."):
                (links if entry.is_symlink() else waiting).append((*here, entry.name))


def _fits(names: tuple[str, ...], patterns: Sequence[str]) -> bool:
    """Whether `names`, after any number of folders that are not hidden, are what patterns say."""
    visible = itertools.takewhile(
        lambda i: i == 0 or not names[i - 1].startswith("."), range(len(names))
    )
    if not patterns:
        return not any(name.startswith(".") for name in names)
    return any(_fits_here(names[skipped:], patterns) for skipped in visible)


def _fits_here(names: tuple[str, ...], patterns: Sequence[str]) -> bool:
    if not patterns:
        return not names
    if patterns[0] == "**":
        return _fits(names, patterns[1:])
    if not names or (names[0].startswith(".") and not patterns[0].startswith(".")):
        return False
    return fnmatch.fnmatchcase(names[0], patterns[0]) and _fits_here(names[1:], patterns[1:])


def expand_braces(text: str) -> list[str]:
    """What `{a,b}` and `{000..009}` in a name stand for, as in a shell and in WebDataset.

    Numbers count up or down, in steps as in `{0..9..3}`, with as many digits as the longer end has
    where one begins with 0. Braces that hold neither stay as they are.

    Raises:
        SourceError: more than a million names.
    """
    names = list(itertools.islice(_braces(text), _MOST_BRACES + 1))
    if len(names) > _MOST_BRACES:
        raise SourceError(
            f"source must stand for at most {_MOST_BRACES} names, got more in {printable(text)!r}"
        )
    return names


def _braces(text: str) -> Iterator[str]:
    start = text.find("{")
    while start >= 0:
        if (end := _closing(text, start)) is not None:
            choices = _choices(text[start + 1 : end])
            if choices is not None:
                for choice in choices:
                    for tail in _braces(text[end + 1 :]):
                        yield text[:start] + choice + tail
                return
        start = text.find("{", start + 1)
    yield text


def _closing(text: str, start: int) -> int | None:
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if not depth:
            return i
    return None


def _choices(inside: str) -> Iterator[str] | None:
    counted = re.fullmatch(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?", inside)
    if counted is not None:
        first, last, step = counted[1], counted[2], abs(int(counted[3] or 1)) or 1
        padded = any(re.match(r"-?0\d", each) for each in (first, last))
        digits = max(len(first), len(last)) if padded else 0
        up = int(first) <= int(last)
        numbers = range(int(first), int(last) + (1 if up else -1), step if up else -step)
        return (f"{number:0{digits}d}" for number in numbers)
    depth, parts, begin = 0, [], 0
    for i, character in enumerate(inside):
        depth += (character == "{") - (character == "}")
        if character == "," and not depth:
            parts.append(inside[begin:i])
            begin = i + 1
    if not parts:
        return None
    return (each for part in (*parts, inside[begin:]) for each in _braces(part))


def _named(name: str, exclude: Path | None, left_out: Counter[str]) -> list[Found]:
    """What a name in a list stands for: one that stands for nothing is an error of that name."""
    if is_url(name):
        # In a web address "?" begins a query.
        if not glob.has_magic(name) or name.lower().startswith(("http://", "https://")):
            return [Found(name)]
    elif os.path.isfile(name) or not (
        os.path.isdir(name) or glob.has_magic(name) or len(expand_braces(name)) > 1
    ):
        return [Found(os.path.abspath(name))]
    try:
        found = list_files(name, exclude, left_out)
        return [Found(each.url, fault=each.fault) for each in found]
    except SourceError as error:
        return [Found(name, fault=str(error))]


def _listed(path: str, exclude: Path | None, left_out: Counter[str]) -> list[Found]:
    """The files of a list; names that are relative start at its folder."""
    # In an archive, names are whole.
    base = "" if "::" in path else path.rsplit("/", 1)[0]
    with open_url(path) as file:
        text = _decoded(file.read())
    found: list[Found] = []
    for line in text.splitlines():
        name = line.strip()
        if not name:
            continue
        if is_url(name) or os.path.isabs(name) or not base:
            found += _named(name, exclude, left_out)
        elif is_url(base) or not glob.has_magic(base):
            found += _named(f"{base}/{name}", exclude, left_out)
        elif glob.has_magic(name) and not os.path.exists(f"{base}/{name}"):
            found += _named(f"{glob.escape(base)}/{name}", exclude, left_out)
        else:
            found += _in_list_folder(f"{base}/{name}", exclude, left_out)
    return found


def _in_list_folder(path: str, exclude: Path | None, left_out: Counter[str]) -> list[Found]:
    """A name without a pattern, below a folder whose name looks like one."""
    return _in_folder(path, exclude, left_out) if os.path.isdir(path) else [Found(path)]


def _decoded(content: bytes) -> str:
    """A list as text: UTF-8, with a mark or without, or UTF-16."""
    for mark, encoding in _BOMS.items():
        if content.startswith(mark):
            return content.decode(encoding, "replace")
    # UTF-16 without a mark: a name begins with a character of ASCII, whose other byte is zero.
    if content[:1] and content[1:2] == b"\0":
        return content.decode("utf-16-le", "replace")
    if content[:1] == b"\0":
        return content.decode("utf-16-be", "replace")
    return content.decode("utf-8", "surrogateescape")


def _at_url(url: str, left_out: Counter[str]) -> list[Found]:
    parts = url.split("::")
    if len(parts) > 1 and not is_url(parts[-1]):
        parts[-1] = os.path.abspath(parts[-1])
        url = "::".join(parts)
    shown = printable(url)
    try:
        files, inner = file_system(url)
        is_folder, is_file = files.isdir(inner), files.isfile(inner)
        if is_file and _has_suffix(inner, _LISTS):
            return _some(url, _listed(url, None, left_out))
        if is_file:
            return [Found(url, given=True)]
        if is_folder:
            names = [each for each in files.find(inner) if _taken(each, False, left_out)]
        elif len(names := expand_braces(url)) > 1:
            found = [each for name in names for each in _named(name, None, left_out)]
            if any(not each.fault for each in found):
                return found
            names = []
        elif glob.has_magic(inner):
            names = [each for each in files.glob(inner) if files.isfile(each)]
        else:
            raise SourceError(f"source {shown!r} does not exist")
        return _some(url, [Found(each) for each in sorted(_rejoined(files, url, names))])
    except SourceError:
        raise
    # Remote file systems raise whatever they like.
    except Exception as error:
        raise SourceError(f"source {shown!r} cannot be opened: {error}") from error


def _rejoined(files: Any, url: str, names: Sequence[str]) -> Iterator[str]:
    """The URLs of files in the file system of another URL, chained as that is."""
    parts = url.split("::")
    place = next(i for i, part in enumerate(parts) if "://" in part)
    if len(parts) == 1:
        yield from (files.unstrip_protocol(name) for name in names)
        return
    protocol = parts[place].partition("://")[0]
    for name in names:
        yield "::".join([*parts[:place], f"{protocol}://{name}", *parts[place + 1 :]])
