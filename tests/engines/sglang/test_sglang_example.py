"""`examples/sglang_stage.py` against the real stage."""

from __future__ import annotations

from typing import Any

import pytest
import sglang_stage as example
import torch
from sglang_engine import make_batch, make_stage, make_vae, run

INDEXES = "condition_frame_indexes"


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "request_",
    [
        {"image": torch.Size([1, 3, 32, 48])},
        {"image": torch.Size([3, 3, 32, 48])},
        {"video": torch.Size([1, 3, 17, 32, 48])},
        {"video": torch.Size([1, 3, 3, 32, 48]), "condition_frame_indexes": [1, 3]},
        {"video": torch.Size([1, 3, 17, 32, 48]), "condition_frame_indexes": [0, 2, 4]},
    ],
)
def test_is_the_stages_conditioning(request_: dict[str, Any], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    case = {
        name: torch.rand(value, generator=generator) * 2 - 1 if name != INDEXES else value
        for name, value in request_.items()
    }
    stage = make_stage(make_vae(base_dim=8, seed=seed))
    encoded: list[torch.Tensor] = []
    encode = stage._vae_encode
    stage._vae_encode = lambda video: encoded.append(encode(video)) or encoded[-1]
    wanted = run(stage, make_batch(**case, seed=seed))
    noise = torch.randn(
        wanted.latents.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.bfloat16
    )
    indexes = case.get(INDEXES, [0, 1] if "video" in case else [0])
    latents, velocity_mask, condition_latents = example.condition(
        encoded[0].bfloat16(), noise, indexes
    )
    # Equal but for the sign of zeros, which `torch.equal` does not see.
    assert torch.equal(latents, wanted.latents)
    assert torch.equal(velocity_mask, wanted.extra["velocity_mask"])
    assert torch.equal(condition_latents, wanted.extra["condition_latents"])
    assert velocity_mask.shape == wanted.extra["velocity_mask"].shape
