"""What a source stands for where it is no plain folder of pictures, and what is left out of it."""

from __future__ import annotations

import glob
import io
import os
import tarfile
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pyarrow", reason="the bulk extra is not installed")
pytest.importorskip("tqdm", reason="the bulk extra is not installed")

import pyarrow as pa
import pyarrow.parquet as pq
from bulk_cases import encode_tiny, picture, png, write_pictures

from cosmos3_fast.bulk import LatentDataset
from cosmos3_fast.bulk.folder import FolderError
from cosmos3_fast.bulk.listing import expand_braces
from cosmos3_fast.bulk.sources import Item, SourceError, list_pieces, read_piece

fsspec = pytest.importorskip("fsspec", reason="the bulk extra is not installed")


def read(source: Any, **options: Any) -> list[Item]:
    return [item for piece in list_pieces(source, **options) for item in read_piece(piece)]


def names(items: list[Item], base: Path) -> list[str]:
    return [item.source.removeprefix(f"{base}/") for item in items]


def faults(items: list[Item]) -> dict[str, str]:
    """By name, why items cannot be read."""
    return {item.source: str(item.data) for item in items if isinstance(item.data, Exception)}


def as_format(kind: str) -> bytes:
    buffer = io.BytesIO()
    picture(3).save(buffer, kind)
    return buffer.getvalue()


# Nothing is lost in silence.


def test_strings_are_paths_not_empty_pictures(tmp_path: Path):
    write_pictures(tmp_path / "in", 4)
    paths = ["in/part0/0000.png", str(tmp_path / "in/part0/0001.png"), "none.png", None]
    table = pa.table({"image_path": paths, "size": [1, 2, 3, 4]})
    pq.write_table(table, tmp_path / "table.parquet")
    summary = encode_tiny(tmp_path / "table.parquet", tmp_path / "out", column="image_path")
    assert (summary.samples, summary.repeated) == (2, 0)
    assert [Path(each.source).name for each in summary.failures] == [
        "table.parquet#2", "table.parquet#3",
    ]  # fmt: skip
    assert "No such file" in summary.failures[0].reason
    assert "column 'image_path' is empty" in summary.failures[1].reason
    with pytest.raises(SourceError, match=r"column 'size' of .* must hold bytes.* got int64"):
        list_pieces(tmp_path / "table.parquet", column="size")


STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
WITH_PATH = [{"bytes": None, "path": "a.png"}, {"bytes": png(1), "path": "x"}]
COLUMNS = {
    "dictionary": pa.array([png(0), png(1)]).dictionary_encode(),
    "binary view": pa.array([png(0), png(1)], pa.binary_view()),
    "large binary": pa.array([png(0), png(1)], pa.large_binary()),
    "struct with a path alone": pa.array(WITH_PATH, STRUCT),
    "string": pa.array(["a.png", "b.png"]),
    "string view": pa.array(["a.png", "b.png"], pa.string_view()),
    "dictionary of strings": pa.array(["a.png", "b.png"]).dictionary_encode(),
}


@pytest.mark.parametrize("column", COLUMNS)
def test_every_kind_of_column(tmp_path: Path, column: str):
    for i, name in enumerate(("a.png", "b.png")):
        (tmp_path / name).write_bytes(png(i))
    pq.write_table(pa.table({"x": COLUMNS[column]}), tmp_path / "t.parquet")
    items = read(tmp_path / "t.parquet", column="x")
    assert [item.data for item in items] == [png(0), png(1)]
    if "string" not in column:
        assert len(read(tmp_path / "t.parquet")) == 2


@pytest.mark.parametrize("kind", [pa.list_(pa.binary()), pa.large_list(STRUCT)])
def test_lists_of_pictures_are_pictures_each(tmp_path: Path, kind: Any):
    def cell(i: int) -> Any:
        return png(i) if kind.value_type == pa.binary() else {"bytes": png(i), "path": None}

    rows = [[cell(0)], [], None, [cell(1), cell(2)]]
    pq.write_table(pa.table({"images": pa.array(rows, kind)}), tmp_path / "t.parquet")
    items = read(tmp_path / "t.parquet")
    assert names(items, tmp_path) == [
        "t.parquet#0[0]", "t.parquet#2", "t.parquet#3[0]", "t.parquet#3[1]",
    ]  # fmt: skip
    assert len({(item.index, item.row) for item in items}) == 4
    assert [item.data for item in items if isinstance(item.data, bytes)] == list(map(png, range(3)))


