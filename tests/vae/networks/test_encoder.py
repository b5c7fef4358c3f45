"""The folded encoder against the real diffusers classes."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from encoder_cases import (
    BUILDERS,
    HALVES,
    RESIDUAL,
    image,
    reference,
)

from cosmos3_fast.vae import FrameEncoder
from cosmos3_fast.vae.live.exact import encode_exact, normalize_latents, posterior_mode
from cosmos3_fast.vae.synthetic import COSMOS3_VAE_CONFIG, synthetic_vae
from cosmos3_fast.vae.verify import FLOAT32_BOUND, largest, relative_error, rms

pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("attention_in_stages")


@pytest.fixture(scope="module")
def cosmos3_vae() -> Any:
    return synthetic_vae(COSMOS3_VAE_CONFIG, seed=0)


def assert_float32_bound(vae: Any, pixels: torch.Tensor) -> None:
    encoder = FrameEncoder.from_vae(vae)
    wanted = reference(vae, pixels)
    got = encoder(pixels)
    assert got.shape == wanted.shape
    assert got.dtype == wanted.dtype == torch.float32
    assert got.is_contiguous()
    assert relative_error(got, wanted) <= FLOAT32_BOUND


@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize(
    ("batch", "cells"), [(1, (1, 1)), (1, (1, 7)), (2, (5, 3)), (3, (2, 9)), (1, (11, 4))]
)
def test_float32_matches(family: str, batch: int, cells: tuple[int, int]) -> None:
    vae = BUILDERS[family](7)
    factor = FrameEncoder.from_vae(vae, probe=False).spatial_factor
    assert factor == (16 if "2.2" in family else 8)
    assert_float32_bound(vae, image(3, batch, cells[0] * factor, cells[1] * factor, torch.float32))


@pytest.mark.parametrize("size", [(64, 96), (16, 16)])
def test_float32_matches_at_cosmos3_widths(cosmos3_vae: Any, size: tuple[int, int]) -> None:
    assert_float32_bound(cosmos3_vae, image(0, 1, *size, torch.float32))


def half_errors(vae: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Errors of the encoder and of the VAE against float64 with the same (rounded) weights.

    The float64 run is the 2-D encoder's, which `test_float64_is_exact_algebra` holds to the 3-D
    VAE's: PyTorch's float64 conv3d takes minutes.
    """
    truth = FrameEncoder.from_vae(vae, torch.float64, probe=False)(pixels)
    got = FrameEncoder.from_vae(vae, probe=False)(pixels)
    vae_path = reference(vae, pixels)
    assert got.dtype == vae_path.dtype == pixels.dtype
    return got.double() - truth, vae_path.double() - truth


def assert_no_worse(errors: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """RMS image by image; the maximum, which is one noisy element, on average over the images."""
    for ours, theirs in errors:
        assert rms(ours) <= rms(theirs)
    assert sum(largest(ours) for ours, _ in errors) <= sum(largest(theirs) for _, theirs in errors)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("family", BUILDERS)
def test_half_error_is_no_larger_than_the_vaes(family: str, dtype: torch.dtype) -> None:
    errors = []
    # Largest errors scatter most with attention: on a processor without bfloat16 instructions they
    # are 1.02 of the VAE's over the first four images and 0.84 over 32.
    for seed in range(8 if "attention" in family else 4):
        vae = BUILDERS[family](seed).to(dtype)
        size = (64, 80) if "2.2" in family else (32, 40)
        errors.append(half_errors(vae, image(seed, 2, *size, dtype)))
    assert_no_worse(errors)


# Few pixels: PyTorch's conv3d of half precision is slow on the CPU.
@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [
        (torch.bfloat16, [(48, 80), (32, 48), (48, 32)]),
        (torch.float16, [(32, 32), (16, 48), (48, 16)]),
    ],
    ids=str,
)
def test_half_error_at_cosmos3_widths(
    cosmos3_vae: Any, dtype: torch.dtype, sizes: list[tuple[int, int]]
) -> None:
    vae = copy.deepcopy(cosmos3_vae).to(dtype)
    assert_no_worse([half_errors(vae, image(i, 1, *s, dtype)) for i, s in enumerate(sizes)])


@pytest.mark.parametrize("family", ["wan2.2", "wan2.1", "qwen-image"])
@pytest.mark.parametrize("frames", [5, 9])
def test_first_frame_of_a_clip(family: str, frames: int) -> None:
    vae = BUILDERS[family](2)
    generator = torch.Generator().manual_seed(frames)
    clip = torch.rand(1, 3, frames, 48, 80, generator=generator) * 2 - 1
    first = encode_exact(vae, clip)[:, :, :1]
    got = FrameEncoder.from_vae(vae)(clip[:, :, 0])
    assert relative_error(got, first) <= FLOAT32_BOUND


