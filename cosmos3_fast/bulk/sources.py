"""Where pictures come from: files, Parquet tables and tars, read piece by piece.

A source is listed as *pieces*, which are small and can be sent to another process; reading a piece
gives *items*, the bytes of one picture or clip each.
"""

from __future__ import annotations

import os
import stat
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cosmos3_fast.bulk.listing import (
    Found,
    SourceError,
    ending,
    is_parquet,
    is_tar,
    is_url,
    list_files,
    may_be_media,
    open_url,
)
from cosmos3_fast.files import printable
from cosmos3_fast.images.clips import is_media

# Of a local file, more is not read into memory but decoded from its path: a video.
_MOST_BYTES = 64 * 2**20
_PARQUET_ROWS = 16
_LIST_PLACES = 2**16

SourceLike = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@dataclass(frozen=True)
class Piece:
    """A part of a source that is read in one go.

    Attributes:
        url: a path or an fsspec URL.
        index: of the file in the source.
        kind: "file" is one picture or clip, "tar" an archive of them, "parquet" one row group,
            "fault" something that cannot be read.
        column: of a Parquet file, the one with the pictures.
        row_group, first_row: of a Parquet file.
        rows: how many items it has; None: not known before it is read.
        fault: why it cannot be read.
    """

    url: str
    index: int
    kind: Literal["file", "tar", "parquet", "fault"] = "file"
    column: str = ""
    row_group: int = 0
    first_row: int = 0
    rows: int | None = 1
    fault: str = ""


@dataclass(frozen=True)
class Item:
    """One picture or clip, as it is stored.

    Attributes:
        source: its name: the path or URL, `tar/member`, `table.parquet#row`, or where a row has a
            list of pictures `table.parquet#row[i]`.
        index, row: its place: of the file in the source, and in that file; of a list, the row times
            2^16, and i.
        data: the file's bytes, its path where it is large, or why it cannot be read.
    """

    source: str
    index: int
    row: int
    data: bytes | Path | Exception


def list_pieces(
    source: SourceLike,
    column: str | None = None,
    exclude: Path | None = None,
    left_out: Counter[str] | None = None,
) -> list[Piece]:
    """The pieces of a source, in its order.

    Args:
        source: one of

            - a folder: the pictures, videos, tars and Parquet files in and below it, sorted by
              path. Files with a suffix that says nothing are looked into; linked folders are
              followed, each real folder once; folders of latents are passed over, and other files,
              such as captions, counted in `left_out`;
            - a pattern with `*`, `?` or `[`: the files that match, sorted (`**` for any depth);
            - names with `{a,b}` or `{000..099}` in them, as WebDataset has them;
            - a text file (.txt, .lst, .list) in UTF-8 or UTF-16: a path, URL, folder or pattern per
              line; those that are relative start at the list's folder;
            - a Parquet file with a column of bytes, of structs with `bytes` or `path`, as Hugging
              Face datasets have them, or of lists of these;
            - a tar (.tar, .tar.gz, .tgz): the pictures and videos in it, as in WebDataset;
            - a zip: the same of what is in it;
            - any other file: a picture or clip;
            - a sequence of these.

            Any of them may be a URL that fsspec opens, chained ones too (`zip://*.png::a.zip`);
            local names are made absolute.
        column: of Parquet files, the one to take, which may also be of paths or URLs, relative to
            the file; None: the only one with bytes.
        exclude: a local folder that is left out, where it lies in a folder of the source.
        left_out: counts the files that are left out, by suffix.

    Raises:
        SourceError: a folder, pattern or list with nothing in it, one that does not exist, a file
            of another kind, or a Parquet file, given by its name, without one clear column. One
            that was found in a folder or list is an item that says why it cannot be read.
    """
    left_out = Counter() if left_out is None else left_out
    given = [source] if isinstance(source, (str, os.PathLike)) else list(source)
    found = [file for each in given for file in list_files(os.fspath(each), exclude, left_out)]
    if not found:
        raise SourceError(f"source must hold at least one picture, got none in {source!r}")
    return [piece for index, file in enumerate(found) for piece in _pieces(file, index, column)]


def read_piece(
    piece: Piece, part: int = 0, parts: int = 1, left_out: Counter[str] | None = None
) -> Iterator[Item]:
    """The items of a piece, or the share that one of several readers has of it.

    What belongs to whom depends on an item's place alone, so that readers need not agree on
    anything else. What cannot be read is an item that says why.

    Args:
        piece: from `list_pieces`.
        part, parts: this reader's number and how many there are. Files and row groups are read by
            one of them; through a tar all of them go, skipping what is not theirs.
        left_out: counts the members of tars that are left out, by suffix; the first reader does.
    """
    if piece.kind != "tar" and (piece.index + piece.row_group) % parts != part:
        return
    name = printable(piece.url)
    try:
        if piece.kind == "fault":
            yield Item(name, piece.index, piece.first_row, SourceError(piece.fault))
        elif piece.kind == "tar":
            skipped = left_out if left_out is not None and part == 0 else Counter[str]()
            yield from _read_tar(piece, part, parts, skipped)
        elif piece.kind == "parquet":
            yield from _read_parquet(piece)
        else:
            yield Item(name, piece.index, 0, _read_file(piece.url))
    # Remote file systems and parsers of broken files raise whatever they like.
    except Exception as error:
        yield Item(name, piece.index, piece.first_row, error)