def test_what_is_left_out_of_a_folder_is_counted_and_said(tmp_path: Path):
    write_pictures(tmp_path / "in", 2)
    for name in ("a.txt", "b.txt", "c.json", "README"):
        (tmp_path / "in" / name).write_text("Pictures of rockets")
    summary = encode_tiny(tmp_path / "in", tmp_path / "out")
    assert summary.left_out == Counter({".txt": 2, ".json": 1, "no suffix": 1})
    assert "  left out, no pictures or clips: 4 (.txt 2, .json 1, no suffix 1)" in summary.lines()


def test_pictures_are_known_by_content(tmp_path: Path):
    source = tmp_path / "in"
    source.mkdir()
    suffixes = {"JPEG": (".jfif", ".jpe", ""), "TGA": (".tga",), "JPEG2000": (".j2k", ".img")}
    count = 0
    for kind, ends in suffixes.items():
        for end in ends:
            (source / f"{kind}{end}").write_bytes(as_format(kind))
            count += 1
    (source / "plain.psd0").write_bytes(b"8BPS but nothing else")
    left_out: Counter[str] = Counter()
    assert len(list_pieces(source, left_out=left_out)) == count
    assert left_out == {".psd0": 1}
    for end in (".jxl", ".flv", ".wmv", ".3gp", ".ts"):
        (source / f"later{end}").write_bytes(b"broken, and said so")
    summary = encode_tiny(source, tmp_path / "out")
    assert (summary.samples + summary.repeated, len(summary.failures)) == (count, 5)


