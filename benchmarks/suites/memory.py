"""Resident and peak memory of one encode at 480x832, in a process of its own.

python benchmarks/memory.py vae|ours DTYPE prints JSON, in MiB: what the process holds beyond its
imports with the weights loaded (`resident`), and at its peak during the first encode (`peak`, which
includes the weights, activations, workspaces and what is prepared from the weights at first use).
The VAE is measured without its decoder, in its favour.
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

from cosmos3_fast.vae import FrameEncoder, synthetic

HEIGHT, WIDTH = 480, 832
DTYPES = ("float32", "bfloat16")


def _status(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


@torch.no_grad()
def measure(which: str, dtype: torch.dtype) -> dict[str, float]:
    config = synthetic.synthetic_config(synthetic.COSMOS3_VAE_CONFIG, 0)
    pixels = (torch.rand(1, 3, HEIGHT, WIDTH) * 2 - 1).to(dtype)
    encode: Callable[[], Any]
    if which == "vae":
        import diffusers  # noqa: F401 - its import is not the encode's memory

        before = _status("VmRSS")
        vae = torch.nn.Module.to(synthetic.synthetic_vae(config, 0), dtype)
        del vae.decoder

        def encode() -> Any:
            return vae.encode(pixels[:, :, None])
    else:
        before = _status("VmRSS")
        encoder = FrameEncoder.from_state_dict(
            synthetic.synthetic_state_dict(config, 0), config, dtype
        )

        def encode() -> Any:
            return encoder(pixels)

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    resident = _status("VmRSS") - before
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    encode()
    return {"resident": resident, "peak": _status("VmHWM") - before}


def compare() -> dict[str, Any]:
    """Both in both dtypes, each in a fresh process, and the bytes of the parameters in bfloat16."""
    config = synthetic.synthetic_config(synthetic.COSMOS3_VAE_CONFIG, 0)
    topology = synthetic.EncoderTopology.from_config(config)
    folded = FrameEncoder(topology, torch.bfloat16, device="meta")
    result: dict[str, Any] = {
        "size": f"{HEIGHT}x{WIDTH}",
        "bfloat16_parameters_bytes": sum(p.numel() * p.element_size() for p in folded.parameters()),
    }
    for dtype in DTYPES:
        print(f"memory {dtype} ...", file=sys.stderr, flush=True)
        both: dict[str, Any] = {
            which: json.loads(
                subprocess.run(
                    [sys.executable, __file__, which, dtype],
                    stdout=subprocess.PIPE,
                    text=True,
                    check=True,
                ).stdout
            )
            for which in ("vae", "ours")
        }
        result[dtype] = {**both, "peak_ratio": both["ours"]["peak"] / both["vae"]["peak"]}
    return result


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], getattr(torch, sys.argv[2]))))
