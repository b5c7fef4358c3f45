"""The Ray engine on a real cluster of two nodes on this machine: its result, and what may die."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pyarrow", reason="the bulk extra is not installed")
pytest.importorskip("tqdm", reason="the bulk extra is not installed")
pytest.importorskip("ray", reason="the ray extra is not installed: make test-bulk")

# Before Ray is imported.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import pyarrow.parquet as pq
import ray
from bulk_cases import (
    SIZE,
    contents,
    encode_tiny,
    same_contents,
    tiny_checkpoint,
    tiny_encoder,
    write_pictures,
)
from ray.cluster_utils import Cluster

from cosmos3_fast.bulk import Summary, encode
from cosmos3_fast.bulk.ray_engine import _plan

COUNT = 60


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes with a CPU each."""
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A source, a VAE, and what the engine without Ray makes of them."""
    folder = tmp_path_factory.mktemp("whole")
    paths = write_pictures(folder / "in", COUNT)
    shutil.copy(paths[3], folder / "in" / "copy.png")
    (folder / "in" / "broken.png").write_bytes(b"broken")
    vae = tiny_checkpoint(folder / "vae")
    encode_tiny(folder / "in", folder / "out", vae=vae)
    return folder / "in", vae, folder / "out"


def options(vae: Any, cluster: Cluster) -> dict[str, Any]:
    address = cluster.address
    return {"vae": vae, "size": SIZE, "ray": address, "shard_size": 8, "batch_size": 2}


def workers(cluster: Cluster) -> dict[int, str]:
    """The busy worker processes of this cluster, and what each does."""
    raylets = {node.all_processes["raylet"][0].process.pid for node in cluster.list_all_nodes()}
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            title = (path / "cmdline").read_bytes().split(b"\0")[0].decode()
            parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
        if parent in raylets and title.startswith("ray::") and "IDLE" not in title:
            found[int(path.name)] = title
    return found


class Undisturbed(AssertionError):
    """The run was over before it could be disturbed."""


def meanwhile(disturb: Callable[[], bool], run: Callable[[], Summary]) -> Summary:
    """The result of a run while `disturb` is called again and again, until it is True."""
    done = threading.Event()
    disturbed = []

    def watch() -> None:
        while not done.wait(0.02):
            if disturb():
                disturbed.append(True)
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        summary = run()
    finally:
        done.set()
        watcher.join()
    if not disturbed:
        raise Undisturbed
    return summary


@pytest.mark.parametrize(
    ("cpus", "cores", "wanted"),
    [
        ((1,), None, (1, 1, 0.5, 0.25)),
        ((2,), None, (1, 2, 1, 0.5)),
        ((16,), None, (1, 16, 15, 0.5)),
        ((16, 8), None, (3, 8, 7.5, 0.25)),
        ((2, 2), None, (2, 2, 1.5, 0.25)),
        ((16,), 4, (4, 4, 3.5, 0.25)),
    ],
)
def test_room_for_reading_and_writing(
    monkeypatch: pytest.MonkeyPatch,
    cpus: tuple[int, ...],
    cores: int | None,
    wanted: tuple[int, int, float, float],
):
    """Encoders, threads, and what Ray counts: a whole CPU is free beside a single encoder, for
    which it keeps an idle process; no node has room for more encoders than are meant for it."""
    nodes = [{"Alive": True, "Resources": {"CPU": float(count)}} for count in cpus]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    assert _plan(False, cores) == wanted


def test_the_result_is_that_of_one_process(
    cluster: Cluster, whole: tuple[Path, Path, Path], tmp_path: Path
):
    source, vae, wanted = whole
    out = tmp_path / "out"
    summary = encode(source, out, **options(vae, cluster))
    assert (summary.samples, summary.repeated, summary.total) == (COUNT, 1, COUNT)
    assert same_contents(out, wanted)
    (error,) = pq.read_table(out / "errors.parquet").to_pylist()
    assert error["source"] == str(source / "broken.png")
    assert error["reason"] == summary.failures[0].reason
    # Run again, with another name and another picture.
    more = tmp_path / "more"
    write_pictures(more, 1, first=COUNT)
    shutil.copy(next(source.glob("*/0005.png")), more / "other.png")
    summary = encode([source, more], out, **options(vae, cluster))
    assert (summary.samples, summary.known, len(summary.failures)) == (1, COUNT + 2, 1)
    held = [names for names, _ in contents(out).values()]
    assert sorted([str(more / "other.png"), str(source / "part0" / "0005.png")]) in held


def test_buckets_and_an_encoder(cluster: Cluster, whole: tuple[Path, Path, Path], tmp_path: Path):
    source = whole[0]
    sizes: dict[str, Any] = {"size": None, "buckets": (400,), "vae": tiny_encoder()}
    encode(source, tmp_path / "out", **{**options(None, cluster), **sizes})
    encode(source, tmp_path / "wanted", workers=0, **sizes)
    assert same_contents(tmp_path / "out", tmp_path / "wanted")


@pytest.mark.parametrize("victim", ["Encode", "ReadPictureSource"])
def test_a_killed_worker_is_replaced(
    cluster: Cluster, whole: tuple[Path, Path, Path], tmp_path: Path, victim: str
):
    source, vae, wanted = whole
    # On a quick machine an encoder is done in less than a second: then sooner, in another run.
    delays = [random.random(), random.random() / 5, 0.0] if victim == "Encode" else [0.0]

    def kill() -> bool:
        for process, title in workers(cluster).items():
            if victim in title:
                time.sleep(delays[0])
                try:
                    os.kill(process, signal.SIGKILL)
                except ProcessLookupError:
                    return False
                return True
        return False

    while True:
        out = tmp_path / str(len(delays))
        try:
            summary = meanwhile(kill, lambda: encode(source, out, **options(vae, cluster)))  # noqa: B023
            break
        except Undisturbed:
            if not delays[1:]:
                raise
            del delays[0]
    assert (summary.samples, len(summary.failures)) == (COUNT, 1)
    assert same_contents(out, wanted)


def test_a_lost_node_is_made_up_for(
    cluster: Cluster, whole: tuple[Path, Path, Path], tmp_path: Path
):
    source, vae, wanted = whole
    node = cluster.worker_nodes and next(iter(cluster.worker_nodes))

    def remove() -> bool:
        if not any("Encode" in title for title in workers(cluster).values()):
            return False
        cluster.remove_node(node, allow_graceful=False)
        return True

    try:
        run = lambda: encode(source, tmp_path / "out", **options(vae, cluster))  # noqa: E731
        assert meanwhile(remove, run).total == COUNT
        assert same_contents(tmp_path / "out", wanted)
    finally:
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()


@pytest.mark.parametrize("shards", [0, 2])
def test_a_killed_driver_goes_on(
    cluster: Cluster, whole: tuple[Path, Path, Path], tmp_path: Path, shards: int
):
    source, vae, wanted = whole
    out = tmp_path / "out"
    # Paths from the driver's folder, which is not that of Ray's workers.
    paths = [os.path.relpath(path, source.parent) for path in (source, out, vae)]
    command = [
        *(sys.executable, "-m", "cosmos3_fast", "encode", paths[0], "--out", paths[1]),
        *("--vae", paths[2], "--size", "16x24", "--ray", str(cluster.address)),
        *("--shard-size", "8", "--batch-size", "2"),
    ]
    run = subprocess.Popen(
        command, cwd=source.parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while run.poll() is None and len(list(out.glob("manifest/*.parquet"))) < shards:
        time.sleep(0.01)
    time.sleep(2 * random.random())
    run.kill()
    run.wait()
    if (out / "dataset.json").exists():
        assert contents(out).keys() <= contents(wanted).keys()
    assert shards == 0 or len(contents(out)) >= 8
    assert encode(source, out, **options(vae, cluster)).total == COUNT
    assert same_contents(out, wanted)


def test_what_is_left_out_and_what_cannot_be_read(
    cluster: Cluster, whole: tuple[Path, Path, Path], tmp_path: Path
):
    _, vae, _ = whole
    write_pictures(tmp_path / "in", 3)
    (tmp_path / "in" / "caption.txt").write_text("a rocket")
    os.mkfifo(tmp_path / "in" / "fifo.png")
    with tarfile.open(tmp_path / "in" / "more.tar", "w") as tar:
        tar.add(tmp_path / "in" / "part0" / "0001.png", "again.png")
        tar.add(tmp_path / "in" / "caption.txt", "again.txt")
    summary = encode(tmp_path / "in", tmp_path / "out", **options(vae, cluster))
    assert (summary.samples, summary.repeated, summary.left_out) == (3, 1, {".txt": 2})
    (failure,) = summary.failures
    assert "no regular file" in failure.reason