def _read_file(url: str) -> bytes | Path:
    if not is_url(url):
        status = os.stat(url)
        # Opening a FIFO would wait for ever.
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is no regular file but a folder, device, FIFO or socket")
        if status.st_size > _MOST_BYTES:
            return Path(url)
    with open_url(url) as file:
        return file.read()


def _pieces(file: Found, index: int, column: str | None) -> Iterator[Piece]:
    if file.fault:
        yield Piece(file.url, index, "fault", fault=file.fault)
    elif is_tar(file.url):
        yield Piece(file.url, index, "tar", rows=None)
    elif is_parquet(file.url):
        try:
            yield from _row_groups(file.url, index, column)
        except SourceError as error:
            if file.given:
                raise
            yield Piece(file.url, index, "fault", fault=str(error))
    else:
        yield Piece(file.url, index)


def _row_groups(url: str, index: int, column: str | None) -> Iterator[Piece]:
    import pyarrow.parquet as pq

    try:
        if not is_url(url) and not stat.S_ISREG(os.stat(url).st_mode):
            raise ValueError("it is no regular file")
        with open_url(url) as file:
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
    if _held(schema.field(chosen).type) is None:
        raise SourceError(
            f"column {chosen!r} of {printable(url)!r} must hold bytes, structs with bytes, paths, "
            f"or lists of these, got {schema.field(chosen).type}"
        )
    in_lists = _list_of(schema.field(chosen).type) is not None
    first = 0
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        yield Piece(url, index, "parquet", chosen, group, first, None if in_lists else rows)
        first += rows


def _bytes_column(url: str, schema: Any) -> str:
    names = [field.name for field in schema if _held(field.type) == "bytes"]
    if len(names) != 1:
        raise SourceError(
            f"{printable(url)!r} must have one column of bytes, got {names or 'none'}: name it "
            "with column"
        )
    return str(names[0])


def _list_of(kind: Any) -> Any:
    """The type in an Arrow type of lists; None: it is none."""
    import pyarrow as pa

    names = ("is_list", "is_large_list", "is_fixed_size_list", "is_list_view", "is_large_list_view")
    is_list = any(getattr(pa.types, name)(kind) for name in names if hasattr(pa.types, name))
    return kind.value_type if is_list else None


def _held(kind: Any) -> Literal["bytes", "paths"] | None:
    """What pictures are in a column of an Arrow type; None: there are none."""
    import pyarrow as pa

    types = pa.types
    if types.is_dictionary(kind):
        return _held(kind.value_type)
    if (element := _list_of(kind)) is not None:
        return _held(element)
    if types.is_struct(kind):
        return "bytes" if kind.get_field_index("bytes") >= 0 else None
    bytes_kinds = ("is_binary", "is_large_binary", "is_fixed_size_binary", "is_binary_view")
    if any(getattr(types, name)(kind) for name in bytes_kinds if hasattr(types, name)):
        return "bytes"
    text_kinds = ("is_string", "is_large_string", "is_string_view")
    if any(getattr(types, name)(kind) for name in text_kinds if hasattr(types, name)):
        return "paths"
    return None


def _read_parquet(piece: Piece) -> Iterator[Item]:
    import pyarrow.parquet as pq

    row, name = piece.first_row, printable(piece.url)
    with open_url(piece.url) as file:
        table = pq.ParquetFile(file)
        for batch in table.iter_batches(_PARQUET_ROWS, [piece.row_group], [piece.column]):
            for value in batch.column(0).to_pylist():
                if not isinstance(value, list):
                    yield Item(f"{name}#{row}", piece.index, row, _content(value, piece))
                elif len(value) >= _LIST_PLACES:
                    fault = ValueError(f"a row must hold fewer than {_LIST_PLACES} pictures")
                    yield Item(f"{name}#{row}", piece.index, row * _LIST_PLACES, fault)
                else:
                    for i, each in enumerate(value):
                        place = row * _LIST_PLACES + i
                        yield Item(f"{name}#{row}[{i}]", piece.index, place, _content(each, piece))
                row += 1


def _content(value: Any, piece: Piece) -> bytes | Path | Exception:
    """What a cell stands for: bytes, or the file whose path it is."""
    if isinstance(value, dict):
        path = value.get("path")
        value = path if value.get("bytes") is None else value["bytes"]
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        return ValueError(f"column {piece.column!r} is empty")
    try:
        if not is_url(value) and not os.path.isabs(value):
            value = f"{piece.url.rsplit('/', 1)[0]}/{value}"
        return _read_file(value)
    except Exception as error:
        return error


def _read_tar(piece: Piece, part: int, parts: int, left_out: Counter[str]) -> Iterator[Item]:
    row = 0
    if not is_url(piece.url) and not stat.S_ISREG(os.stat(piece.url).st_mode):
        raise ValueError("it is no regular file but a folder, device, FIFO or socket")
    with open_url(piece.url) as file, tarfile.open(fileobj=file, mode="r:*") as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined] # they grow with the archive
            if not member.isfile():
                continue
            taken, content = may_be_media(member.name), None
            if taken is None:
                content = _member(tar, member)
                taken = is_media(content)
            if not taken:
                left_out[ending(member.name)] += 1
                continue
            if (piece.index + row) % parts == part:
                source = f"{printable(piece.url)}/{printable(member.name)}"
                content = _member(tar, member) if content is None else content
                yield Item(source, piece.index, row, content)
            row += 1


def _member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    content = tar.extractfile(member)
    assert content is not None
    return content.read()
