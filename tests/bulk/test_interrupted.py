"""Runs that are killed, and disks that are full: nothing is lost, twice, or half."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("pyarrow", reason="the bulk extra is not installed")
pytest.importorskip("tqdm", reason="the bulk extra is not installed")

from bulk_cases import contents, encode_tiny, same_contents, tiny_checkpoint, write_pictures

from cosmos3_fast.bulk.folder import Folder

COUNT = 60
SHARD = 4
FORK = multiprocessing.get_context("fork")


def work(source: Path, out: Path) -> None:
    encode_tiny(source, out, workers=2, shard_size=SHARD, batch_size=2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, float]:
    """A source, what an undisturbed run makes of it, and its seconds."""
    folder = tmp_path_factory.mktemp("whole")
    paths = write_pictures(folder / "in", COUNT)
    for i in range(5):
        shutil.copy(paths[7 * i], folder / "in" / f"copy{i}.png")
    start = time.monotonic()
    run = FORK.Process(target=work, args=(folder / "in", folder / "out"))
    run.start()
    run.join()
    seconds = time.monotonic() - start
    assert len(contents(folder / "out")) == COUNT
    return folder / "in", folder / "out", seconds


def children(process: int) -> list[int]:
    path = Path(f"/proc/{process}/task/{process}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


def gone(process: int) -> bool:
    """Whether a process ends within a few seconds."""
    for _ in range(50):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("victim", ["driver", "worker"])
@pytest.mark.parametrize("moment", range(5))
def test_a_killed_run_goes_on(
    whole: tuple[Path, Path, float], tmp_path: Path, victim: str, moment: int
):
    source, wanted, seconds = whole
    out = tmp_path / "out"
    # One moment in each fifth of a run.
    after = seconds * (moment + random.random()) / 5
    run = FORK.Process(target=work, args=(source, out))
    run.start()
    time.sleep(after)
    assert run.pid is not None
    workers = children(run.pid)
    for process in [run.pid] if victim == "driver" else workers[:1]:
        os.kill(process, signal.SIGKILL)
    run.join(60)
    assert not run.is_alive()
    assert all(gone(worker) for worker in workers), "workers outlive their run"
    if (out / "dataset.json").exists():
        held, right = contents(out), contents(wanted)
        assert held.keys() <= right.keys()
    encode_tiny(source, out, shard_size=SHARD)
    assert same_contents(out, wanted), f"killed after {after:.3f} of {seconds:.3f} s"
    folder = Folder(out)
    stems = [{path.stem for path in part.iterdir()} for part in (folder.shards, folder.manifest)]
    assert stems[0] == stems[1]
    assert not list(out.rglob("*.partial"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB; only root can mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    may = os.geteuid() == 0 and shutil.which("mount") is not None
    if not may or subprocess.run(mount, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_a_full_disk_stops_cleanly(small_disk: Path, tmp_path: Path, engine: str):
    if engine == "ray":
        pytest.importorskip("ray", reason="the ray extra is not installed: make test-bulk")
    write_pictures(tmp_path / "in", 40)
    vae = tiny_checkpoint(tmp_path / "vae")
    command = [
        *(sys.executable, "-m", "cosmos3_fast", "encode", str(tmp_path / "in")),
        *("--out", str(small_disk / "out"), "--vae", str(vae), "--size", "32x48"),
        *("--shard-size", "4", "--dtype", "fp32", "--batch-size", "2", "--workers", "0"),
        *(("--ray",) if engine == "ray" else ()),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert "No space left on device" in last
    assert "Traceback" not in last
    held = len(contents(small_disk / "out"))
    assert 0 < held < 40
    assert not list(small_disk.rglob("*.partial"))
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert f"{40 - held} encoded" in ended.stdout
    assert len(contents(small_disk / "out")) == 40
