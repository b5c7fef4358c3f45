"""Resident and peak memory of one encode, each side in a process of its own.

`python -m benchmarks.suites.memory vae|ours DTYPE SIZE` prints JSON, in MiB: what the process holds
beyond its imports with the weights loaded (`resident`), and at its peak during the first encode
(`peak`, which includes the weights, activations, workspaces and what is prepared from the weights
at first use). The VAE is measured without its decoder, in its favour.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.formatting import size as sized
from benchmarks.formatting import table
from benchmarks.harness import ROOT, Call, say
from benchmarks.paths import DTYPES, TINY_DIM, sides, vae_config
from benchmarks.suites import Figures, Suite
from cosmos3_fast.vae import FrameEncoder, synthetic
from cosmos3_fast.vae.topology import EncoderTopology


def status_mib(field: str) -> float:
    """A field of this process's status, such as VmRSS."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def of_first_call(load: Callable[[], Call]) -> dict[str, float]:
    """`resident` after `load()`, and the `peak` of the call that it returns, beyond what was."""
    before = status_mib("VmRSS")
    call = load()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    resident = status_mib("VmRSS") - before
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    call()
    return {"resident": resident, "peak": status_mib("VmHWM") - before}


@torch.no_grad()
def measure_side(which: str, dtype: str, size: str, base_dim: int | None) -> dict[str, float]:
    config = synthetic.synthetic_config(vae_config(base_dim), 0)
    pixels = (torch.rand(1, 3, *sides(size)) * 2 - 1).to(DTYPES[dtype])

    def load_vae() -> Call:
        vae = torch.nn.Module.to(synthetic.synthetic_vae(config, 0), DTYPES[dtype])
        del vae.decoder
        return lambda: vae.encode(pixels[:, :, None])

    def load_ours() -> Call:
        state = synthetic.synthetic_state_dict(config, 0)
        encoder = FrameEncoder.from_state_dict(state, config, DTYPES[dtype])
        return lambda: encoder(pixels)

    if which == "ours":
        return of_first_call(load_ours)
    import diffusers  # noqa: F401 - its import is not the encode's memory

    return of_first_call(load_vae)


def memory(size: str, base_dim: int | None = None) -> Figures:
    """Both in both dtypes, each in a fresh process, and the bytes of the parameters in bfloat16."""
    topology = EncoderTopology.from_config(synthetic.synthetic_config(vae_config(base_dim)))
    folded = FrameEncoder(topology, torch.bfloat16, device="meta")
    result: dict[str, Any] = {
        "size": size,
        "bfloat16_parameters_bytes": sum(p.numel() * p.element_size() for p in folded.parameters()),
    }
    name = "benchmarks.suites.memory"
    return result | {dtype: both_sides(name, dtype, size, base_dim) for dtype in DTYPES}


def both_sides(module: str, dtype: str, size: str, base_dim: int | None) -> Figures:
    """What `module` prints as a program for each side, and the ratio of the peaks."""
    say(f"{module.rpartition('.')[2]} {dtype} ...")
    both = {}
    for which in ("vae", "ours"):
        command = [sys.executable, "-m", module, which, dtype, size, str(base_dim or "")]
        both[which] = json.loads(subprocess.check_output(command, cwd=ROOT, text=True))
    return {**both, "peak_ratio": both["ours"]["peak"] / both["vae"]["peak"]}


def side_lines(call: str, vae: str, figures: Figures) -> list[str]:
    """A table of both sides in each dtype that was measured."""
    rows = []
    for dtype in DTYPES:
        for name, key in ((vae, "vae"), ("ours", "ours")) if dtype in figures else ():
            resident, peak = figures[dtype][key]["resident"], figures[dtype][key]["peak"]
            shown = (resident, peak - resident, peak)
            rows.append((f"{name}, {dtype}", *(f"{value:.0f} MiB" for value in shown)))
    header = (f"{call} at {sized(figures['size'])}", "weights", "the call adds", "peak")
    return table(header, rows)


def lines(figures: Figures) -> list[str]:
    megabytes = figures["bfloat16_parameters_bytes"] / 1e6
    return [
        *side_lines("first encode", "3-D VAE without its decoder", figures),
        "",
        f"Parameters in bfloat16: {megabytes:.1f} MB.",
    ]


SUITE = Suite(
    memory,
    {
        "tiny": {"size": "32x48", "base_dim": TINY_DIM},
        "short": {"size": "480x832"},
        "full": {"size": "480x832"},
    },
    order=50,
    lines=lines,
)

if __name__ == "__main__":
    side, of_dtype, at_size, dim = sys.argv[1:]
    print(json.dumps(measure_side(side, of_dtype, at_size, int(dim) if dim else None)))
