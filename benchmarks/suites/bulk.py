"""Photographs to a folder of latents: against the encoder alone, and against the usual loop.

The encoder alone gets its pixels ready in memory and keeps its latents there; the usual loop is
`vae.encode` over a DataLoader. Ray is measured where it is installed (`make bench-bulk`), started
once before the clock runs; its encoder starts with every run, as it does for users.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.cases import OURS, PHOTOGRAPH, TINY_DIM, sides, vae_and_encoder
from benchmarks.harness import Row, Suite, gate_error, say, timed_rows
from benchmarks.suites.pixels import with_grain
from cosmos3_fast.bulk import LatentDataset, encode
from cosmos3_fast.images.load import load_frames, load_pixels
from cosmos3_fast.vae.live.exact import encode_exact

BARE, ON_RAY = "the encoder alone", "ours, on Ray"
LOOP = "vae.encode over a DataLoader"
BATCH_SIZE = 8
MEASURED = "256x448, 64 photographs"
"""The case whose goals are judged."""
NEEDED = ("pyarrow", "tqdm", "fsspec")


def write_photographs(folder: Path, count: int) -> list[Path]:
    """JPEG files of 1 to 2 megapixels: seeded crops of the example, enlarged, with grain."""
    generator = np.random.default_rng(0)
    with Image.open(PHOTOGRAPH) as photograph:
        whole = photograph.convert("RGB")
    paths = []
    for i in range(count):
        share = generator.uniform(0.5, 1.0)
        width, height = int(whole.width * share), int(whole.height * share)
        left = int(generator.integers(0, whole.width - width + 1))
        top = int(generator.integers(0, whole.height - height + 1))
        scale = (generator.uniform(1e6, 2e6) / (width * height)) ** 0.5
        size = (round(width * scale), round(height * scale))
        large = whole.crop((left, top, left + width, top + height)).resize(size)
        paths.append(folder / f"{i:04}.jpg")
        with_grain(large).save(paths[-1], quality=90)
    return paths


class Pictures(Dataset[Tensor]):
    """What users write: a file and its pixels, [3, H, W] in [-1, 1]."""

    def __init__(self, paths: list[Path], height: int, width: int) -> None:
        self._paths, self._size = paths, (height, width)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Tensor:
        return load_pixels(self._paths[index], *self._size)[0]


@torch.no_grad()
def bulk(
    size: str, photographs: int, rounds: int, loop_photographs: int, base_dim: int | None = None
) -> Iterator[Row]:
    """`loop_photographs` are those of the usual loop, a long one, which runs once."""
    if missing := [name for name in NEEDED if util.find_spec(name) is None]:
        say(f"bulk: skipped, {', '.join(missing)} not installed")
        return
    vae, encoder = vae_and_encoder("float32", base_dim)
    with tempfile.TemporaryDirectory() as name, ray_started() as on_ray:
        paths = write_photographs(Path(name), photographs)
        pixels = torch.cat([load_frames(path, *sides(size)) for path in paths])
        outs = (Path(name) / f"out{i}" for i in range(10**6))

        def bare() -> Tensor:
            return torch.cat([encoder(batch) for batch in pixels.split(BATCH_SIZE)])

        def ours(count: int = photographs, **engine: Any) -> Path:
            out = next(outs)
            options: dict[str, Any] = {"size": sides(size), "batch_size": BATCH_SIZE}
            encode(paths[:count], out, vae=encoder, dtype=torch.float32, **options, **engine)
            return out

        def usual(count: int = loop_photographs) -> Tensor:
            loader = DataLoader(Pictures(paths[:count], *sides(size)), BATCH_SIZE, num_workers=1)
            return torch.cat([encode_exact(vae, batch[:, :, None]) for batch in loader])

        case = f"{size}, {photographs} photographs"
        timed: dict[str, Callable[[], Any]] = {BARE: bare, OURS: ours}
        if on_ray:
            timed[ON_RAY] = lambda: ours(ray="local")
        say(f"bulk {case}: correctness gate ...")
        wanted = bare()
        errors = {
            path: gate_error(f"bulk {case}, {path}", of_folder(run()), wanted)
            for path, run in timed.items()
            if path != BARE
        }
        yield from timed_rows("bulk", case, "float32", timed, BARE, rounds=rounds, errors=errors)

        case = f"{size}, {loop_photographs} photographs"
        timed = {LOOP: usual, OURS: lambda: ours(loop_photographs)}
        few = min(BATCH_SIZE, loop_photographs)
        errors = {OURS: gate_error(f"bulk {case}", of_folder(ours(few)), usual(few))}
        yield from timed_rows("bulk", case, "float32", timed, LOOP, rounds=1, errors=errors)


def of_folder(folder: Path) -> Tensor:
    """The latents of a folder, [N, z, t, h, w]."""
    dataset = LatentDataset(folder)
    return torch.stack([dataset[i]["latents"] for i in range(len(dataset))])


@contextlib.contextmanager
def ray_started() -> Iterator[bool]:
    """Ray on this machine, where it is installed."""
    if util.find_spec("ray") is None:
        yield False
        return
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    try:
        yield True
    finally:
        ray.shutdown()


SUITE = Suite(
    bulk,
    {
        "tiny": {
            **{"size": "32x48", "photographs": 4, "rounds": 1, "loop_photographs": 2},
            "base_dim": TINY_DIM,
        },
        "short": {"size": "256x448", "photographs": 16, "rounds": 2, "loop_photographs": 8},
        "full": {"size": "256x448", "photographs": 64, "rounds": 3, "loop_photographs": 64},
    },
)
