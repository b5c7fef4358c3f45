"""Files of a folder of latents that something else has changed: noticed, named, mended."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("pyarrow", reason="the bulk extra is not installed")
pytest.importorskip("tqdm", reason="the bulk extra is not installed")

import pyarrow.parquet as pq
from bulk_cases import encode_tiny, same_contents, tiny_checkpoint, write_pictures

from cosmos3_fast.bulk import LatentDataset, check
from cosmos3_fast.bulk.folder import Folder, FolderError
from cosmos3_fast.cli import main as cli


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    write_pictures(tmp_path / "in", 9)
    # Names of further files, so that there is a part of them.
    (tmp_path / "in" / "copy.png").write_bytes((tmp_path / "in/part0/0003.png").read_bytes())
    for name in ("out", "whole"):
        encode_tiny(tmp_path / "in", tmp_path / name, shard_size=3)
    return Folder(tmp_path / "out")


def a_shard(folder: Folder) -> Path:
    return sorted(folder.shards.iterdir())[1]


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def mended(folder: Folder, **options: bool) -> list[str]:
    """What a rerun says is damaged; after it the folder is that of an undisturbed run."""
    summary = encode_tiny(folder.path.parent / "in", folder.path, shard_size=3, **options)
    assert same_contents(folder.path, folder.path.parent / "whole")
    assert check(folder.path) == []
    assert all(str(each) in "\n".join(summary.lines()) for each in summary.damaged)
    return [each.path.name for each in summary.damaged]


def test_a_whole_folder(folder: Folder):
    assert check(folder.path) == []
    assert mended(folder) == []


def test_a_shard_cut_short(folder: Folder):
    shard = a_shard(folder)
    cut(shard)
    (damage,) = check(folder.path)
    assert damage.path == shard
    assert "bytes, got" in damage.reason
    data = LatentDataset(folder.path)
    with pytest.raises(FolderError, match=f"{shard.name}' cannot be read"):
        [data[i] for i in range(len(data))]
    assert mended(folder) == [shard.name]
    assert shard.with_name(f"{shard.name}.damaged").exists()


def test_a_shard_that_is_gone(folder: Folder):
    shard = a_shard(folder)
    shard.unlink()
    assert [each.path for each in check(folder.path)] == [shard]
    assert mended(folder) == [shard.name]


def test_a_flipped_bit(folder: Folder):
    shard = a_shard(folder)
    flip(shard, -7)
    (damage,) = check(folder.path)
    assert damage.path == shard
    assert "SHA-256" in damage.reason
    # The size is what it was: a rerun finds it when it is asked to look.
    summary = encode_tiny(folder.path.parent / "in", folder.path, shard_size=3)
    assert (summary.samples, summary.damaged) == (0, [])
    assert mended(folder, check=True) == [shard.name]


@pytest.mark.parametrize("part", ["manifest", "names"])
def test_a_part_that_cannot_be_read(folder: Folder, part: str):
    path = sorted((folder.path / part).iterdir())[0]
    cut(path)
    assert [each.path for each in check(folder.path)] == [path]
    if part == "manifest":
        with pytest.raises(
            FolderError, match=f"{path.name}' cannot be read: .* run `encode` again"
        ):
            LatentDataset(folder.path)
    assert mended(folder) == [path.name]


def test_folders_without_checksums_are_read(folder: Folder):
    """Those of earlier releases."""
    for part in folder.manifest.iterdir():
        table = pq.read_table(part).drop_columns(["shard_bytes", "shard_sha256"])
        pq.write_table(table, part)
    before = LatentDataset(folder.path)[0]["latents"]
    assert check(folder.path) == []
    assert mended(folder, check=True) == []
    assert torch.equal(LatentDataset(folder.path)[0]["latents"], before)


def test_the_command(folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["encode", "--check", "--out", str(folder.path)]) == 0
    assert "out: 0 damaged files" in capsys.readouterr().out
    shard = a_shard(folder)
    flip(shard, -7)
    assert cli.main(["encode", "--check", "--out", str(folder.path)]) == 1
    assert str(shard) in capsys.readouterr().out
    assert cli.main(["encode", "--out", str(folder.path)]) == 2
    assert "SOURCE" in capsys.readouterr().err
    assert cli.main(["encode", "--check", "--out", str(tmp_path / "none")]) == 2
    assert "holds no dataset of latents" in capsys.readouterr().err
    vae = tiny_checkpoint(tmp_path / "vae")
    command = ["encode", str(tmp_path / "in"), "--out", str(tmp_path / "new"), "--vae", str(vae)]
    command += ["--size", "16x24", "--workers", "0", "--check"]
    assert cli.main(command) == 0
    flip(a_shard_of(tmp_path / "new"), -7)
    assert cli.main(command) == 0
    assert "damaged files: 1; their samples are encoded again" in capsys.readouterr().out


def a_shard_of(folder: Path) -> Path:
    return next((folder / "shards").iterdir())
