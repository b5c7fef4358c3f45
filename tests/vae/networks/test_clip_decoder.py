"""The clip decoder against the real diffusers classes."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from decoder_cases import (
    FAMILIES,
    TINY_CLIP,
    WAN22,
    decoding_vae,
    latent_clip,
    latent_frame,
    reference,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cosmos3_fast.frames import pixel_frames
from cosmos3_fast.ops import winograd_conv3x3
from cosmos3_fast.ops.registry import LIBRARY_KERNELS
from cosmos3_fast.vae import ClipDecoder, FrameDecoder, UnsupportedVAEError
from cosmos3_fast.vae.live.exact import decode_sample
from cosmos3_fast.vae.networks import causal
from cosmos3_fast.vae.synthetic import synthetic_config, synthetic_decoder_state_dict, synthetic_vae
from cosmos3_fast.vae.verify import FLOAT32_BOUND, largest, relative_error, rms

pytest.importorskip("diffusers")

HALVES = [torch.bfloat16, torch.float16]
DIRECT = [False, True]


def assert_frames_within(got: Tensor, wanted: Tensor, bound: float = FLOAT32_BOUND) -> None:
    """Each frame, by the largest value of the clip."""
    assert got.shape == wanted.shape
    assert got.dtype == wanted.dtype
    for ours, theirs in zip(got.unbind(2), wanted.unbind(2), strict=True):
        assert largest(ours.double() - theirs.double()) <= bound * largest(wanted)


@pytest.mark.parametrize("direct", DIRECT)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("batch", "cells"), [(2, (1, 1)), (1, (3, 2)), (1, (5, 3))])
def test_float32_matches(family: str, batch: int, cells: tuple[int, int], direct: bool) -> None:
    """Of every number of latent frames up to 13: a longer clip begins as a shorter one."""
    vae = decoding_vae(family, 7)
    latents = latent_clip(FAMILIES[family], 1, batch, 13, *cells, torch.float32)
    wanted = reference(vae, latents)
    # Most pixels lie where the clamp hides nothing.
    assert (wanted.abs() == 1).double().mean() < 0.1
    decoder = ClipDecoder.from_vae(vae, direct=direct)
    for frames in range(1, 14) if cells == (1, 1) else (2, 5, 13):
        got = decoder(latents[:, :, :frames])
        assert got.is_contiguous()
        assert_frames_within(got, wanted[:, :, : pixel_frames(frames)])
    raw = decoder.decode_unnormalized(latents[:, :, :3])
    assert_frames_within(raw, decode_sample(vae, latents[:, :, :3]))


@settings(max_examples=12, deadline=None)
@given(
    family=st.sampled_from(list(FAMILIES)),
    shape=st.tuples(*(st.integers(1, most) for most in (2, 7, 4, 4))),
    seed=st.integers(0, 3),
)
def test_float32_matches_whatever_the_shape(
    family: str, shape: tuple[int, int, int, int], seed: int
) -> None:
    vae, decoder = networks(family, seed)
    latents = latent_clip(FAMILIES[family], seed, *shape, torch.float32)
    assert_frames_within(decoder(latents), reference(vae, latents))


@functools.cache
def networks(family: str, seed: int) -> tuple[Any, ClipDecoder]:
    vae = decoding_vae(family, seed)
    return vae, ClipDecoder.from_vae(vae, probe=False)


@pytest.mark.skipif(
    ("winograd_conv3x3", "cpu") not in LIBRARY_KERNELS, reason="needs the compiled library"
)
def test_float32_matches_where_winograd_serves_in_space_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = {**TINY_CLIP, "dim_mult": [2, 2, 2], "decoder_base_dim": 16}
    vae = synthetic_vae(config, 0, decoder_base_dim=None)
    latents = latent_clip(config, 0, 1, 4, 9, 8, torch.float32)
    wanted = reference(vae, latents)
    decoder = ClipDecoder.from_vae(vae)
    seen: list[Tensor] = []

    def recorded(x: Tensor, *args: Any) -> Tensor:
        seen.append(x)
        return winograd_conv3x3(x, *args)

    monkeypatch.setattr(causal, "winograd_conv3x3", recorded)
    assert_frames_within(decoder(latents), wanted)
    # The level of 36x32 pixels, by blocks of two as the first frame; none of the lowest one's.
    assert {x.shape[2:] for x in seen} == {(36, 32)}
    # A clip's packed kernels are not kept: they would be four times the network.
    assert not any(getattr(module, "_packed", None) for module in decoder.modules())
    seen.clear()
    plain = ClipDecoder.from_vae(vae, winograd=False)
    assert_frames_within(plain(latents), wanted)
    assert not seen


@pytest.mark.parametrize("family", FAMILIES)
def test_float64_is_exact_algebra(family: str, upsamples_in_float64: None) -> None:
    """In float64 rounding hides nothing: a fold that is off by 1e-11 would show."""
    vae = decoding_vae(family, 1, torch.float64)
    latents = latent_clip(FAMILIES[family], 1, 1, 4, 2, 3, torch.float64)
    wanted = reference(vae, latents)
    blocks, direct = (ClipDecoder.from_vae(vae, direct=direct) for direct in DIRECT)
    assert relative_error(direct(latents), wanted) <= 1e-12
    assert relative_error(blocks(latents), wanted) <= 1e-12
    assert relative_error(blocks(latents), direct(latents)) <= 1e-12
    got = blocks.decode_unnormalized(latents)
    assert relative_error(got, decode_sample(vae, latents)) <= 1e-12


Errors = list[tuple[Tensor, Tensor]]

PLAIN: dict[str, dict[str, Any]] = {
    "blocks": {},
    "direct": {"direct": True},
    "bfloat16 products": {"products": torch.bfloat16},
}
CASES = [
    *((family, "random", "blocks", dtype) for family in FAMILIES for dtype in HALVES),
    *(
        (family, motion, "blocks", dtype)
        for family in ("wan2.2", "wan2.1")
        for motion in ("slow", "still")
        for dtype in HALVES
    ),
    *((family, "random", "direct", dtype) for family in ("wan2.2", "wan2.1") for dtype in HALVES),
    *((family, "random", "bfloat16 products", torch.bfloat16) for family in ("wan2.2", "wan2.1")),
]


@functools.cache
def half_runs(family: str, motion: str, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Of four seeds: the VAE, latents [1, z, 5, 5, 6] on its scale, what they are in float64 with
    the same (rounded) weights, and the VAE's own error.

    The float64 run is the 2-D decoder's with direct taps, which `test_float64_is_exact_algebra`
    holds to the 3-D VAE's.
    """
    runs = []
    for seed in range(4):
        vae = decoding_vae(family, seed, dtype)
        latents = latent_clip(FAMILIES[family], seed, 1, 5, 5, 6, dtype, motion)
        exact = ClipDecoder.from_vae(vae, torch.float64, probe=False, direct=True)
        truth = exact.decode_unnormalized(latents)
        runs.append((vae, latents, truth, decode_sample(vae, latents).double() - truth))
    return runs


