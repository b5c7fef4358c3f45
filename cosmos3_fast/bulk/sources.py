"""Where pictures come from: files, lists of files, Parquet tables and tars, here or at a URL.

A source is listed as *pieces*, which are small and can be sent to another process; reading a piece
gives *items*, the bytes of one picture or clip each.
"""

from __future__ import annotations

import glob
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from cosmos3_fast.files import printable
from cosmos3_fast.images.clips import VIDEO_SUFFIXES

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic"),
    *(".heif", ".apng", ".ppm", ".pgm", ".jp2"),
)
_PICTURES = (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)
_TARS = (".tar", ".tar.gz", ".tgz")
_LISTS = (".txt", ".lst", ".list")
# Of a local file, more is not read into memory but decoded from its path: a video.
_MOST_BYTES = 64 * 2**20
_PARQUET_ROWS = 16

SourceLike = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


class SourceError(ValueError):
    """A source that cannot be listed, or in which there is nothing."""


@dataclass(frozen=True)
class Piece:
    """A part of a source that is read in one go.

    Attributes:
        url: a path or an fsspec URL.
        index: of the file in the source.
        kind: "file" is one picture or clip, "tar" an archive of them, "parquet" one row group.
        column: of a Parquet file, the one with the bytes.
        row_group, first_row: of a Parquet file.
        rows: how many items it has; None: not known before it is read.
    """

    url: str
    index: int
    kind: Literal["file", "tar", "parquet"] = "file"
    column: str = ""
    row_group: int = 0
    first_row: int = 0
    rows: int | None = 1


@dataclass(frozen=True)
class Item:
    """One picture or clip, as it is stored.

    Attributes:
        source: its name: the path or URL, `tar/member` or `table.parquet#row`.
        index, row: its place: of the file in the source, and in that file.
        data: the file's bytes, its path where it is large, or why it cannot be read.
    """

    source: str
    index: int
    row: int
    data: bytes | Path | Exception


def list_pieces(
    source: SourceLike, column: str | None = None, exclude: Path | None = None
) -> list[Piece]:
    """The pieces of a source, in its order.

    Args:
        source: one of

            - a folder: the pictures, videos, tars and Parquet files in and below it, sorted by
              path; other files, such as captions, are left out;
            - a pattern with `*`, `?` or `[`: the files that match, sorted (`**` for any depth);
            - a text file (.txt, .lst, .list): a path, URL or pattern per line; those that are
              relative start at the list's folder;
            - a Parquet file with a column of bytes, or of structs with `bytes`, as Hugging Face
              datasets have them;
            - a tar (.tar, .tar.gz, .tgz): the pictures and videos in it, as in WebDataset;
            - any other file: a picture or clip;
            - a sequence of these.

            Any of them may be a URL that fsspec opens; local names are made absolute.
        column: of Parquet files, the one to take; None: the only one with bytes.
        exclude: a local folder that is left out, where it lies in a folder of the source.

    Raises:
        SourceError: a folder, pattern or list with nothing in it, one that does not exist, or
            a Parquet file without one clear column.
    """
    given = [source] if isinstance(source, (str, os.PathLike)) else list(source)
    urls = [url for each in given for url in _expand(os.fspath(each), exclude)]
    if not urls:
        raise SourceError(f"source must hold at least one picture, got none in {source!r}")
    return [piece for index, url in enumerate(urls) for piece in _pieces(url, index, column)]


def read_piece(piece: Piece, part: int = 0, parts: int = 1) -> Iterator[Item]:
    """The items of a piece, or the share that one of several readers has of it.

    What belongs to whom depends on an item's place alone, so that readers need not agree on
    anything else. What cannot be read is an item that says why.

    Args:
        piece: from `list_pieces`.
        part, parts: this reader's number and how many there are. Files and row groups are read by
            one of them; through a tar all of them go, skipping what is not theirs.
    """
    if piece.kind != "tar" and (piece.index + piece.row_group) % parts != part:
        return
    try:
        if piece.kind == "tar":
            yield from _read_tar(piece, part, parts)
        elif piece.kind == "parquet":
            yield from _read_parquet(piece)
        else:
            yield Item(printable(piece.url), piece.index, 0, _read_file(piece.url))
    # Remote file systems and parsers of broken files raise whatever they like.
    except Exception as error:
        yield Item(printable(piece.url), piece.index, piece.first_row, error)


def _is_url(path: str) -> bool:
    return "://" in path


def _has_suffix(path: str, suffixes: tuple[str, ...]) -> bool:
    return path.lower().endswith(suffixes)


def _open(url: str) -> IO[bytes]:
    if not _is_url(url):
        return open(url, "rb")
    import fsspec

    file: IO[bytes] = fsspec.open(url, "rb").open()
    return file


def _read_file(url: str) -> bytes | Path:
    if not _is_url(url) and os.path.getsize(url) > _MOST_BYTES:
        return Path(url)
    with _open(url) as file:
        return file.read()


