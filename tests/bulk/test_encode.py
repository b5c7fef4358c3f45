"""A source to a folder of latents, in one process: what is written, skipped and refused."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from encoder_cases import TINY
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

pytest.importorskip("pyarrow", reason="the bulk extra is not installed")
pytest.importorskip("tqdm", reason="the bulk extra is not installed")

import pyarrow.parquet as pq
from bulk_cases import (
    SIZE,
    close,
    contents,
    encode_tiny,
    picture,
    same_contents,
    tiny_checkpoint,
    tiny_clip_encoder,
    tiny_encoder,
    write_pictures,
)

from cosmos3_fast import FrameEncoder
from cosmos3_fast.bulk import LatentDataset, batches, shards
from cosmos3_fast.bulk.folder import Folder, FolderError
from cosmos3_fast.bulk.keys import KeySet
from cosmos3_fast.bulk.reading import Reader, key_of
from cosmos3_fast.bulk.sources import SourceError
from cosmos3_fast.images.load import load_frames
from cosmos3_fast.vae.synthetic import synthetic_state_dict


def errors(out: Path) -> list[dict[str, Any]]:
    return pq.read_table(out / "errors.parquet").to_pylist()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_latents_are_those_of_the_encoder(tmp_path: Path, workers: int, dtype: torch.dtype):
    paths = write_pictures(tmp_path / "in", 11)
    options: dict[str, Any] = {"workers": workers, "dtype": dtype, "batch_size": 4, "shard_size": 5}
    summary = encode_tiny(tmp_path / "in", tmp_path / "out", **options)
    assert (summary.samples, summary.total, summary.failures) == (11, 11, [])
    dataset = LatentDataset(tmp_path / "out")
    assert [sample["source"] for sample in (dataset[i] for i in range(11))] == list(map(str, paths))
    assert len(list((tmp_path / "out" / "shards").iterdir())) == 3
    for i, path in enumerate(paths):
        wanted = tiny_encoder()(load_frames(path, *SIZE))[0].to(dtype)
        sample = dataset[i]
        assert close(sample["latents"], wanted)
        assert sample["size"] == (20, 30)
        assert sample["crop"] == (0, 0, 30, 20)


def test_the_same_content_is_one_sample_with_every_name(tmp_path: Path):
    paths = write_pictures(tmp_path / "in", 3)
    copies = [tmp_path / "in" / name for name in ("copy.png", "part0/z.png")]
    for copy in copies:
        shutil.copy(paths[1], copy)
    summary = encode_tiny(tmp_path / "in", tmp_path / "out")
    assert (summary.samples, summary.repeated) == (3, 2)
    dataset = LatentDataset(tmp_path / "out")
    assert sorted(dataset.names(0)) == sorted(map(str, [paths[1], *copies]))
    # A later run finds it under yet another name, and writes that down once.
    shutil.copy(paths[1], tmp_path / "in" / "later.png")
    for _ in range(2):
        assert encode_tiny(tmp_path / "in", tmp_path / "out").known == 6
    names = LatentDataset(tmp_path / "out").names(0)
    assert len(names) == 4
    assert str(tmp_path / "in" / "later.png") in names


def test_broken_pictures_are_rows(tmp_path: Path):
    paths = write_pictures(tmp_path / "in", 4)
    paths[1].write_bytes(paths[1].read_bytes()[:60])
    paths[2].write_bytes(b"no picture")
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join([*map(str, paths), "missing.png"]))
    summary = encode_tiny(listed, tmp_path / "out")
    assert summary.samples == 2
    rows = errors(tmp_path / "out")
    assert [Path(row["source"]).name for row in rows] == ["0001.png", "0002.png", "missing.png"]
    assert [row["content_hash"] is None for row in rows] == [False, False, True]
    assert "cannot be read as an image" in rows[1]["reason"]
    assert "0x" not in rows[1]["reason"]
    # Once they are whole, they are encoded and the file of errors goes.
    write_pictures(tmp_path / "in", 4)
    assert encode_tiny(tmp_path / "in", tmp_path / "out").samples == 2
    assert not (tmp_path / "out" / "errors.parquet").exists()


def test_latents_that_are_not_finite_are_an_error(tmp_path: Path):
    tensors = synthetic_state_dict(TINY, 0)
    encoder = FrameEncoder.from_state_dict(tensors, TINY, torch.float32)
    encoder.conv_out.bias[0] = torch.inf
    write_pictures(tmp_path / "in", 2)
    summary = encode_tiny(tmp_path / "in", tmp_path / "out", vae=encoder)
    assert summary.samples == 0
    assert "NaN or infinite" in errors(tmp_path / "out")[1]["reason"]


def test_a_further_run_adds_what_is_new(tmp_path: Path):
    write_pictures(tmp_path / "in", 5)
    encode_tiny(tmp_path / "in", tmp_path / "out", shard_size=2)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}
    write_pictures(tmp_path / "in", 3, first=5)
    summary = encode_tiny(tmp_path / "in", tmp_path / "out")
    assert (summary.samples, summary.known, summary.total) == (3, 5, 8)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    encode_tiny(tmp_path / "in", tmp_path / "whole")
    assert same_contents(tmp_path / "out", tmp_path / "whole")


def test_what_a_killed_run_leaves_does_not_count(tmp_path: Path):
    write_pictures(tmp_path / "in", 6)
    encode_tiny(tmp_path / "in", tmp_path / "whole", shard_size=2)
    encode_tiny(tmp_path / "in", tmp_path / "out", shard_size=2)
    folder = Folder(tmp_path / "out")
    # A shard before its rows, rows whose shard is gone, and files that were never finished.
    orphan, lost = sorted(folder.shards.iterdir())[:2]
    (folder.manifest / f"{orphan.stem}.parquet").unlink()
    lost.unlink()
    partials = [folder.shards / ".cosmos3-1-a.partial", folder.path / ".cosmos3-1-b.partial"]
    for partial in partials:
        partial.write_bytes(b"half")
    assert len(LatentDataset(tmp_path / "out")) == 2
    assert encode_tiny(tmp_path / "in", tmp_path / "out").samples == 4
    assert same_contents(tmp_path / "out", tmp_path / "whole")
    assert not any(partial.exists() for partial in partials)
    assert len(list(folder.shards.iterdir())) == len(list(folder.manifest.iterdir()))


def test_rows_that_are_there_twice_are_one_sample(tmp_path: Path):
    paths = write_pictures(tmp_path / "in", 3)
    encode_tiny(paths[:2], tmp_path / "out")
    # What a task of Ray that is run again in other company leaves: the same sample in two shards.
    encode_tiny(paths, tmp_path / "again")
    for name in ("shards", "manifest"):
        shutil.copytree(tmp_path / "again" / name, tmp_path / "out" / name, dirs_exist_ok=True)
    assert same_contents(tmp_path / "out", tmp_path / "again")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": (16, 16)}, r"size \(16, 24\), not \(16, 16\)"),
        ({"dtype": torch.float16}, "dtype 'bfloat16', not 'float16'"),
        ({"vae": tiny_encoder(1)}, "vae_hash"),
        ({"buckets": (400,)}, "areas"),
        ({"background": "white"}, "background None"),
    ],
)
def test_other_settings_need_another_folder(tmp_path: Path, options: dict[str, Any], message: str):
    write_pictures(tmp_path / "in", 1)
    encode_tiny(tmp_path / "in", tmp_path / "out")
    with pytest.raises(FolderError, match=message):
        encode_tiny(tmp_path / "in", tmp_path / "out", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": (18, 24)}, "height must be a positive multiple of the VAE's spatial factor 4"),
        ({"buckets": (3,)}, "bucket area must be from 16 pixels"),
        ({"clips": 4}, r"clips must be 1 \+ 4k frames, got 4"),
        ({"clips": 5}, "vae must be a ClipEncoder to encode clips"),
        ({"batch_size": 0}, "batch_size must be a positive integer, got 0"),
        ({"workers": -1}, "workers must be 0 or more, got -1"),
        ({"dtype": torch.int8}, "dtype must be one of"),
        ({"background": "no color"}, "background must be a color"),
    ],
)
def test_arguments_are_checked(tmp_path: Path, options: dict[str, Any], message: str):
    write_pictures(tmp_path / "in", 1)
    with pytest.raises(ValueError, match=message):
        encode_tiny(tmp_path / "in", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_sources_with_nothing_in_them(tmp_path: Path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "caption.txt").write_text("")
    for source in (tmp_path / "in", tmp_path / "none", str(tmp_path / "*.png"), []):
        with pytest.raises(SourceError, match="source"):
            encode_tiny(source, tmp_path / "out")
    with pytest.raises(TypeError, match="vae must be a checkpoint's path"):
        encode_tiny(tmp_path, tmp_path / "out", vae=3)


def test_buckets(tmp_path: Path):
    (tmp_path / "in").mkdir()
    shapes = {"wide": (20, 60), "tall": (60, 20), "square": (40, 41), "small": (8, 8)}
    for i, (name, (height, width)) in enumerate(shapes.items()):
        picture(i, height, width).save(tmp_path / "in" / f"{name}.png")
    encode_tiny(tmp_path / "in", tmp_path / "out", buckets=(256, 1024), batch_size=2)
    dataset = LatentDataset(tmp_path / "out")
    found = {
        Path(sample["source"]).stem: tuple(4 * side for side in sample["latents"].shape[2:])
        for sample in (dataset[i] for i in range(4))
    }
    # 1024 = 32x32, 56x16 (3.5) against 52x16 (3.25) and 48x20 (2.4); the small one takes 256.
    assert found == {"wide": (16, 52), "tall": (52, 16), "square": (32, 32), "small": (16, 16)}
    assert dataset.shapes == [tuple(dataset[i]["latents"].shape) for i in range(4)]


def test_clips_and_pictures_beside_each_other(tmp_path: Path):
    frames = [picture(i) for i in range(11)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "b.gif", save_all=True, append_images=frames[1:7])
    frames[0].save(tmp_path / "c.png")
    encode_tiny(
        str(tmp_path / "*.*"), tmp_path / "out", vae=tiny_clip_encoder(), clips=9, size=(16, 24)
    )
    dataset = LatentDataset(tmp_path / "out")
    assert [shape[1] for shape in dataset.shapes] == [3, 2, 1]
    for i, (name, count) in enumerate((("a.gif", 9), ("b.gif", 5), ("c.png", 1))):
        pixels = load_frames(tmp_path / name, 16, 24, max_frames=count)
        wanted = tiny_clip_encoder()(pixels)[0].bfloat16()
        assert close(dataset[i]["latents"], wanted)


def test_warnings_are_counted_and_kept(tmp_path: Path):
    Image.new("RGBA", (30, 20), (255, 0, 0, 7)).save(tmp_path / "a.png")
    summary = encode_tiny(tmp_path / "a.png", tmp_path / "out")
    assert summary.warnings.total() == 1
    assert "transparent" in summary.lines()[-1]
    rows = pq.read_table(tmp_path / "out" / "manifest").to_pylist()
    assert "transparent" in rows[0]["warnings"]


def test_the_manifest_says_where_the_bytes_are(tmp_path: Path):
    write_pictures(tmp_path / "in", 3)
    encode_tiny(tmp_path / "in", tmp_path / "out")
    for row in pq.read_table(tmp_path / "out" / "manifest").to_pylist():
        content = (tmp_path / "out" / "shards" / row["shard"]).read_bytes()[row["offset"] :]
        shape = row["latent_shape"]
        values = torch.frombuffer(bytearray(content), dtype=torch.bfloat16)
        latents = values[: torch.Size(shape).numel()].view(shape)
        assert torch.equal(latents, contents(tmp_path / "out")[row["key"]][1])
        assert row["key"] == key_of(row["content_hash"])
        assert (row["dtype"], row["pixel_frames"]) == ("bfloat16", 1)
        assert row["package_version"]


def test_a_folder_in_use_is_refused(tmp_path: Path):
    import multiprocessing

    write_pictures(tmp_path / "in", 1)
    encode_tiny(tmp_path / "in", tmp_path / "out")
    context = multiprocessing.get_context("fork")
    held, done = context.Event(), context.Event()

    def hold() -> None:
        with Folder(tmp_path / "out").lock():
            held.set()
            done.wait(30)

    process = context.Process(target=hold)
    process.start()
    assert held.wait(30)
    with pytest.raises(FolderError, match="being written by another run"):
        encode_tiny(tmp_path / "in", tmp_path / "out")
    done.set()
    process.join()
    encode_tiny(tmp_path / "in", tmp_path / "out")


def test_what_was_encoded_before_a_fault_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_pictures(tmp_path / "in", 8)
    forward, calls = FrameEncoder.forward, []

    def fail(self: FrameEncoder, pixels: torch.Tensor) -> torch.Tensor:
        calls.append(pixels)
        if len(calls) == 3:
            raise RuntimeError("boom")
        return forward(self, pixels)

    monkeypatch.setattr(FrameEncoder, "forward", fail)
    with pytest.raises(RuntimeError, match="boom"):
        encode_tiny(tmp_path / "in", tmp_path / "out", batch_size=2)
    # The second batch was at work when the third failed.
    assert len(LatentDataset(tmp_path / "out")) == 2
    assert encode_tiny(tmp_path / "in", tmp_path / "out").total == 8


def test_shards_are_named_by_their_keys():
    assert shards.part_name(["a", "b"]) == shards.part_name(["a", "b"]) != shards.part_name(["b"])


def test_a_video_and_its_first_frame(tmp_path: Path):
    av = pytest.importorskip("av", reason="the video extra is not installed")
    import numpy as np

    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=24)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for i in range(12):
            frame = av.VideoFrame.from_ndarray(np.full((32, 48, 3), 20 * i, np.uint8))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    for name, clips, frames, encoder in (
        ("frame", 1, 1, tiny_encoder()),
        ("clip", 9, 3, tiny_clip_encoder()),
    ):
        encode_tiny(tmp_path / "*.mp4", tmp_path / name, vae=encoder, clips=clips)
        sample = LatentDataset(tmp_path / name)[0]
        assert sample["size"] == (32, 48)
        pixels = load_frames(path, *SIZE, max_frames=clips)
        wanted = encoder(pixels[:, 0] if clips == 1 else pixels)[0].bfloat16()
        assert sample["latents"].shape[1] == frames
        assert close(sample["latents"], wanted)


def test_the_bar_counts_every_picture(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    paths = write_pictures(tmp_path / "in", 5)
    paths[0].write_bytes(b"broken")
    for _ in range(2):
        encode_tiny(tmp_path / "in", tmp_path / "out", progress=True)
        last = capfd.readouterr().err.split("\r")[-1]
        assert "5/5" in last
        assert "images/s" in last
    encode_tiny(tmp_path / "in", tmp_path / "out")
    assert capfd.readouterr().err == ""


@given(st.sets(st.text("0123456789abcdef", min_size=32, max_size=32)), st.data())
def test_a_key_set_is_a_set(keys: set[str], data: st.DataObject):
    held = KeySet(keys)
    assert len(held) == len(keys)
    assert all(key in held for key in keys)
    other = data.draw(st.text("0123456789abcdef", max_size=32))
    assert (other in held) == (other in keys)


def test_little_shared_memory_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Docker gives 64 MB: what does not fit goes through pipes."""
    write_pictures(tmp_path / "in", 12)
    encode_tiny(tmp_path / "in", tmp_path / "shared", workers=2, batch_size=4)
    through: list[object] = []
    received = batches.Sent.received
    monkeypatch.setattr(
        batches.Sent, "received", lambda self: through.append(self) or received(self)
    )
    # 16x24 pixels of 3 bytes; 4 of them by 2 workers, twice, need 18 kB.
    small = SimpleNamespace(f_bavail=4, f_frsize=4096)
    for name in ("none", "small"):
        monkeypatch.setattr(batches, "_SHARED_MEMORY", "/no/such/folder")
        if name == "small":
            monkeypatch.setattr(batches.os, "statvfs", lambda path: small)
        through.clear()
        summary = encode_tiny(tmp_path / "in", tmp_path / name, workers=2, batch_size=4)
        assert summary.samples == 12
        # Of each worker 4 pictures and then 2, which are few enough for the small one.
        assert len(through) == {"none": 4, "small": 2}[name]
        assert same_contents(tmp_path / name, tmp_path / "shared")