@functools.cache
def half_errors(family: str, motion: str, form: str, dtype: torch.dtype) -> Errors:
    """The decoder's errors and the VAE's."""
    errors: Errors = []
    for vae, latents, truth, theirs in half_runs(family, motion, dtype):
        decoder = ClipDecoder.from_vae(vae, probe=False, **PLAIN[form])
        got = decoder.decode_unnormalized(latents)
        assert got.dtype == dtype
        errors.append((got.double() - truth, theirs))
    return errors


@pytest.mark.parametrize(("family", "motion", "form", "dtype"), CASES)
def test_half_error_is_no_larger_than_the_vaes(
    family: str, motion: str, form: str, dtype: torch.dtype
) -> None:
    """In all, clip by clip: 0.76 to 0.82 of the VAE's in bfloat16, whose products are float16; 0.89
    to 0.97 where products are no finer than the frames; 0.82 to 0.87 with direct taps."""
    for ours, theirs in half_errors(family, motion, form, dtype):
        assert rms(ours) <= rms(theirs)


@pytest.mark.parametrize(("family", "motion", "form", "dtype"), CASES)
def test_half_error_of_each_frame_and_between_neighbours(
    family: str, motion: str, form: str, dtype: torch.dtype
) -> None:
    """Over four clips. A frame of one clip alone scatters by 0.05 around those ratios."""
    errors = half_errors(family, motion, form, dtype)
    for parts in (
        [(ours.unbind(2), theirs.unbind(2)) for ours, theirs in errors],
        [(ours.diff(dim=2).unbind(2), theirs.diff(dim=2).unbind(2)) for ours, theirs in errors],
    ):
        for i in range(len(parts[0][0])):
            ratios = [rms(ours[i]) / rms(theirs[i]) for ours, theirs in parts]
            assert sum(ratios) / len(ratios) <= 1


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_error_of_a_stream(dtype: torch.dtype) -> None:
    """Blocks of fewer frames than they hold are no worse."""
    for seed in range(2):
        vae = decoding_vae("wan2.2", seed, dtype)
        latents = latent_clip(WAN22, seed, 1, 5, 5, 6, dtype)
        truth = ClipDecoder.from_vae(vae, torch.float64, probe=False, direct=True)(latents)
        theirs = reference(vae, latents).double() - truth
        decoder = ClipDecoder.from_vae(vae, probe=False)
        for sizes in ([1] * 5, [2, 3]):
            stream = decoder.stream()
            got = torch.cat([stream.push(part) for part in latents.split(sizes, 2)], 2)
            assert rms(got.double() - truth) <= rms(theirs)