def _expand(path: str, exclude: Path | None) -> list[str]:
    """The files that one source stands for."""
    remote = _is_url(path)
    if not remote:  # a run from another folder finds the same names
        path = os.path.abspath(path)
    files: Any
    if remote:
        import fsspec

        try:
            files, inner = fsspec.core.url_to_fs(path)
        except (ImportError, ValueError) as error:
            raise SourceError(f"source {path!r} cannot be opened: {error}") from error
        is_folder, is_file = files.isdir(inner), files.isfile(inner)
    else:
        is_folder, is_file = os.path.isdir(path), os.path.isfile(path)

    if is_folder:
        wanted = (*_PICTURES, *_TARS, ".parquet")
        if remote:
            found = [files.unstrip_protocol(each) for each in files.find(inner)]
        else:
            found = _walk(path, exclude)
        found = [each for each in found if _has_suffix(each, wanted)]
    elif is_file and _has_suffix(path, _LISTS):
        return _listed(path, exclude)
    elif is_file:
        return [path]
    elif glob.has_magic(path):
        if remote:
            found = [files.unstrip_protocol(each) for each in files.glob(inner)]
        else:
            found = [each for each in glob.glob(path, recursive=True) if os.path.isfile(each)]
    else:
        raise SourceError(f"source {path!r} does not exist")
    if not found:
        raise SourceError(f"source {path!r} holds no picture, video, tar or Parquet file")
    return sorted(found)


def _walk(folder: str, exclude: Path | None) -> list[str]:
    excluded = None if exclude is None else exclude.resolve()
    found: list[str] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [
            name for name in folders if excluded is None or Path(parent, name).resolve() != excluded
        ]
        if excluded is None or Path(parent).resolve() != excluded:
            found += [os.path.join(parent, name) for name in names]
    return found


def _listed(path: str, exclude: Path | None) -> list[str]:
    base = path.rsplit("/", 1)[0] if "/" in path else "."
    with _open(path) as file:
        text = file.read()
    urls: list[str] = []
    for line in text.decode("utf-8", "surrogateescape").splitlines():
        name = line.strip()
        if not name:
            continue
        url = name if _is_url(name) or os.path.isabs(name) else f"{base}/{name}"
        if glob.has_magic(url) or (not _is_url(url) and os.path.isdir(url)):
            urls += _expand(url, exclude)
        else:
            urls.append(url)  # one that is missing is an error of that picture
    return urls


def _pieces(url: str, index: int, column: str | None) -> Iterator[Piece]:
    if _has_suffix(url, _TARS):
        yield Piece(url, index, "tar", rows=None)
    elif _has_suffix(url, (".parquet",)):
        yield from _row_groups(url, index, column)
    else:
        yield Piece(url, index)


def _row_groups(url: str, index: int, column: str | None) -> Iterator[Piece]:
    import pyarrow.parquet as pq

    try:
        with _open(url) as file:
            table = pq.ParquetFile(file)
            schema, metadata = table.schema_arrow, table.metadata
    except Exception:
        yield Piece(url, index)  # read as a picture, it is an error that says so
        return
    chosen = column or _bytes_column(url, schema)
    if chosen not in schema.names:
        raise SourceError(
            f"column must be one of {printable(url)!r}, {schema.names}, got {column!r}"
        )
    first = 0
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        yield Piece(url, index, "parquet", chosen, group, first, rows)
        first += rows


def _bytes_column(url: str, schema: Any) -> str:
    import pyarrow as pa

    def holds_bytes(kind: Any) -> bool:
        if pa.types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    names = [field.name for field in schema if holds_bytes(field.type)]
    if len(names) != 1:
        raise SourceError(
            f"{printable(url)!r} must have one column of bytes, got {names or 'none'}: name it "
            "with column"
        )
    return str(names[0])


def _read_parquet(piece: Piece) -> Iterator[Item]:
    import pyarrow.parquet as pq

    row = piece.first_row
    with _open(piece.url) as file:
        table = pq.ParquetFile(file)
        for batch in table.iter_batches(_PARQUET_ROWS, [piece.row_group], [piece.column]):
            for value in batch.column(0).to_pylist():
                content = value.get("bytes") if isinstance(value, dict) else value
                source = f"{printable(piece.url)}#{row}"
                missing = ValueError(f"column {piece.column!r} is empty")
                yield Item(source, piece.index, row, missing if content is None else content)
                row += 1


def _read_tar(piece: Piece, part: int, parts: int) -> Iterator[Item]:
    row = 0
    with _open(piece.url) as file, tarfile.open(fileobj=file, mode="r:*") as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined] # they grow with the archive
            if not member.isfile() or not _has_suffix(member.name, _PICTURES):
                continue
            if (piece.index + row) % parts == part:
                source = f"{printable(piece.url)}/{printable(member.name)}"
                content = tar.extractfile(member)
                assert content is not None
                yield Item(source, piece.index, row, content.read())
            row += 1
