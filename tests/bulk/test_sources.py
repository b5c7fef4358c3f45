"""Where pictures come from: each kind of source, its order, its names and its faults."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pyarrow", reason="the bulk extra is not installed")

import pyarrow as pa
import pyarrow.parquet as pq
from bulk_cases import png, write_pictures

from cosmos3_fast.bulk import sources
from cosmos3_fast.bulk.sources import Item, SourceError, list_pieces, read_piece

fsspec = pytest.importorskip("fsspec", reason="the bulk extra is not installed")


def read(source: Any, parts: int = 1, **options: Any) -> list[Item]:
    """Every item, in the order of the source."""
    pieces = list_pieces(source, **options)
    items = [
        item for part in range(parts) for piece in pieces for item in read_piece(piece, part, parts)
    ]
    return sorted(items, key=lambda item: (item.index, item.row))


def names(items: Sequence[Item], base: Path | None = None) -> list[str]:
    return [item.source.removeprefix(f"{base}/") for item in items]


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_a_folder_is_read_in_order(tmp_path: Path):
    write_pictures(tmp_path, 10)
    (tmp_path / "0000.txt").write_text("a caption")
    (tmp_path / "B.JPEG").write_bytes(b"jpeg")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.png").write_bytes(b"left out")
    items = read(tmp_path, exclude=tmp_path / "out")
    assert names(items, tmp_path) == [
        "B.JPEG",
        *(f"part0/{i:04}.png" for i in range(8)),
        *(f"part1/{i:04}.png" for i in range(8, 10)),
    ]
    assert items[3].data == png(2)
    assert [(item.index, item.row) for item in items] == [(i, 0) for i in range(11)]


def test_patterns_and_sequences(tmp_path: Path):
    paths = write_pictures(tmp_path, 10)
    assert names(read(f"{tmp_path}/*/*.png")) == list(map(str, paths))
    assert names(read(f"{tmp_path}/**/000[13].png")) == [str(paths[1]), str(paths[3])]
    assert names(read([paths[4], f"{tmp_path}/part1/*", paths[0]])) == list(
        map(str, [paths[4], *paths[8:], paths[0]])
    )


def test_a_list_of_paths(tmp_path: Path):
    paths = write_pictures(tmp_path / "in", 10)
    listed = tmp_path / "all.txt"
    listed.write_text(f"in/part0/0003.png\n\n{paths[1]}\n  in/part1  \nnone.png\nin/*/0000.png\n")
    items = read(listed)
    assert names(items, tmp_path) == [
        *("in/part0/0003.png", "in/part0/0001.png", "in/part1/0008.png", "in/part1/0009.png"),
        *("none.png", "in/part0/0000.png"),
    ]
    assert isinstance(items[4].data, FileNotFoundError)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("parts", [1, 3])
def test_a_tar(tmp_path: Path, mode: str, parts: int):
    suffix = ".tar" if mode == "w" else ".tar.gz"
    members = {"a/0.png": png(0), "a/0.json": b"{}", "a/1.jpg": b"jpeg", "b.cls": b"", "2.png": b""}
    tar = write_tar(tmp_path / f"all{suffix}", members, mode)
    items = read(tar, parts)
    assert names(items, tar) == ["a/0.png", "a/1.jpg", "2.png"]
    assert [item.data for item in items] == [png(0), b"jpeg", b""]
    assert [item.row for item in items] == [0, 1, 2]


def test_a_broken_tar_gives_what_is_before_the_fault(tmp_path: Path):
    tar = write_tar(tmp_path / "all.tar", {f"{i}.png": png(i, 90, 90) for i in range(4)})
    tar.write_bytes(tar.read_bytes()[:50_000])
    items = read(tar, 3)
    assert items[0].data == png(0, 90, 90)
    broken = [item for item in items if isinstance(item.data, Exception)]
    assert broken
    assert all(item.source == str(tar) for item in broken)
    (tmp_path / "none.tar").write_bytes(b"no archive" * 100)
    (item,) = read(tmp_path / "none.tar")
    assert isinstance(item.data, tarfile.ReadError)


@pytest.mark.parametrize("structs", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_parquet_file(tmp_path: Path, structs: bool, parts: int):
    values: list[Any] = [png(i) for i in range(40)]
    values[7] = None
    if structs:
        values = [value and {"bytes": value, "path": "x.png"} for value in values]
    path = tmp_path / "train.parquet"
    table = pa.table({"caption": [str(i) for i in range(40)], "image": values})
    pq.write_table(table, path, row_group_size=18)
    pieces = list_pieces(path)
    assert [piece.rows for piece in pieces] == [18, 18, 4]
    items = read(path, parts)
    assert names(items, None) == [f"{path}#{i}" for i in range(40)]
    assert str(items[7].data) == "column 'image' is empty"
    assert [item.data for i, item in enumerate(items) if i != 7] == [
        png(i) for i in range(40) if i != 7
    ]


def test_the_column_of_a_parquet_file(tmp_path: Path):
    path = tmp_path / "two.parquet"
    pq.write_table(pa.table({"image": [b"1"], "mask": [b"2"]}), path)
    assert read(path, column="mask")[0].data == b"2"
    with pytest.raises(SourceError, match=r"one column of bytes, got \['image', 'mask'\]"):
        read(path)
    with pytest.raises(SourceError, match=r"column must be one of .*, got 'none'"):
        read(path, column="none")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    assert read(tmp_path / "broken.parquet")[0].data == b"PAR1"  # refused as a picture


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_readers_share_a_source(tmp_path: Path, parts: int):
    write_pictures(tmp_path, 10)
    write_tar(tmp_path / "all.tar", {f"{i}.png": b"%d" % i for i in range(10)})
    pq.write_table(
        pa.table({"image": [b"%d" % i for i in range(10)]}),
        tmp_path / "train.parquet",
        row_group_size=2,
    )
    whole = read(tmp_path)
    assert len(whole) == 30
    assert names(read(tmp_path, parts)) == names(whole)
    shares = [
        sum(1 for piece in list_pieces(tmp_path) for _ in read_piece(piece, part, parts))
        for part in range(parts)
    ]
    assert max(shares) <= 30 / parts + 6


def test_urls(tmp_path: Path):
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pipe("/data/in/b.png", png(1))
    memory.pipe("/data/in/sub/a.png", png(0))
    memory.pipe("/data/in/note.md", b"")
    tar = write_tar(tmp_path / "all.tar", {"x.png": png(2)})
    memory.pipe("/data/all.tar", tar.read_bytes())
    memory.pipe("/data/list.txt", b"in/b.png\nmemory://data/in/sub/a.png\n")
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": [png(3)]}), buffer)
    memory.pipe("/data/train.parquet", buffer.getvalue())
    for source, wanted in {
        "memory://data/in": [png(1), png(0)],
        "memory://data/in/*.png": [png(1)],
        "memory://data/in/sub/a.png": [png(0)],
        "memory://data/all.tar": [png(2)],
        "memory://data/train.parquet": [png(3)],
        "memory://data/list.txt": [png(1), png(0)],
        f"file://{tar}": [png(2)],
    }.items():
        items = read(source)
        assert [item.data for item in items] == wanted
        assert all("://" in item.source for item in items)
    for source in ("memory://data/none", "nothing://a", "memory://data/in/*.jpg"):
        with pytest.raises(SourceError):
            list_pieces(source)


def test_a_large_file_stays_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (path,) = write_pictures(tmp_path, 1)
    monkeypatch.setattr(sources, "_MOST_BYTES", 100)
    assert [item.data for item in read(tmp_path)] == [path]


def test_a_name_that_is_no_text(tmp_path: Path):
    path = tmp_path / b"caf\xe9.png".decode("utf-8", "surrogateescape")
    path.write_bytes(png(0))
    (item,) = read(tmp_path)
    assert item.source == f"{tmp_path}/caf\\xe9.png"
    assert item.data == png(0)