@pytest.mark.parametrize("family", ["wan2.2", "wan2.1"])
def test_float16_products_of_a_float32_network(family: str) -> None:
    """Against float64 of its weights, as a part of a bfloat16 VAE's error against its own: 0.10 to
    0.12 in all and between neighbours, up to 0.13 in a frame."""
    for seed in range(2):
        vae = decoding_vae(family, seed)
        latents = latent_clip(FAMILIES[family], seed, 1, 5, 5, 6, torch.bfloat16).float()
        decoder = ClipDecoder.from_vae(vae, probe=False, products=torch.float16)
        exact = ClipDecoder.from_vae(vae, torch.float64, probe=False, direct=True)
        ours = decoder.decode_unnormalized(latents).double() - exact.decode_unnormalized(latents)
        half = decoding_vae(family, seed, torch.bfloat16)
        exact = ClipDecoder.from_vae(half, torch.float64, probe=False, direct=True)
        vae_pixels = decode_sample(half, latents.bfloat16()).double()
        theirs = vae_pixels - exact.decode_unnormalized(latents)
        assert decoder.dtype == torch.float32
        assert rms(ours) <= rms(theirs) / 7
        assert rms(ours.diff(dim=2)) <= rms(theirs.diff(dim=2)) / 7
        for frame, vae_frame in zip(ours.unbind(2), theirs.unbind(2), strict=True):
            assert rms(frame) <= rms(vae_frame) / 7


FORMS = [
    (torch.float32, {}),
    (torch.float32, {"direct": True}),
    (torch.float32, {"products": torch.float16}),
    (torch.bfloat16, {}),
    (torch.bfloat16, {"products": torch.bfloat16}),
    (torch.bfloat16, {"direct": True}),
    (torch.float16, {}),
    (torch.float64, {}),
]


