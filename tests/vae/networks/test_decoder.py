"""The folded decoder against the real diffusers classes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from decoder_cases import FAMILIES, TINY, WAN22, decoding_vae, latent_frame, reference
from torch import Tensor

from cosmos3_fast import FrameDecoder
from cosmos3_fast.ops.registry import LIBRARY_KERNELS
from cosmos3_fast.vae.live.exact import decode_sample
from cosmos3_fast.vae.networks.layers import duplicated_phase
from cosmos3_fast.vae.synthetic import synthetic_decoder_state_dict, synthetic_vae
from cosmos3_fast.vae.verify import compare, relative_error

diffusers = pytest.importorskip("diffusers")

SIZES = [(1, 1, 1), (1, 1, 6), (2, 5, 3), (1, 9, 4)]


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_matches(family: str) -> None:
    vae = decoding_vae(family, 7)
    decoder = FrameDecoder.from_vae(vae)
    assert decoder.spatial_factor == (16 if "2.2" in family else 8)
    for size in SIZES:
        latents = latent_frame(FAMILIES[family], sum(size), *size, torch.float32)
        wanted = reference(vae, latents)
        # Most pixels lie where the clamp hides nothing.
        assert (wanted.abs() == 1).double().mean() < 0.1
        got = decoder(latents)
        assert got.dtype == torch.float32
        assert got.is_contiguous()
        assert compare(got, wanted).passed
        assert torch.equal(decoder(latents.unsqueeze(2)), got)


@pytest.mark.skipif(
    ("winograd_conv3x3", "cpu") not in LIBRARY_KERNELS, reason="no compiled library"
)
def test_float32_matches_where_winograd_serves() -> None:
    config = {**TINY, "dim_mult": [2, 2], "decoder_base_dim": 16}
    vae = synthetic_vae(config, 0, decoder_base_dim=None)
    decoder = FrameDecoder.from_vae(vae)
    latents = latent_frame(config, 0, 1, 17, 16, torch.float32)
    assert compare(decoder(latents), reference(vae, latents)).passed
    # 9 x 8 tiles after the up-sampling, 5 x 4 before it.
    assert decoder.stages[1].blocks[0].conv1._packed
    assert not decoder.stages[0].upsample._packed
    assert not decoder.stages[0].blocks[0].conv1._packed


@pytest.mark.parametrize("family", FAMILIES)
def test_float64_is_exact_algebra(family: str, upsamples_in_float64: None) -> None:
    """In float64 rounding hides nothing: a fold that is off by 1e-11 would show."""
    vae = decoding_vae(family, 1, torch.float64)
    latents = latent_frame(FAMILIES[family], 1, 1, 3, 2, torch.float64)
    decoder = FrameDecoder.from_vae(vae)
    assert relative_error(decoder(latents), reference(vae, latents)) <= 1e-12
    raw = latents.unsqueeze(2)
    got = decoder.decode_unnormalized(raw)
    assert relative_error(got, decode_sample(vae, raw)) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_half_error_is_no_larger_than_the_vaes(family: str, dtype: torch.dtype) -> None:
    """Against float64 with the same rounded weights: the 2-D network's, held to the 3-D VAE's by
    `test_float64_is_exact_algebra`; PyTorch's float64 conv3d is slow.
    """
    for seed in range(3):
        vae = decoding_vae(family, seed, dtype)
        decoder = FrameDecoder.from_vae(vae, probe=False)
        exact = FrameDecoder.from_vae(vae, torch.float64, probe=False)
        latents = latent_frame(FAMILIES[family], seed, 2, 5, 6, dtype)
        truth = exact(latents)
        got = decoder(latents)
        assert got.dtype == dtype
        result = compare(got, reference(vae, latents), truth)
        assert result.passed, result
        raw = latents.unsqueeze(2)
        vae_pixels = decode_sample(vae, raw)
        result = compare(
            decoder.decode_unnormalized(raw), vae_pixels, exact.decode_unnormalized(raw)
        )
        assert result.passed, result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_are_the_pixels(dtype: torch.dtype) -> None:
    vae = decoding_vae("wan2.2", 2, dtype)
    decoder = FrameDecoder.from_vae(vae)
    latents = latent_frame(WAN22, 0, 2, 4, 5, dtype)
    got = decoder(latents, output="uint8")
    assert got.shape == (2, 64, 80, 3)
    assert got.dtype == torch.uint8
    floats = decoder(latents)[:, :, 0].permute(0, 2, 3, 1)
    assert torch.equal(got, (255 * (floats.float() / 2 + 0.5)).round().to(torch.uint8))
    if dtype == torch.float32:
        from diffusers.image_processor import VaeImageProcessor

        frame = reference(vae, latents)[:, :, 0]
        images = VaeImageProcessor().postprocess(frame, output_type="np")
        wanted = torch.from_numpy((images * 255).round().astype("uint8"))
        assert (got.int() - wanted.int()).abs().max() <= 1


def test_follows_the_first_frame_of_a_longer_clip() -> None:
    vae = decoding_vae("wan2.2", 3)
    latents = torch.stack([latent_frame(WAN22, i, 1, 3, 4, torch.float32) for i in range(2)], 2)
    first = decode_sample(vae, latents)[:, :, :1]
    got = FrameDecoder.from_vae(vae).decode_unnormalized(latents[:, :, :1])
    assert compare(got, first).passed


def test_ignores_tiling_and_restores_the_switch() -> None:
    vae = decoding_vae("wan2.2", 0)
    vae.enable_tiling(16, 16, 16, 16)  # below the probe's size too
    decoder = FrameDecoder.from_vae(vae)
    assert vae.use_tiling
    latents = latent_frame(WAN22, 0, 1, 4, 4, torch.float32)
    tiled = reference(vae, latents)
    vae.disable_tiling()
    wanted = reference(vae, latents)
    assert relative_error(tiled, wanted) > 1e-2
    assert compare(decoder(latents), wanted).passed


def test_weights_are_copies_and_the_dtype_may_differ() -> None:
    vae = decoding_vae("wan2.1", 0)
    decoder = FrameDecoder.from_vae(vae)
    half = FrameDecoder.from_vae(vae, dtype=torch.bfloat16)
    latents = latent_frame(FAMILIES["wan2.1"], 0, 1, 2, 3, torch.float32)
    before = decoder(latents)
    assert half.dtype == half(latents).dtype == torch.bfloat16
    assert torch.equal(half(latents), half(latents.bfloat16()))
    for parameter in vae.parameters():
        parameter.zero_()
    assert torch.equal(decoder(latents), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_synthetic_weights_are_those_of_the_synthetic_vae(family: str) -> None:
    config = FAMILIES[family]
    tensors = synthetic_decoder_state_dict(config, 5)
    wanted = FrameDecoder.from_vae(decoding_vae(family, 5), probe=False).state_dict()
    got = FrameDecoder.from_state_dict(tensors, config).state_dict()
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


class AttributeVAE(torch.nn.Module):
    """As SGLang's: an attribute object for the config, a bare tensor from `decode`."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.decoder, self.post_quant_conv = vae.decoder, vae.post_quant_conv
        self.config = SimpleNamespace(**vae.config)
        self._inner = [vae]

    def decode(self, latents: Tensor) -> Tensor:
        return self._inner[0].decode(latents).sample.float()


