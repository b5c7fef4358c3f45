"""SGLang's Cosmos3 latent preparation and decode before and after: the real stage, on a CPU.

The VAE has Cosmos3's topology and full width with seeded random weights. SGLang's conditioning
cache is off: it is active only inside the engine's executor, which is not run here. Needs the
environment of `make test-sglang`.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import sglang_engine
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
from benchmarks.harness import gate_equal, gate_error
from cosmos3_fast.vae.verify import FLOAT32_BOUND

# The stage rounds its latents to bfloat16: half an ulp each, and what float32 adds.
FAST_BOUND = 2**-8 + FLOAT32_BOUND

# Its own decode serves clips unless this is asked for.
CLIPS = "fast,clips"

Forward = Callable[..., Any]


def main() -> int:
    args = arguments(__doc__)
    vae = sglang_engine.make_vae(torch.float32, base_dim=args.base_dim or 160)
    # A VAE of its own for each mode, since the mode is the VAE's.
    stages = {
        mode: sglang_engine.make_stage(copy.deepcopy(vae)) for mode in (UNPATCHED, "exact", "fast")
    }
    generator = torch.Generator().manual_seed(0)
    clip = torch.rand(1, 3, args.num_frames, args.height, args.width, generator=generator) * 2 - 1
    size = {"height": args.height, "width": args.width, "num_frames": args.num_frames}
    requests = {"I2V": {"image": clip[:, :, 0]}, "V2V": {"video": clip}}
    forwards = {
        UNPATCHED: sglang_engine.Cosmos3LatentPreparationStage.forward,
        "exact": patched_forward("exact"),
        "fast": patched_forward("fast"),
    }

    rows: list[Row] = []
    of_stages = {mode: stage.vae for mode, stage in stages.items()}
    for kind, request in requests.items():
        # Clips are exact in fast mode too, unless they are asked for.
        modes = list(forwards) if kind == "I2V" else [UNPATCHED, "exact"]

        def prepare(mode: str, request: dict[str, Tensor] = request) -> Any:
            batch = sglang_engine.make_batch(**request, **size)
            with torch.inference_mode():
                return forwards[mode](stages[mode], batch, sglang_engine.SERVER_ARGS)

        for mode in modes:
            prepare(mode)  # the first request accelerates the VAE
        paths = {mode: lambda mode=mode, prepare=prepare: prepare(mode) for mode in modes}
        rows += compare(kind, paths, of_stages, gate, args.rounds)
    widths = vae_config(args.base_dim)
    whole = sglang_engine.make_vae(
        torch.float32, widths["base_dim"], decoder_base_dim=widths["decoder_base_dim"]
    )
    vaes = {UNPATCHED: whole, CLIPS: copy.deepcopy(whole)}
    with sglang_engine.patched(CLIPS):
        sglang_engine.make_stage(vaes[CLIPS])
        rows += compare_decodes(vaes, args)
    report("sglang", rows, args)
    return 0


def patched_forward(mode: str) -> Forward:
    """The stage's forward as SGLang's plugin registry leaves it in `mode`."""
    with sglang_engine.patched(mode):
        return sglang_engine.Cosmos3LatentPreparationStage.forward


def gate(name: str, mode: str, ours: Any, reference: Any) -> None:
    """Equal but for what the folded encoder made, which is within `FAST_BOUND`."""
    gate_equal(f"{name}: mask", ours.extra["velocity_mask"], reference.extra["velocity_mask"])
    for label, mine, theirs in (
        ("latents", ours.latents, reference.latents),
        ("condition", ours.extra["condition_latents"], reference.extra["condition_latents"]),
    ):
        if mode == "exact":
            gate_equal(f"{name}: {label}", mine, theirs)
        else:
            gate_error(f"{name}: {label}", mine[:, :, :1], theirs[:, :, :1], FAST_BOUND)
            gate_equal(f"{name}: other {label}", mine[:, :, 1:], theirs[:, :, 1:])


if __name__ == "__main__":
    sys.exit(main())