@pytest.mark.parametrize(("dtype", "options"), FORMS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_first_frame_is_the_frame_decoders(
    family: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    config = FAMILIES[family]
    tensors = synthetic_decoder_state_dict(config, 2)
    decoder = ClipDecoder.from_state_dict(tensors, config, dtype, **options)
    alone = FrameDecoder.from_state_dict(tensors, config, dtype)
    latents = latent_clip(config, 2, 2, 3, 3, 4, dtype)
    for output in ("float", "uint8"):
        wanted = alone(latents[:, :, 0], output)
        if output == "uint8":
            wanted = wanted.unsqueeze(1)
        time = 1 if output == "uint8" else 2
        assert torch.equal(decoder(latents, output).narrow(time, 0, 1), wanted)
        assert torch.equal(decoder(latents[:, :, 0], output), wanted)
    raw = decoder.decode_unnormalized(latents)[:, :, :1]
    assert torch.equal(raw, alone.decode_unnormalized(latents[:, :, 0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_are_the_pixels(dtype: torch.dtype) -> None:
    vae = decoding_vae("wan2.2", 2, dtype)
    decoder = ClipDecoder.from_vae(vae)
    latents = latent_clip(WAN22, 0, 2, 3, 4, 5, dtype)
    got = decoder(latents, output="uint8")
    assert got.shape == (2, 9, 64, 80, 3)
    assert got.dtype == torch.uint8
    assert got.is_contiguous()

    def rounded(pixels: Tensor) -> Tensor:
        return (255 * (pixels.movedim(1, -1).float() / 2 + 0.5)).round().to(torch.uint8)

    assert torch.equal(got, rounded(decoder(latents)))
    if dtype == torch.float32:
        wanted = rounded(reference(vae, latents))
        assert (got.int() - wanted.int()).abs().max() <= 1


def test_ignores_tiling_and_restores_the_switch() -> None:
    vae = decoding_vae("wan2.2", 0)
    latents = latent_clip(WAN22, 0, 1, 3, 4, 4, torch.float32)
    wanted = reference(vae, latents)
    vae.enable_tiling(16, 16, 16, 16)  # below the probe's size too
    decoder = ClipDecoder.from_vae(vae)
    assert vae.use_tiling
    assert_frames_within(decoder(latents), wanted)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("stride", (2, 1, 1), r"time_conv must have stride \(1, 1, 1\), got \(2, 1, 1\)"),
        ("_padding", (0, 0, 0, 0, 0, 0), r"time_conv must have causal padding .*, got \(0, 0, 0"),
        ("padding_mode", "replicate", r"time_conv must have padding_mode zeros, got replicate"),
        ("dilation", (2, 1, 1), r"time_conv must have dilation \(1, 1, 1\), got \(2, 1, 1\)"),
        ("groups", 2, r"time_conv must have groups 1, got 2"),
    ],
)
def test_a_changed_time_conv(setting: str, value: Any, message: str) -> None:
    vae = decoding_vae("wan2.2", 0)
    setattr(vae.decoder.up_blocks[1].upsampler.time_conv, setting, value)
    FrameDecoder.from_vae(vae)
    with pytest.raises(UnsupportedVAEError, match=message):
        ClipDecoder.from_vae(vae, probe=False)


def forgets_a_frame(vae: Any) -> None:
    conv = vae.decoder.mid_block.resnets[1].conv1
    forward = conv.forward

    def forget(x: Tensor, cache: Tensor | None = None) -> Tensor:
        return forward(x, cache if cache is None else cache[:, :, -1:])

    conv.forward = forget


def shifts_time(vae: Any) -> None:
    conv = vae.decoder.up_blocks[0].upsampler.time_conv
    forward = conv.forward
    conv.forward = lambda *args: forward(*args) + 0.3


@pytest.mark.parametrize("change", [forgets_a_frame, shifts_time])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_probe_finds_what_only_later_frames_show(change: Any, dtype: torch.dtype) -> None:
    vae = decoding_vae("wan2.2", 0, dtype)
    ClipDecoder.from_vae(vae)
    change(vae)
    FrameDecoder.from_vae(vae)
    ClipDecoder.from_vae(vae, probe=False)
    with pytest.raises(UnsupportedVAEError, match=r"pixels must be within .* the 2-D decoder's"):
        ClipDecoder.from_vae(vae)


@pytest.mark.parametrize("family", FAMILIES)
def test_probe_finds_each_changed_tap(family: str) -> None:
    """The decoder has other earlier taps than the VAE that it is held against."""
    vae, decoder = networks(family, 0)
    decoder._probe(vae)
    state = decoder.state_dict()
    for name in ("middle.0.conv1.earlier", "stages.2.blocks.0.conv2.earlier", "conv_in.earlier"):
        changed = ClipDecoder(decoder.topology, torch.float32)
        changed.load_state_dict({**state, name: state[name] * 1.2})
        with pytest.raises(UnsupportedVAEError, match="pixels must be within"):
            changed._probe(vae)


def test_probe_reports_a_vae_that_cannot_decode_clips() -> None:
    vae = decoding_vae("wan2.1", 0)
    decode = vae.decode

    def single(latents: Tensor) -> Any:
        if latents.shape[2] > 1:
            raise RuntimeError("no clips here")
        return decode(latents)

    vae.decode = single
    FrameDecoder.from_vae(vae)
    with pytest.raises(UnsupportedVAEError, match=r"vae\.decode failed on .*: no clips here"):
        ClipDecoder.from_vae(vae)


@pytest.mark.parametrize("temporal", [[False, False, True], [True, True, True]])
def test_another_temporal_factor(temporal: list[bool]) -> None:
    config = synthetic_config({**FAMILIES["wan2.1"], "temperal_downsample": temporal})
    tensors = synthetic_decoder_state_dict(config)
    FrameDecoder.from_state_dict(tensors, config)
    with pytest.raises(UnsupportedVAEError, match=r"temporal factor must be 4, got [28] \(config"):
        ClipDecoder.from_state_dict(tensors, config)
    topology = FrameDecoder.from_state_dict(tensors, config).topology
    with pytest.raises(UnsupportedVAEError, match=r"temporal factor must be 4"):
        ClipDecoder(topology)


def test_uneven_shortcuts_of_a_stage_that_doubles_time() -> None:
    """Cells of which a repetition is no part; those of `FAMILIES` are in other stages."""
    config = synthetic_config(
        {**TINY_CLIP, "dim_mult": [1, 4, 2], "temperal_downsample": [True, True]}
    )
    vae = synthetic_vae(config, 0, decoder_base_dim=None)
    decoder = ClipDecoder.from_vae(vae)
    stage = decoder.topology.stages[1]
    assert stage.up_channels is not None
    assert 8 % (8 * stage.up_channels // stage.in_channels)
    latents = latent_clip(config, 0, 2, 4, 2, 3, torch.float32)
    assert_frames_within(decoder(latents), reference(vae, latents))


def test_a_longer_clip() -> None:
    """More latent frames than go through the lowest level at once, no multiple of four."""
    vae, decoder = networks("wan2.2", 1)
    latents = latent_clip(WAN22, 3, 1, 36, 2, 2, torch.float32)
    assert_frames_within(decoder(latents), reference(vae, latents))
    frame = latent_frame(WAN22, 3, 1, 2, 2, torch.float32)
    still = frame.unsqueeze(2).expand(-1, -1, 6, -1, -1)
    assert torch.equal(decoder(still), decoder(still.contiguous()))
