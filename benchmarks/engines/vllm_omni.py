"""vLLM-Omni's Cosmos3 latent preparation and decode before and after: its own code, on a CPU.

The VAE has Cosmos3's topology and full width with seeded random weights. vLLM-Omni encodes no
more frames than it needs by itself, so that exact mode is the unpatched engine. Needs the
environment of `make test-vllm-omni`.
"""

from __future__ import annotations

import copy
import sys

import omni_pipeline
import torch
from torch import Tensor

from benchmarks.cases import vae_config
from benchmarks.engines.compare import (
    UNPATCHED,
    arguments,
    compare,
    compare_decodes,
    report,
)
from benchmarks.harness import gate_equal, gate_error


def main() -> int:
    args = arguments(__doc__)
    vae = omni_pipeline.make_vae(config=vae_config(args.base_dim))
    pipelines = {
        UNPATCHED: omni_pipeline.make_pipeline(omni_pipeline.EnginePipeline, vae),
        "fast": omni_pipeline.make_fast(copy.deepcopy(vae)),
    }
    image = omni_pipeline.clip(1, 0, args.height, args.width)[:, :, 0]

    def prepare(mode: str) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(42)
        size = args.height, args.width, args.num_frames
        with torch.inference_mode():
            return pipelines[mode]._prepare_latents_i2v(image, *size, generator)

    paths = {mode: lambda mode=mode: prepare(mode) for mode in pipelines}
    vaes = {mode: pipeline.vae for mode, pipeline in pipelines.items()}
    rows = compare("I2V", paths, vaes, gate, args.rounds)
    whole = omni_pipeline.make_vae(config=vae_config(args.base_dim), decoder_base_dim=None)
    vaes = {UNPATCHED: whole, "fast,clips": copy.deepcopy(whole)}
    omni_pipeline.make_fast(vaes["fast,clips"], clips=True)
    rows += compare_decodes(vaes, args)
    report("vllm-omni", rows, args)
    return 0


def gate(name: str, mode: str, ours: tuple[Tensor, ...], reference: tuple[Tensor, ...]) -> None:
    """Equal but for what the folded encoder made, which is within its bound."""
    (latents, mask, condition), (wanted, wanted_mask, wanted_condition) = ours, reference
    gate_error(f"{name}: condition", condition, wanted_condition)
    gate_error(f"{name}: latent frame 0", latents[:, :, :1], wanted[:, :, :1])
    gate_equal(f"{name}: other latents", latents[:, :, 1:], wanted[:, :, 1:])
    gate_equal(f"{name}: mask", mask, wanted_mask)


if __name__ == "__main__":
    sys.exit(main())
