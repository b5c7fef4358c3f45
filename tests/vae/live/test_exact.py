"""Where and in what dtype a VAE's own code takes its input, however its weights are stored."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cosmos3_fast import LatentPreparation, accelerate
from cosmos3_fast.vae.live.announce import wanted_frames
from cosmos3_fast.vae.live.exact import computes_in, encode_exact, normalize_latents
from cosmos3_fast.vae.live.seam import last_encoding
from cosmos3_fast.vae.synthetic import COSMOS3_VAE_CONFIG, synthetic_vae

diffusers = pytest.importorskip("diffusers")
CPU = torch.device("cpu")


def cast_float8(vae: Any) -> None:
    vae.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)


def cast_from_half(vae: Any) -> None:
    vae.enable_layerwise_casting(torch.bfloat16, torch.float32)


def offload_layers(vae: Any) -> None:
    pytest.importorskip("accelerate").cpu_offload(vae, CPU)


def offload_model(vae: Any) -> None:
    pytest.importorskip("accelerate").cpu_offload_with_hook(vae, CPU)


def offload_groups(vae: Any) -> None:
    vae.enable_group_offload(CPU, CPU, offload_type="leaf_level")


STORED = {
    cast_float8: torch.bfloat16,
    cast_from_half: torch.float32,
    offload_layers: torch.float32,
    offload_model: torch.float32,
    offload_groups: torch.float32,
}
BY_LAYER = [store for store in STORED if store is not offload_model]


def make_vae(store: Any) -> Any:
    config = {**COSMOS3_VAE_CONFIG, "base_dim": 8, "num_res_blocks": 1, "z_dim": 4}
    vae = synthetic_vae(config, 0, decoder_base_dim=4).requires_grad_(False).eval()
    store(vae.bfloat16() if STORED[store] == torch.bfloat16 else vae)
    return vae


def clip(store: Any, frames: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(1, 3, frames, 32, 48, generator=generator) * 2 - 1).to(STORED[store])


@pytest.mark.parametrize("mode", [None, "exact", "fast"])
@pytest.mark.parametrize("store", STORED)
def test_the_stage_encodes_as_the_vae_itself_does(store: Any, mode: str | None) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    vae = make_vae(store)
    if mode is not None:
        accelerate(vae, mode)
    stage = LatentPreparation(vae=vae)
    alone = stage(Image.fromarray(picture), 9, 32, 48, seed=0, dtype=torch.float32)
    both = stage(picture, 9, 32, 48, (0, 1), seed=0, dtype=torch.float32)
    repeated = torch.from_numpy(picture).permute(2, 0, 1)[None, :, None].expand(-1, -1, 5, -1, -1)
    plain = make_vae(store)
    for prepared, frames in ((alone, 1), (both, 5)):
        pixels = (2 * (repeated[:, :, :frames] / 255) - 1).to(STORED[store])
        wanted = normalize_latents(plain.encode(pixels).latent_dist.mode(), plain.config)
        if store is offload_model and mode == "fast":  # its weights are there: it is folded
            bound = 1e-5 * wanted.abs().max()
            assert (prepared.condition_latents - wanted).abs().max() <= bound
        else:
            assert torch.equal(prepared.condition_latents, wanted.float())


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("store", BY_LAYER)
def test_an_accelerated_vae_hands_over(
    store: Any, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    plain, x = make_vae(store), clip(store)
    wanted = plain.encode(x).latent_dist.parameters
    pixels = plain.decode(plain.encode(x).latent_dist.mode()).sample
    with caplog.at_level(logging.WARNING):
        vae = accelerate(make_vae(store), mode)
        for _ in range(2):
            out = vae.encode(x).latent_dist
            assert torch.equal(out.parameters, wanted)
            assert torch.equal(vae.decode(out.mode()).sample, pixels)
        for count, path in ((0, "none"), (1, "exact"), (2, "exact")):
            with wanted_frames(count):
                ours = vae.encode(x).latent_dist.parameters
            assert ours.dtype == wanted.dtype
            assert torch.equal(ours[:, :, :count], wanted[:, :, :count])
            assert last_encoding(vae).path == path
    told = [record.getMessage() for record in caplog.records if record.name.startswith("cosmos3")]
    own = [message for message in told if "own encode runs" in message]
    assert len(own) == (mode == "fast")
    assert len(told) == 2 * (mode == "fast")  # encode, decode


def test_where_an_offloaded_vae_computes() -> None:
    vae = make_vae(offload_layers)
    assert vae.encoder.conv_in.weight.is_meta
    assert computes_in(vae) == (CPU, torch.float32)
    vae._hf_hook = SimpleNamespace(execution_device="cuda:1")
    assert computes_in(vae, "decoder") == (torch.device("cuda:1"), torch.float32)


def test_weights_that_nothing_fetches() -> None:
    with torch.device("meta"):
        vae = diffusers.AutoencoderKLWan(base_dim=4, num_res_blocks=1)
    message = "vae must have weights with values, got some on the meta device"
    with pytest.raises(ValueError, match=message):
        encode_exact(vae, torch.zeros(1, 3, 1, 16, 16))
    with pytest.raises(ValueError, match=message):
        LatentPreparation(vae=vae)(np.zeros((16, 16, 3), np.uint8), 1, 16, 16, seed=0)


def test_an_encode_that_fails_is_told_where_it_matters(caplog: pytest.LogCaptureFixture) -> None:
    class Careful(diffusers.AutoencoderKLWan):
        def encode(self, x: Tensor, return_dict: bool = True) -> Any:
            if x.shape[3] < 16:
                raise ValueError("too small")
            return super().encode(x, return_dict)

    vae = Careful(base_dim=4, num_res_blocks=1).requires_grad_(False).eval()
    x = torch.rand(1, 3, 9, 32, 48)
    wanted = vae.encode(x).latent_dist.parameters
    with caplog.at_level(logging.WARNING):
        accelerate(vae, "exact")
        with wanted_frames(1):
            ours = vae.encode(x).latent_dist.parameters
        assert torch.equal(ours[:, :, :1], wanted[:, :, :1])
        assert last_encoding(vae).path == "exact"
        assert not caplog.records
        with wanted_frames(0):
            assert torch.equal(vae.encode(x).latent_dist.parameters, wanted)
    assert [r.getMessage() for r in caplog.records] == [
        "cosmos3_fast: all frames of a clip are encoded: "
        "what encode returns is not known (too small)"
    ]
