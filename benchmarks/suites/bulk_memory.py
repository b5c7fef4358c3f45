"""Whether the memory of a run grows with its pictures: its peak for few and for many.

`python -m benchmarks.suites.bulk_memory COUNT` prints JSON, in MiB, of small pictures, a tiny VAE
and this process, in which the encoder runs. Each count has a process of its own.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
import tempfile
from importlib import util
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.formatting import table
from benchmarks.harness import ROOT, say
from benchmarks.paths import TINY_DIM, vae_config
from benchmarks.suites import Figures, Suite
from benchmarks.suites.bulk import NEEDED
from benchmarks.suites.memory import status_mib
from cosmos3_fast import FrameEncoder
from cosmos3_fast.bulk import encode
from cosmos3_fast.vae import synthetic


def write_pictures(path: Path, count: int) -> None:
    """A tar of seeded PNG pictures."""
    generator = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            buffer = io.BytesIO()
            values = generator.integers(0, 256, (40, 60, 3), dtype=np.uint8)
            Image.fromarray(values).save(buffer, "PNG")
            info = tarfile.TarInfo(f"{i:06}.png")
            info.size = buffer.tell()
            buffer.seek(0)
            tar.addfile(info, buffer)


def measure_count(count: int) -> dict[str, float]:
    torch.set_num_threads(1)
    config = synthetic.synthetic_config(vae_config(TINY_DIM), 0)
    tensors = synthetic.synthetic_state_dict(config, 0)
    encoder = FrameEncoder.from_state_dict(tensors, config, torch.float32)
    with tempfile.TemporaryDirectory() as name:
        write_pictures(Path(name) / "in.tar", count)
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of making them
        summary = encode(f"{name}/in.tar", f"{name}/out", vae=encoder, size=(32, 48))
        return {"samples": summary.total, "peak": status_mib("VmHWM")}


def bulk_memory(few: int, many: int) -> Figures:
    """Both counts, and the ratio of their peaks."""
    if missing := [name for name in NEEDED if util.find_spec(name) is None]:
        return {"skipped": f"{', '.join(missing)} not installed"}
    figures: Figures = {}
    for name, count in (("few", few), ("many", many)):
        say(f"bulk_memory {count} ...")
        command = [sys.executable, "-m", "benchmarks.suites.bulk_memory", str(count)]
        figures[name] = json.loads(subprocess.check_output(command, cwd=ROOT, text=True))
    return {**figures, "ratio": figures["many"]["peak"] / figures["few"]["peak"]}


def lines(figures: Figures) -> list[str]:
    if "skipped" in figures:
        return [f"Skipped: {figures['skipped']}."]
    rows = [
        (f"{figures[name]['samples']}", f"{figures[name]['peak']:.0f} MiB")
        for name in ("few", "many")
    ]
    return table(("pictures", "peak of the process"), rows)


SUITE = Suite(
    bulk_memory,
    {
        "tiny": {"few": 20, "many": 60},
        "short": {"few": 1000, "many": 3000},
        "full": {"few": 2000, "many": 10000},
    },
    order=56,
    lines=lines,
)

if __name__ == "__main__":
    print(json.dumps(measure_count(int(sys.argv[1]))))
