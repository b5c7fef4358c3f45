"""One latent frame to pixels: the 3-D VAE, the plain last-tap fold of others, and `FrameDecoder`.

`decoder` is a suite as those of `suites`. As a script, `python benchmarks/decoder.py` runs it at
256x448 with the memory of each side and prints both as JSON; `python benchmarks/decoder.py
vae|ours DTYPE` prints the memory of one side alone, in MiB beyond the process's imports: with the
weights loaded (`resident`), and at the peak of the first decode (`peak`: weights, activations,
workspaces and what is prepared from the weights at first use). The VAE is measured without its
encoder, in its favour.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from harness import gate_error, gate_rounding
from memory import _status
from suites import DTYPES, FP32_BOUND, OURS, SEED, Row, sides, timed_rows
from torch import Tensor

from cosmos3_fast import FrameDecoder
from cosmos3_fast.vae import layers, synthetic
from cosmos3_fast.vae.exact import decode_sample

SIZE, ROUNDS = "256x448", 3
VAE, PLAIN = "vae.decode of 1 frame", "last taps, plain"
# The plain fold is not held to the VAE's own rounding, only to computing the same.
PLAIN_BOUND = {"float32": FP32_BOUND, "bfloat16": 0.1}


def _plain_norm(x: Tensor, weight: Tensor | None, silu: bool = True) -> Tensor:
    y = F.normalize(x, dim=1)
    if weight is not None:
        y = y * x.shape[1] ** 0.5 * weight.view(-1, 1, 1)
    return F.silu(y) if silu else y


def _plain_upsample(
    self: layers.Upsample, x: Tensor, shortcut: Tensor | None = None, factor_t: int = 1
) -> Tensor:
    y = F.conv2d(F.interpolate(x, scale_factor=2.0), self.weight, self.bias, padding=1)
    if shortcut is None:
        return y
    phases = [layers.duplicated_phase(shortcut, y.shape[1], factor_t, i) for i in range(4)]
    return y + F.pixel_shuffle(torch.stack(phases, 2).flatten(1, 2), 2)


@contextmanager
def plain() -> Iterator[None]:
    """Inside, a `FrameDecoder` is what others make of single frames: the last temporal taps only.

    The 3x3 convolutions follow the up-sampling, and norms and convolutions are torch's.
    """
    before = layers.rms_norm_silu, layers.takes_winograd, layers.Upsample.forward
    layers.rms_norm_silu = _plain_norm
    layers.takes_winograd = lambda *_: False
    layers.Upsample.forward = _plain_upsample  # type: ignore[method-assign]
    try:
        yield
    finally:
        layers.rms_norm_silu, layers.takes_winograd = before[:2]
        layers.Upsample.forward = before[2]  # type: ignore[method-assign]


def latent_frame(config: Any, size: str, dtype: torch.dtype) -> Tensor:
    """Seeded noise [1, z, 1, h, w] on the VAE's own scale."""
    height, width = (side // 16 for side in sides(size))
    generator = torch.Generator().manual_seed(SEED)
    return torch.randn(1, config["z_dim"], 1, height, width, generator=generator).to(dtype)


@torch.inference_mode()
def decoder(
    size: str = SIZE, rounds: int = ROUNDS, config: Any = synthetic.COSMOS3_VAE_CONFIG
) -> Iterator[Row]:
    """Rows of `suites.timed_rows`, per dtype, after a gate."""
    for dtype, torch_dtype in DTYPES.items():
        vae = synthetic.synthetic_vae(config, 0, decoder_base_dim=None)
        vae = torch.nn.Module.to(vae, torch_dtype)
        ours = FrameDecoder.from_vae(vae)
        latents = latent_frame(vae.config, size, torch_dtype)

        def plainly(decode: FrameDecoder = ours, z: Tensor = latents) -> Tensor:
            with plain():
                return decode.decode_unnormalized(z)

        paths: dict[str, Callable[[], Tensor]] = {
            VAE: lambda v=vae, z=latents: decode_sample(v, z),
            PLAIN: plainly,
            OURS: lambda d=ours, z=latents: d.decode_unnormalized(z),
        }
        name = f"decoder {size} {dtype}"
        print(f"{name}: correctness gate ...", file=sys.stderr, flush=True)
        wanted = paths[VAE]()
        errors = {PLAIN: gate_error(f"{name}, {PLAIN}", plainly(), wanted, PLAIN_BOUND[dtype])}
        if torch_dtype == torch.float32:
            errors[OURS] = gate_error(f"{name}, {OURS}", paths[OURS](), wanted, FP32_BOUND)
        else:
            # The error of float32 is four orders below that of bfloat16.
            exact = decode_sample(copy.deepcopy(vae).float(), latents.float())
            errors[OURS], errors[VAE] = gate_rounding(name, paths[OURS](), wanted, exact)
            del errors[PLAIN]
        del wanted
        yield from timed_rows("decoder", size, dtype, paths, VAE, rounds=rounds, errors=errors)


@torch.inference_mode()
def measure_memory(which: str, dtype: torch.dtype) -> dict[str, float]:
    """`resident` and `peak` of one side, in MiB; see the module."""
    config = synthetic.synthetic_config(synthetic.COSMOS3_VAE_CONFIG, 0)
    latents = latent_frame(config, SIZE, dtype)
    decode: Callable[[], Any]
    if which == "vae":
        import diffusers  # noqa: F401 - its import is not the decode's memory

        before = _status("VmRSS")
        vae = synthetic.synthetic_vae(config, 0, decoder_base_dim=None)
        vae = torch.nn.Module.to(vae, dtype)
        del vae.encoder

        def decode() -> Any:
            return vae.decode(latents)
    else:
        before = _status("VmRSS")
        tensors = synthetic.synthetic_decoder_state_dict(config, 0)
        ours = FrameDecoder.from_state_dict(tensors, config, dtype)
        del tensors

        def decode() -> Any:
            return ours.decode_unnormalized(latents)

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    resident = _status("VmRSS") - before
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    decode()
    return {"resident": resident, "peak": _status("VmHWM") - before}


def memory() -> dict[str, Any]:
    """Both sides in both dtypes, each in a fresh process."""
    result: dict[str, Any] = {"size": SIZE}
    for dtype in DTYPES:
        print(f"decoder memory {dtype} ...", file=sys.stderr, flush=True)
        command = [sys.executable, __file__]
        both = {
            which: json.loads(subprocess.check_output([*command, which, dtype], text=True))
            for which in ("vae", "ours")
        }
        result[dtype] = {**both, "peak_ratio": both["ours"]["peak"] / both["vae"]["peak"]}
    return result


if __name__ == "__main__":
    if sys.argv[1:]:
        print(json.dumps(measure_memory(sys.argv[1], DTYPES[sys.argv[2]])))
    else:
        print(json.dumps({"rows": list(decoder()), "memory": memory()}, indent=1))
