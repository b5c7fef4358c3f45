"""diffusers' Cosmos3 latent preparation and decode before and after: the real pipeline, on a CPU.

The VAE has Cosmos3's topology and full width with seeded random weights; the transformer, which
takes no part, is tiny. Needs the environment of `make test-diffusers`.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import tiny_pipeline
import torch
from torch import Tensor

from benchmarks.cases import vae_config
from benchmarks.engines.compare import (
    UNPATCHED,
    Row,
    arguments,
    compare,
    compare_decodes,
    report,
)
from benchmarks.harness import GateError, gate_equal, gate_error
from cosmos3_fast.acceleration import accelerate
from cosmos3_fast.vae.synthetic import synthetic_vae


def main() -> int:
    args = arguments(__doc__)
    vae = synthetic_vae(vae_config(args.base_dim), seed=0)
    # A VAE of its own for each mode, since the mode is the VAE's.
    pipelines = {
        mode: tiny_pipeline.make_pipe(vae=copy.deepcopy(vae))
        for mode in (UNPATCHED, "exact", "fast")
    }
    accelerate(pipelines["exact"], "exact")
    accelerate(pipelines["fast"], "fast")
    generator = torch.Generator().manual_seed(0)
    clip = torch.rand(args.num_frames, 3, args.height, args.width, generator=generator)
    size = {"height": args.height, "width": args.width, "num_frames": args.num_frames}
    requests: dict[str, dict[str, Any]] = {
        "T2V": {},
        "I2V": {"image": clip[0]},
        "V2V": {"video": clip},
    }

    rows: list[Row] = []
    vaes = {mode: pipe.vae for mode, pipe in pipelines.items()}
    for kind, request in requests.items():
        # Text encodes nothing.
        modes = [UNPATCHED, "exact"] if kind == "T2V" else list(pipelines)

        def prepare(mode: str, request: dict[str, Any] = request) -> tuple[Any, ...]:
            with torch.no_grad():
                return pipelines[mode].prepare_latents(
                    **request, **size, generator=torch.Generator().manual_seed(0),
                    device="cpu", dtype=torch.float32,
                )  # fmt: skip

        paths = {mode: lambda mode=mode, prepare=prepare: prepare(mode) for mode in modes}
        rows += compare(kind, paths, vaes, gate, args.rounds)
    # With a decoder as wide as the configuration has it.
    whole = synthetic_vae(vae_config(args.base_dim), 0, None)
    vaes = {UNPATCHED: whole, "fast": copy.deepcopy(whole)}
    accelerate(vaes["fast"], "fast")
    rows += compare_decodes(vaes, args)
    report("diffusers", rows, args)
    return 0


def gate(name: str, mode: str, ours: tuple[Any, ...], reference: tuple[Any, ...]) -> None:
    """Equal in every output but for what the folded encoder made, which is within its bound."""
    for i, (mine, theirs) in enumerate(zip(ours, reference, strict=True)):
        if not isinstance(theirs, Tensor):
            if mine != theirs:
                raise GateError(f"{name}: output {i} differs")
        elif i == 0 and mode == "fast":
            given = 2 if name.startswith("V2V") else 1
            gate_error(f"{name}: latents given", mine[:, :, :given], theirs[:, :, :given])
            gate_equal(f"{name}: other latents", mine[:, :, given:], theirs[:, :, given:])
        else:
            gate_equal(f"{name}: output {i}", mine, theirs)


if __name__ == "__main__":
    sys.exit(main())
