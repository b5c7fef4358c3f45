"""Resident and peak memory of one fp32 encode at 480x832, in a process of its own.

python benchmarks/memory.py vae|ours prints JSON, in MiB: what the process holds beyond its imports
with the weights loaded, and at its peak during the encode. The VAE is measured without its decoder,
in its favour.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from cosmos3_fast.vae import ConditioningEncoder, synthetic


def _status(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


@torch.no_grad()
def measure(which: str) -> dict[str, float]:
    config = synthetic.synthetic_config(synthetic.COSMOS3_VAE_CONFIG, 0)
    pixels = torch.rand(1, 3, 480, 832) * 2 - 1
    if which == "vae":
        import diffusers  # noqa: F401 - its import is not the encode's memory

        before = _status("VmRSS")
        vae = synthetic.synthetic_vae(config, 0)
        del vae.decoder
        encode: Any = lambda: vae.encode(pixels[:, :, None])  # noqa: E731
    else:
        before = _status("VmRSS")
        encoder = ConditioningEncoder.from_state_dict(
            synthetic.synthetic_state_dict(config, 0), config, torch.float32
        )
        encode = lambda: encoder(pixels)  # noqa: E731
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    resident = _status("VmRSS") - before
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    encode()
    return {"resident": resident, "peak": _status("VmHWM") - before}


def compare() -> dict[str, Any]:
    """Both, each in a fresh process, and the bytes of the folded parameters in bfloat16."""
    config = synthetic.synthetic_config(synthetic.COSMOS3_VAE_CONFIG, 0)
    topology = synthetic.EncoderTopology.from_config(config)
    folded = ConditioningEncoder(topology, torch.bfloat16, device="meta")
    result: dict[str, Any] = {
        "bfloat16_parameters_bytes": sum(p.numel() * p.element_size() for p in folded.parameters())
    }
    for which in ("vae", "ours"):
        output = subprocess.run(
            [sys.executable, __file__, which], capture_output=True, text=True, check=True
        ).stdout
        result[which] = json.loads(output)
    result["peak_ratio"] = result["ours"]["peak"] / result["vae"]["peak"]
    return result


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