@pytest.mark.parametrize("family", BUILDERS)
def test_float64_is_exact_algebra(family: str) -> None:
    """In float64 rounding hides nothing: a fold that is off by 1e-11 would show."""
    vae = BUILDERS[family](1).double()
    pixels = image(1, 1, 16, 32, torch.float64)
    mean, std = (
        torch.tensor(vae.config[name], dtype=torch.float64).view(1, -1, 1, 1, 1)
        for name in ("latents_mean", "latents_std")
    )
    wanted = (posterior_mode(vae, pixels[:, :, None]) - mean) / std
    got = FrameEncoder.from_vae(vae)(pixels)
    assert relative_error(got, wanted) <= 1e-12


def test_ignores_tiling_and_restores_the_switch() -> None:
    vae = synthetic_vae(RESIDUAL)
    vae.enable_tiling(8, 8, 8, 8)  # below the probe's size too
    encoder = FrameEncoder.from_vae(vae)
    assert vae.use_tiling
    pixels = image(0, 1, 64, 64, torch.float32)
    tiled = reference(vae, pixels)
    vae.disable_tiling()
    wanted = reference(vae, pixels)
    assert largest(tiled - wanted) > 1e-2
    assert relative_error(encoder(pixels), wanted) <= FLOAT32_BOUND


class AttributeVAE(torch.nn.Module):
    """As SGLang's: an attribute object for the config, a bare distribution from `encode`."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.encoder, self.quant_conv = vae.encoder, vae.quant_conv
        config = dict(vae.config)
        tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
        self.config = SimpleNamespace(**tuples)
        self._inner = [vae]

    def encode(self, pixels: torch.Tensor) -> Any:
        return self._inner[0].encode(pixels).latent_dist


def test_reads_sglangs_conventions() -> None:
    vae = synthetic_vae(RESIDUAL)
    wanted = FrameEncoder.from_vae(vae).state_dict()
    got = FrameEncoder.from_vae(AttributeVAE(vae)).state_dict()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_weights_are_copies() -> None:
    vae = synthetic_vae(RESIDUAL)
    encoder = FrameEncoder.from_vae(vae)
    pixels = image(0, 1, 32, 32, torch.float32)
    before = encoder(pixels)
    for parameter in vae.parameters():
        parameter.zero_()
    assert torch.equal(encoder(pixels), before)


def test_dtype_can_differ_from_the_vaes() -> None:
    vae = synthetic_vae(RESIDUAL)
    encoder = FrameEncoder.from_vae(vae, dtype=torch.bfloat16)
    pixels = image(0, 1, 32, 32, torch.float32)
    assert encoder.dtype == encoder(pixels).dtype == torch.bfloat16
    assert torch.equal(encoder(pixels), encoder(pixels.bfloat16()))


def test_encode_mode_reads_each_return_convention() -> None:
    vae = synthetic_vae(RESIDUAL)
    pixels = image(0, 1, 32, 32, torch.float32)[:, :, None]
    wanted = vae.encode(pixels).latent_dist.mode()
    as_tuple = SimpleNamespace(encode=lambda x: vae.encode(x, return_dict=False))
    bare = SimpleNamespace(encode=lambda x: vae.encode(x).latent_dist)
    for source in (vae, as_tuple, bare):
        assert torch.equal(posterior_mode(source, pixels), wanted)
    with pytest.raises(
        TypeError, match=r"vae\.encode must return a distribution with mode\(\), got Tensor"
    ):
        posterior_mode(SimpleNamespace(encode=lambda x: x), pixels)


def test_normalize_rounds_the_statistics_first() -> None:
    config = {"latents_mean": [0.1, -0.3], "latents_std": [1.7, 0.9]}
    latents = torch.randn(1, 2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    mean = torch.tensor(config["latents_mean"]).bfloat16().view(1, 2, 1, 1, 1)
    std = torch.tensor(config["latents_std"]).bfloat16().view(1, 2, 1, 1, 1)
    assert torch.equal(normalize_latents(latents, config), (latents - mean) / std)
    as_object = SimpleNamespace(**config)
    assert torch.equal(normalize_latents(latents, as_object), (latents - mean) / std)


def test_encode_exact_is_the_vae_itself_and_names_bad_input() -> None:
    vae = synthetic_vae(RESIDUAL).bfloat16()
    clip = torch.rand(1, 3, 5, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mode = vae.encode(clip.bfloat16()).latent_dist.mode()
    assert torch.equal(encode_exact(vae, clip), normalize_latents(mode, vae.config))
    with pytest.raises(
        ValueError, match=r"pixels must have shape \[B, 3, T, H, W\], got \[3, 5, 32, 32\]"
    ):
        encode_exact(vae, clip[0])
    with pytest.raises(ValueError, match=r"pixels must have 1 \+ 4k frames, got 4"):
        encode_exact(vae, clip[:, :, :4])