def test_members_of_a_tar_too(tmp_path: Path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in {"a.jfif": as_format("JPEG"), "b": png(1), "b.json": b"{}"}.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    for workers in (0, 2):
        out = tmp_path / f"out{workers}"
        summary = encode_tiny(tmp_path / "a.tar", out, workers=workers)
        assert (summary.samples, summary.left_out) == (2, Counter({".json": 1}))


def test_linked_folders_are_followed_and_loops_end(tmp_path: Path):
    write_pictures(tmp_path / "elsewhere", 2)
    source = tmp_path / "in"
    (source / "a").mkdir(parents=True)
    (source / "b").mkdir()
    picture(7).save(source / "a" / "7.png")
    picture(8).save(source / "b" / "8.png")
    (source / "a" / "to_b").symlink_to(source / "b")
    (source / "b" / "to_a").symlink_to(source / "a")
    (source / "linked").symlink_to(tmp_path / "elsewhere")
    (source / "broken.png").symlink_to(tmp_path / "none.png")
    wanted = ["a/7.png", "b/8.png", "broken.png", "linked/part0/0000.png", "linked/part0/0001.png"]
    items = read(source)
    assert names(items, source) == wanted
    assert list(faults(items)) == [str(source / "broken.png")]
    items = read(f"{source}/**/*.png")
    assert names(items, source) == wanted
    assert list(faults(items)) == [str(source / "broken.png")]


def test_patterns_match_what_glob_matches(tmp_path: Path):
    for name in (
        *("a.png", ".hidden.png", "x/b.png", "x/y/c.png", "x/.dot/d.png", "x/y/e.txt"),
        *("z/x/f.png", "x/y/x/g.png"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    for pattern in (
        *("**", "**/*", "**/*.png", "*/**/*.png", "**/x/*.png", "**/x/**/*.png", "x/**", "**/x/**"),
        *("**/.*", "**/.dot/*", "[xz]/**/?.png", "none/**", "**/y", "**/", "x/*/*.png"),
    ):
        # Each once, of which glob gives some twice.
        wanted = sorted(set(glob.glob(f"{tmp_path}/{pattern}", recursive=True)))
        wanted = [each for each in wanted if os.path.isfile(each)]
        try:
            found = [piece.url for piece in list_pieces(f"{tmp_path}/{pattern}")]
        except SourceError:
            found = []
        assert found == wanted, pattern


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_pictures(tmp_path, 9)
    scandir = os.scandir

    def refuse(path: Any) -> Any:
        if str(path).endswith("part1"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    items = read(tmp_path)
    assert len(items) == 9
    assert faults(items) == {
        str(tmp_path / "part1"): "the folder cannot be read: Permission denied"
    }


def test_an_output_inside_the_source_is_passed_over(tmp_path: Path):
    write_pictures(tmp_path, 3)
    for name in ("first", "second"):
        summary = encode_tiny(tmp_path, tmp_path / "latents" / name)
        assert (summary.samples, summary.failures) == (3, [])
    assert summary.left_out == Counter({"folders of latents": 1})
    summary = encode_tiny(f"{tmp_path}/**", tmp_path / "latents" / "third")
    assert (summary.samples, summary.failures) == (3, [])
    assert summary.left_out == Counter({"folders of latents": 2})


@pytest.mark.parametrize("out", ["s3://bucket/out", Path("s3://bucket/out"), "memory://out"])
def test_a_folder_of_latents_is_no_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: Any):
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "in", 1)
    with pytest.raises(FolderError, match="must be on a disk of this machine, got the URL"):
        encode_tiny(tmp_path / "in", out)
    with pytest.raises(FolderError, match="must be on a disk of this machine"):
        LatentDataset(out)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


# One odd thing does not stop a run.


def test_a_table_beside_pictures_is_an_error_of_its_own(tmp_path: Path):
    write_pictures(tmp_path / "in", 2)
    table = tmp_path / "in" / "metadata.parquet"
    pq.write_table(pa.table({"file_name": ["0000.png"], "text": ["a"]}), table)
    for source in (tmp_path / "in", str(tmp_path / "in" / "**" / "*.p*")):
        items = read(source)
        assert len(items) == 3
        (fault,) = faults(items).items()
        assert fault[0] == str(table)
        assert "must have one column of bytes, got none" in fault[1]
    with pytest.raises(SourceError, match="must have one column of bytes, got none"):
        list_pieces(table)


def test_names_in_lists_that_stand_for_nothing(tmp_path: Path):
    write_pictures(tmp_path / "in", 2)
    listed = tmp_path / "all.txt"
    dead = "http://127.0.0.1:9/a.png?size=3"
    lines = ["in/part0/0000.png", "in/none[1].png", dead, "in/no?.png", "in/part0/0001.png"]
    listed.write_text("\n".join(lines))
    items = read(listed)
    assert len(items) == 5
    missing = [str(tmp_path / "in/none[1].png"), str(tmp_path / "in/no?.png")]
    assert set(faults(items)) == {*missing, dead}
    assert all("holds no picture" in faults(items)[name] for name in missing)
    summary = encode_tiny(listed, tmp_path / "out")
    assert (summary.samples, len(summary.failures)) == (2, 3)


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]
)
def test_lists_of_any_unicode(tmp_path: Path, encoding: str):
    write_pictures(tmp_path / "in", 1)
    picture(1).save(tmp_path / "in" / "Größe.png")
    listed = tmp_path / "all.txt"
    listed.write_bytes("in/part0/0000.png\r\nin/Größe.png\r\n".encode(encoding))
    items = read(listed)
    assert names(items, tmp_path) == ["in/part0/0000.png", "in/Größe.png"]
    assert not faults(items)


def test_what_is_no_regular_file_is_an_error_and_waits_for_nothing(tmp_path: Path):
    write_pictures(tmp_path / "in", 1)
    for name in ("a.png", "b.tar", "c.parquet", "d", "e.mp4"):
        os.mkfifo(tmp_path / "in" / name)
    items = read(tmp_path / "in")
    assert set(faults(items)) == {
        str(tmp_path / "in" / name) for name in ("a.png", "b.tar", "c.parquet", "e.mp4")
    }
    assert all("no regular file" in fault for fault in faults(items).values())
    listed = tmp_path / "all.txt"
    listed.write_text("in/a.png\nin/part0/0000.png\n/dev/zero\n")
    assert len(faults(read(listed))) == 2
    assert len(faults(read(str(tmp_path / "in" / "*.png")))) == 1
    with pytest.raises(SourceError, match="is no regular file"):
        list_pieces(tmp_path / "in" / "a.png")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a{1,2}b", ["a1b", "a2b"]),
        ("{000..003}.tar", ["000.tar", "001.tar", "002.tar", "003.tar"]),
        ("{9..11}", ["9", "10", "11"]),
        ("{08..10}", ["08", "09", "10"]),
        ("{3..1}", ["3", "2", "1"]),
        ("{0..9..4}", ["0", "4", "8"]),
        ("{a,b}{1..2}", ["a1", "a2", "b1", "b2"]),
        ("{a,{b,c}d}", ["a", "bd", "cd"]),
        ("{a,{1..2}}x", ["ax", "1x", "2x"]),
        ("plain", ["plain"]),
        ("{single}", ["{single}"]),
        ("{x{1,2}}", ["{x1}", "{x2}"]),
        ("{open{1,2}", ["{open1", "{open2"]),
        ("{,a}", ["", "a"]),
    ],
)
def test_braces(text: str, wanted: list[str]):
    assert expand_braces(text) == wanted