def test_reads_sglangs_conventions() -> None:
    vae = decoding_vae("wan2.2", 0)
    wanted = FrameDecoder.from_vae(vae).state_dict()
    got = FrameDecoder.from_vae(AttributeVAE(vae)).state_dict()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_decode_sample_reads_each_return_convention() -> None:
    vae = decoding_vae("wan2.1", 0)
    latents = latent_frame(FAMILIES["wan2.1"], 0, 1, 2, 2, torch.float32).unsqueeze(2)
    wanted = vae.decode(latents).sample
    as_tuple = SimpleNamespace(decode=lambda z: vae.decode(z, return_dict=False))
    bare = SimpleNamespace(decode=lambda z: vae.decode(z).sample)
    for source in (vae, as_tuple, bare):
        assert torch.equal(decode_sample(source, latents), wanted)
    with pytest.raises(TypeError, match=r"vae\.decode must return pixels, got str"):
        decode_sample(SimpleNamespace(decode=lambda z: "pixels"), latents)


def duplicated(x: Tensor, out: int, factor_t: int, time: int) -> Tensor:
    """The four phases of `duplicated_phase` as one image."""
    phases = [duplicated_phase(x, out, factor_t, time, phase) for phase in range(4)]
    return F.pixel_shuffle(torch.stack(phases, 2).flatten(1, 2), 2)


SHORTCUTS = [
    (width, out, factor_t)
    for width, out in ((8, 8), (8, 4), (16, 4), (4, 8), (6, 9), (2, 16))
    for factor_t in (1, 2)
    if 4 * factor_t * out % width == 0
]


@pytest.mark.parametrize(("width", "out", "factor_t"), SHORTCUTS)
def test_duplicated_phases_are_the_3d_layers_last_frame(
    width: int, out: int, factor_t: int
) -> None:
    from diffusers.models.autoencoders.autoencoder_kl_wan import DupUp3D

    x = torch.randn(2, width, 3, 5, generator=torch.Generator().manual_seed(0))
    wanted = DupUp3D(width, out, factor_t, 2)(x[:, :, None], first_chunk=True)
    assert wanted.shape[2] == 1
    assert torch.equal(duplicated(x, out, factor_t, factor_t - 1), wanted[:, :, 0])


@pytest.mark.parametrize(("width", "out", "factor_t"), SHORTCUTS)
def test_duplicated_phases_are_the_3d_layers_later_frames(
    width: int, out: int, factor_t: int
) -> None:
    from diffusers.models.autoencoders.autoencoder_kl_wan import DupUp3D

    clip = torch.randn(2, width, 3, 3, 5, generator=torch.Generator().manual_seed(1))
    wanted = DupUp3D(width, out, factor_t, 2)(clip, first_chunk=False)
    assert wanted.shape[2] == 3 * factor_t
    times = [duplicated(x, out, factor_t, t) for x in clip.unbind(2) for t in range(factor_t)]
    assert torch.equal(torch.stack(times, 2), wanted)
