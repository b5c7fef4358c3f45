"""What calls cost the host: an eager encode and decode, counted; the seam of a live VAE, measured.

    python -m benchmarks.host

Counted are instructions of Python's bytecode and calls of functions written in Python, of networks
with all of Cosmos3's layers, narrow, on one latent cell: all that is left is the host. They run on
the CPU, but along the path that a GPU takes. Instructions are those of this Python's version.

Measured is `vae.encode` and `vae.decode` of an accelerated VAE whose folded networks return a
tensor that is there: what the seam adds to a network's call. The VAE's own result, made around that
tensor in any case, is given apart.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.harness import Timing, machine
from benchmarks.report import table
from cosmos3_fast import accelerate
from cosmos3_fast.vae import FrameDecoder, FrameEncoder
from cosmos3_fast.vae.live.patch import ATTRIBUTE
from cosmos3_fast.vae.networks import causal, layers
from cosmos3_fast.vae.synthetic import (
    COSMOS3_VAE_CONFIG,
    synthetic_config,
    synthetic_decoder_state_dict,
    synthetic_state_dict,
    synthetic_vae,
)

NARROW = {"base_dim": 4, "decoder_base_dim": 4}


def python_calls(run: Callable[[], object]) -> int:
    """How many functions written in Python run, `run` among them."""
    count = 0

    def note(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event == "call"

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(before)
    return count


def instructions(run: Callable[[], object]) -> int:
    """How many instructions of Python's bytecode run."""
    count = 0

    def note(frame: Any, event: str, arg: Any) -> Any:
        nonlocal count
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        count += event == "opcode"
        return note

    before = sys.gettrace()
    sys.settrace(note)
    try:
        run()
    finally:
        sys.settrace(before)
    return count


def _defers(x: Tensor) -> bool:
    return True


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Inside, networks on a CPU take the path of a GPU."""
    with (
        mock.patch.object(causal, "defers_bias", _defers),
        mock.patch.object(layers, "defers_bias", _defers),
    ):
        yield


def eager_calls() -> dict[str, Callable[[], Tensor]]:
    """An encode and a decode on next to nothing."""
    config = synthetic_config({**COSMOS3_VAE_CONFIG, **NARROW})
    dtype = torch.bfloat16
    encoder = FrameEncoder.from_state_dict(synthetic_state_dict(config), config, dtype)
    decoder = FrameDecoder.from_state_dict(synthetic_decoder_state_dict(config), config, dtype)
    factor = encoder.spatial_factor
    pixels = torch.zeros(1, 3, factor, factor, dtype=dtype)
    latents = torch.zeros(1, encoder.z_dim, 1, 1, dtype=dtype)
    return {"encode": lambda: encoder(pixels), "decode": lambda: decoder(latents)}


def seam_calls() -> dict[str, dict[str, Callable[[], object]]]:
    """A call of an accelerated VAE without its network, and the making of its result."""
    vae: Any = synthetic_vae({**COSMOS3_VAE_CONFIG, **NARROW}, 0).eval()
    accelerate(vae)
    factor = vae.config.scale_factor_spatial
    pixels = torch.zeros(1, 3, 1, factor, factor)
    latents = torch.zeros(1, vae.config.z_dim, 1, 1, 1)
    made: dict[str, dict[str, Callable[[], object]]] = {}
    state = vars(vae)[ATTRIBUTE]
    for name, part, x in (("encode", state.encoder, pixels), ("decode", state.decoder, latents)):
        call = getattr(vae, name)
        with torch.no_grad():
            call(x)  # which folds
            result = part._call(part._frame._snapshot.network, x)
        part._call = lambda network, x, result=result: result
        made[name] = {
            "seam": lambda call=call, x=x: call(x),
            "result": lambda part=part, result=result: part.returns.make(result, True),
        }
    return made


def microseconds(run: Callable[[], object], rounds: int = 500, calls: int = 10) -> Timing:
    """Of one call, by rounds of a few: a round that the system interrupts is one of many."""
    for _ in range(calls):
        run()
    rounds_of = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            run()
        rounds_of.append((time.perf_counter() - start) / calls * 1e6)
    return Timing(tuple(rounds_of))


def main() -> int:
    torch.set_num_threads(1)
    rows = []
    with torch.no_grad(), as_on_a_gpu():
        for name, run in eager_calls().items():
            run()
            rows.append([name, f"{instructions(run)}", f"{python_calls(run)}"])
    version = ".".join(map(str, sys.version_info[:2]))
    print("\n".join(table(["eager call", f"instructions of Python {version}", "calls"], rows)))
    rows = []
    for name, each in seam_calls().items():
        seam, result = microseconds(each["seam"]), microseconds(each["result"])
        times = [f"{seam.quantile(0.1):.0f}", f"{seam.median:.0f}", f"{result.median:.0f}"]
        rows.append([name, *times, f"{python_calls(each['seam'])}"])
    header = ["seam", "µs (10 %)", "µs (median)", "of these the result", "calls"]
    print("\n" + "\n".join(table(header, rows)))
    print(f"\n{machine()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