def test_braces_name_files(tmp_path: Path):
    for i in range(4):
        picture(i).save(tmp_path / f"{i:03}.png")
    items = read(f"{tmp_path}/{{000..004}}.png")
    assert names(items, tmp_path) == [f"{i:03}.png" for i in range(5)]
    assert list(faults(items)) == [str(tmp_path / "004.png")]
    picture(9).save(tmp_path / "{1,2}.png")
    assert names(read(tmp_path / "{1,2}.png"), tmp_path) == ["{1,2}.png"]
    assert names(read(f"{tmp_path}/{{00[01],003}}.png"), tmp_path) == [
        "000.png", "001.png", "003.png",
    ]  # fmt: skip
    with pytest.raises(SourceError, match="does not exist"):
        list_pieces(f"{tmp_path}/{{8,9}}.png")
    with pytest.raises(SourceError, match="at most 1000000 names"):
        list_pieces(f"{tmp_path}/{{1..9999999}}.png")
    memory = fsspec.filesystem("memory")
    memory.pipe("/braces/0.png", png(0))
    memory.pipe("/braces/1.png", png(1))
    assert [item.data for item in read("memory://braces/{0..1}.png")] == [png(0), png(1)]


def test_archives_and_chained_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("x.zip", "w") as archive:
        for i, name in enumerate(("a.png", "f/b.png", "f/c.png")):
            archive.writestr(name, png(i))
        archive.writestr("f/note.txt", "a caption")
    for source, count in {
        "x.zip": 3,
        "zip://a.png::x.zip": 1,
        "zip://f::x.zip": 2,
        "zip://f/*.png::x.zip": 2,
        f"zip://**/*.png::file://{tmp_path}/x.zip": 3,
        "zip://::x.zip": 3,
    }.items():
        items = read(source)
        assert len(items) == count, source
        assert not faults(items)
        assert all("::" in item.source for item in items)
    left_out: Counter[str] = Counter()
    list_pieces("x.zip", left_out=left_out)
    assert left_out == {".txt": 1}
    for workers in (0, 2):
        summary = encode_tiny("x.zip", tmp_path / f"out{workers}", workers=workers)
        assert (summary.samples, summary.failures) == (3, [])
    with pytest.raises(SourceError, match="does not exist"):
        list_pieces("zip://none.png::x.zip")
    (tmp_path / "broken.zip").write_bytes(b"PK no zip")
    with pytest.raises(SourceError, match="cannot be opened"):
        list_pieces("broken.zip")


def test_a_pattern_in_a_folder_whose_name_looks_like_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for i, folder in enumerate(("set[1]", "set1")):
        (tmp_path / folder).mkdir()
        picture(i).save(tmp_path / folder / f"{i}.png")
    (tmp_path / "set[1]" / "list.txt").write_text("0.png\n*.png\n")
    monkeypatch.chdir(tmp_path / "set[1]")
    for source in ("*.png", "**/*.png", "."):
        assert names(read(source), tmp_path) == ["set[1]/0.png"]
    assert names(read("list.txt"), tmp_path) == ["set[1]/0.png"] * 2


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.safetensors"])
def test_files_of_other_kinds_are_refused(tmp_path: Path, name: str):
    (tmp_path / name).write_text("image,caption\n")
    with pytest.raises(SourceError, match=r"must be a folder, a pattern, .* got \."):
        encode_tiny(tmp_path / name, tmp_path / "out")