@pytest.mark.parametrize("size", ["64k"])
def test_a_shared_memory_that_is_really_small(tmp_path: Path, size: str):
    """In a container of its own; only root can mount one."""
    if os.geteuid() or shutil.which("unshare") is None:
        pytest.skip("no file system can be mounted here")
    write_pictures(tmp_path / "in", 8)
    vae = tiny_checkpoint(tmp_path / "vae")
    command = (
        f"mount -t tmpfs -o size={size} tmpfs /dev/shm || exit 77\n"
        f"exec {sys.executable} -m cosmos3_fast encode {tmp_path / 'in'} --out {tmp_path / 'out'} "
        f"--vae {vae} --size 160x240 --workers 2"
    )
    ended = subprocess.run(
        ["unshare", "-m", "bash", "-c", command],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    if ended.returncode in (1, 77):
        pytest.skip(f"no file system can be mounted here: {ended.stderr}")
    assert ended.returncode == 0, ended.stderr
    assert "8 encoded" in ended.stdout


def test_one_process_has_one_run_in_a_folder(tmp_path: Path):
    write_pictures(tmp_path / "in", 2)
    encode_tiny(tmp_path / "in", tmp_path / "out")
    folder, again = Folder(tmp_path / "out"), Folder(tmp_path / "in" / ".." / "out")
    with folder.lock():
        for _ in range(2):
            with pytest.raises(FolderError, match="being written by another run"), again.lock():
                pass
        with pytest.raises(FolderError, match="being written by another run"):
            encode_tiny(tmp_path / "in", tmp_path / "out")
    encode_tiny(tmp_path / "in", tmp_path / "out")


@pytest.mark.filterwarnings("ignore:the file system")
def test_threads_that_write_to_one_folder_do_not_meet(tmp_path: Path):
    write_pictures(tmp_path / "in", 20)
    results: list[object] = []

    def work() -> None:
        try:
            results.append(encode_tiny(tmp_path / "in", tmp_path / "out", shard_size=2).samples)
        except FolderError as error:
            results.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(each for each in results if isinstance(each, int)) == 20
    encode_tiny(tmp_path / "in", tmp_path / "whole")
    assert same_contents(tmp_path / "out", tmp_path / "whole")


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import errno
    import fcntl

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    write_pictures(tmp_path / "in", 2)
    monkeypatch.setattr(fcntl, "lockf", refuse)
    with pytest.warns(UserWarning, match=r"has no locks \(No locks available\): see to it"):
        assert encode_tiny(tmp_path / "in", tmp_path / "out").samples == 2


def test_workers_do_not_free_what_is_their_parent_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Freeing a video's decoder waits for threads that a fork does not copy."""
    driver, freed = os.getpid(), tmp_path / "freed"

    class Decoder:
        def __del__(self) -> None:
            if os.getpid() != driver:
                freed.touch()

    cycle: list[object] = [Decoder()]
    cycle.append(cycle)
    del cycle
    read = Reader.read

    def collecting(self: Reader, item: Any) -> Any:
        gc.collect()
        return read(self, item)

    monkeypatch.setattr(Reader, "read", collecting)
    write_pictures(tmp_path / "in", 4)
    assert encode_tiny(tmp_path / "in", tmp_path / "out", workers=2).samples == 4
    assert not freed.exists()
