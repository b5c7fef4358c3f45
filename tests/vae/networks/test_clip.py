"""The clip encoder against the real diffusers classes."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from encoder_cases import BUILDERS, HALVES, RESIDUAL, UNEVEN, WAN21, clip
from torch import nn

from cosmos3_fast.ops.registry import LIBRARY_KERNELS
from cosmos3_fast.vae import ClipEncoder, FrameEncoder, UnsupportedVAEError
from cosmos3_fast.vae.live.exact import encode_exact, posterior_mode
from cosmos3_fast.vae.networks.causal import Sum
from cosmos3_fast.vae.synthetic import (
    COSMOS3_VAE_CONFIG,
    synthetic_config,
    synthetic_state_dict,
    synthetic_vae,
)
from cosmos3_fast.vae.verify import FLOAT32_BOUND, largest, relative_error, rms

pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("attention_in_stages")


@pytest.fixture(scope="module")
def cosmos3_vae() -> Any:
    return synthetic_vae(COSMOS3_VAE_CONFIG, seed=0)


def assert_float32_bound(vae: Any, pixels: torch.Tensor) -> None:
    wanted = encode_exact(vae, pixels)
    got = ClipEncoder.from_vae(vae, probe=False)(pixels)
    assert got.shape == wanted.shape
    assert got.dtype == wanted.dtype == torch.float32
    assert got.is_contiguous()
    for t in range(got.shape[2]):
        assert largest((got - wanted)[:, :, t]) <= FLOAT32_BOUND * largest(wanted)


@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize(
    ("batch", "frames", "cells"), [(1, 5, (1, 1)), (2, 5, (3, 2)), (2, 9, (1, 4)), (1, 13, (2, 3))]
)
def test_float32_matches(family: str, batch: int, frames: int, cells: tuple[int, int]) -> None:
    factor = 16 if "2.2" in family else 8
    size = cells[0] * factor, cells[1] * factor
    assert_float32_bound(BUILDERS[family](7), clip(0, batch, frames, *size, torch.float32))


def test_float32_matches_at_cosmos3_widths(cosmos3_vae: Any) -> None:
    assert_float32_bound(cosmos3_vae, clip(1, 1, 5, 32, 48, torch.float32))


@pytest.mark.skipif(
    ("winograd_conv3x3", "cpu") not in LIBRARY_KERNELS, reason="needs the compiled library"
)
def test_float32_matches_at_sizes_that_winograd_takes() -> None:
    config = synthetic_config({**RESIDUAL, "base_dim": 32})
    pixels = clip(2, 1, 5, 128, 128, torch.float32)
    vae = synthetic_vae(config)
    with torch.profiler.profile() as profile:
        assert_float32_bound(vae, pixels)
    calls = {event.key: event.count for event in profile.key_averages()}
    # Of the first stage's four convolutions: the first frame's last tap, and the four kernels of
    # two blocks of two frames, side by side. Of the second stage's the same but for the first
    # frame, which has too few tiles, as has all that comes later. Before them, one of windows.
    assert calls["cosmos3::winograd_conv3x3"] == 1 + 4 * (1 + 4) + 4 * 4


@pytest.mark.parametrize("family", BUILDERS)
def test_float64_is_exact_algebra(family: str) -> None:
    """In float64 rounding hides nothing: a fold that is off by 1e-11 would show."""
    vae = BUILDERS[family](1).double()
    pixels = clip(3, 1, 9, 16, 32, torch.float64)
    mean, std = (
        torch.tensor(vae.config[name], dtype=torch.float64).view(1, -1, 1, 1, 1)
        for name in ("latents_mean", "latents_std")
    )
    wanted = (posterior_mode(vae, pixels) - mean) / std
    got = ClipEncoder.from_vae(vae, probe=False)(pixels)
    assert relative_error(got, wanted) <= 1e-12


@pytest.mark.parametrize("family", BUILDERS)
def test_direct_taps(family: str) -> None:
    """In float64 the same as blocks, in float32 within the same bound of the VAE."""
    vae = BUILDERS[family](8)
    pixels = clip(8, 2, 9, 16, 32, torch.float32)
    direct = ClipEncoder.from_vae(vae, direct=True)
    assert relative_error(direct(pixels), encode_exact(vae, pixels)) <= FLOAT32_BOUND
    blocks, direct = (
        ClipEncoder.from_vae(vae, torch.float64, probe=False, direct=each) for each in (False, True)
    )
    assert relative_error(blocks(pixels), direct(pixels)) <= 1e-12


@pytest.mark.parametrize("family", ["wan2.2", "wan2.1"])
def test_posterior_is_what_the_vae_encodes_to(family: str) -> None:
    vae = BUILDERS[family](9)
    pixels = clip(9, 1, 9, 32, 48, torch.float32)
    wanted = vae.encode(pixels).latent_dist.parameters
    encoder = ClipEncoder.from_vae(vae, posterior=True)
    got = encoder(pixels)
    z = vae.config.z_dim
    for part in (slice(z), slice(z, None)):  # mean and log-variance have scales of their own
        assert relative_error(got[:, part], wanted[:, part]) <= FLOAT32_BOUND
    assert torch.equal(encoder.first(pixels[:, :, 0]), got[:, :, :1])


def half_errors(
    vae: Any, pixels: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `test_encoder.half_errors`, with `test_float64_is_exact_algebra` of this file."""
    truth = ClipEncoder.from_vae(vae, torch.float64, probe=False)(pixels)
    got = ClipEncoder.from_vae(vae, probe=False, **options)(pixels)
    vae_latents = encode_exact(vae, pixels)
    assert got.dtype == vae_latents.dtype == pixels.dtype
    return got.double() - truth, vae_latents.double() - truth


@functools.cache
def family_errors(family: str, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """`half_errors` of two VAEs, on clips of 4x5 cells in 3 latent frames."""
    size = (64, 80) if "2.2" in family else (32, 40)
    return [
        half_errors(BUILDERS[family](seed).to(dtype), clip(seed, 1, 9, *size, dtype))
        for seed in range(2)
    ]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("family", BUILDERS)
def test_half_error_is_no_larger_than_the_vaes(family: str, dtype: torch.dtype) -> None:
    """RMS clip by clip, and in each latent frame: errors do not build up along the clip.

    The average over seeds is 0.73 to 0.77 of the VAE's in bfloat16, whose products are float16,
    and 0.83 to 0.88 in float16. At this size its standard deviation is 0.04 to 0.08 from clip to
    clip; at 2x2 cells it would be 0.15.
    """
    errors = family_errors(family, dtype)
    for ours, theirs in errors:
        assert rms(ours) <= rms(theirs)
    for t in range(3):
        ours_rms, theirs_rms = (sum(rms(pair[i][:, :, t]) for pair in errors) for i in (0, 1))
        assert ours_rms <= theirs_rms


@pytest.mark.parametrize("options", [{"direct": True}, {"products": torch.bfloat16}], ids=str)
def test_half_error_of_other_forms(options: dict[str, Any]) -> None:
    """0.85 of the VAE's with direct taps, 0.88 to 0.93 with blocks of two in bfloat16."""
    for seed in range(2):
        vae = BUILDERS["wan2.2"](seed).bfloat16()
        pixels = clip(seed, 1, 9, 64, 80, torch.bfloat16)
        ours, theirs = half_errors(vae, pixels, **options)
        assert rms(ours) <= rms(theirs)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_maximum_is_no_larger_than_the_vaes(dtype: torch.dtype) -> None:
    """The maximum, which is one noisy element, on average over the latent frames of all families.

    Over 4 seeds it is 0.77 to 0.95 of the VAE's, by family and dtype: two seeds of one family are
    too few to tell that from 1.
    """
    ours_peak = theirs_peak = 0.0
    for family in BUILDERS:
        for ours, theirs in family_errors(family, dtype):
            ours_peak += sum(largest(frame) for frame in ours.unbind(2)) / rms(theirs)
            theirs_peak += sum(largest(frame) for frame in theirs.unbind(2)) / rms(theirs)
    assert ours_peak <= theirs_peak


def test_bfloat16_error_at_cosmos3_widths(cosmos3_vae: Any) -> None:
    vae = copy.deepcopy(cosmos3_vae).bfloat16()
    ours, theirs = half_errors(vae, clip(0, 1, 5, 16, 32, torch.bfloat16))
    assert rms(ours) <= rms(theirs)


@pytest.mark.parametrize("family", ["wan2.2", "wan2.1 attention"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_prefix_reads_and_computes_nothing_else(family: str, dtype: torch.dtype) -> None:
    """Blocks hold more frames where a clip goes on, and sums are then ordered otherwise: a prefix
    is the whole clip's up to rounding, its first frame bit for bit."""
    vae = BUILDERS[family](2).to(dtype)
    encoder = ClipEncoder.from_vae(vae, probe=False)
    pixels = clip(4, 2, 13, 16, 32, dtype)
    whole = encoder(pixels)
    ours, theirs = half_errors(vae, pixels)
    for wanted in (1, 2, 3, 4):
        used = 4 * wanted - 3
        poisoned = pixels.clone()
        poisoned[:, :, used:] = torch.nan
        frames: list[list[int]] = [[] for _ in encoder.stages]

        def count(stage: nn.Module, args: Any, frames: list[list[int]] = frames) -> None:
            terms, memory = args
            given = terms.products(memory) if isinstance(terms, Sum) else terms
            frames[list(encoder.stages).index(stage)].append(given.frames)

        hooks = [stage.register_forward_pre_hook(count) for stage in encoder.stages]
        got = encoder(poisoned, wanted)
        for hook in hooks:
            hook.remove()
        assert torch.equal(encoder(pixels, wanted), got)
        assert torch.equal(encoder(pixels[:, :, :used]), got)
        assert torch.equal(got[:, :, 0], whole[:, :, 0])
        if dtype == torch.float32:
            assert relative_error(got, whole[:, :, :wanted]) <= FLOAT32_BOUND
        else:
            exact = whole.double() - ours
            assert rms(got - exact[:, :, :wanted]) <= rms(theirs[:, :, :wanted])
        # The second and third stage halve time. After the first frame, on a CPU four at a time.
        through = [used, used, 2 * wanted - 1, wanted]
        assert frames == [[1, *(min(4, n - t) for t in range(1, n, 4))] for n in through]


@pytest.mark.parametrize("family", ["wan2.2", "wan2.2 uneven", "wan2.1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_first_latent_is_the_single_frame_encoders(family: str, dtype: torch.dtype) -> None:
    vae = BUILDERS[family](3).to(dtype)
    alone = FrameEncoder.from_vae(vae, probe=False)
    encoder = ClipEncoder.from_vae(vae, probe=False)
    pixels = clip(5, 2, 5, 32, 32, dtype)
    wanted = alone(pixels[:, :, 0])
    assert torch.equal(encoder(pixels)[:, :, :1], wanted)
    assert torch.equal(encoder(pixels, 1), wanted)
    assert torch.equal(encoder(pixels[:, :, 0]), wanted)
    assert torch.equal(encoder.first(pixels[:, :, 0]), wanted)
    first = encoder.first.state_dict()
    assert all(torch.equal(first[name], tensor) for name, tensor in alone.state_dict().items())


def test_ignores_tiling_and_probes_without_it() -> None:
    vae = synthetic_vae(RESIDUAL)
    pixels = clip(6, 1, 5, 64, 64, torch.float32)
    wanted = encode_exact(vae, pixels)
    vae.enable_tiling(8, 8, 8, 8)
    encoder = ClipEncoder.from_vae(vae)
    assert vae.use_tiling
    assert relative_error(encoder(pixels), wanted) <= FLOAT32_BOUND


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("stride", (1, 1, 1), r"time_conv must have stride \(2, 1, 1\), got \(1, 1, 1\)"),
        # What SGLang's encode leaves there with use_feature_cache=False.
        (
            "_padding",
            (0, 0, 0, 0, 2, 0),
            r"time_conv must have causal padding .*, got \(0, 0, 0, 0, 2, 0\)",
        ),
        ("padding", (1, 0, 0), r"time_conv must have causal padding .*, got \(0, 0, 0, 0, 1, 1\)"),
        ("padding_mode", "replicate", r"time_conv must have padding_mode zeros, got replicate"),
        ("dilation", (2, 1, 1), r"time_conv must have dilation \(1, 1, 1\), got \(2, 1, 1\)"),
        ("groups", 2, r"time_conv must have groups 1, got 2"),
    ],
)
def test_a_changed_time_conv(setting: str, value: Any, message: str) -> None:
    vae = synthetic_vae(RESIDUAL)
    setattr(vae.encoder.down_blocks[1].downsampler.time_conv, setting, value)
    FrameEncoder.from_vae(vae)
    with pytest.raises(UnsupportedVAEError, match=message):
        ClipEncoder.from_vae(vae, probe=False)


def test_modules_are_checked_as_for_one_frame() -> None:
    vae = synthetic_vae(WAN21)
    vae.encoder.mid_block.resnets[0].nonlinearity = nn.GELU()
    with pytest.raises(UnsupportedVAEError, match=r"nonlinearity SiLU, got GELU"):
        ClipEncoder.from_vae(vae, probe=False)


def test_probe_reaches_the_third_chunk() -> None:
    vae = synthetic_vae(RESIDUAL)
    conv = vae.encoder.mid_block.resnets[1].conv1
    forward = conv.forward

    def forget(x: torch.Tensor, cache: torch.Tensor | None = None) -> torch.Tensor:
        return forward(x, cache if cache is None else cache[:, :, -1:])

    conv.forward = forget
    FrameEncoder.from_vae(vae)
    encoder = ClipEncoder.from_vae(vae, probe=False)
    pixels = clip(7, 1, 5, 32, 32, torch.float32)
    assert largest(encoder(pixels) - encode_exact(vae, pixels)) <= 1e-4
    with pytest.raises(
        UnsupportedVAEError, match=r"latents must be within .* of the 2-D encoder's"
    ):
        ClipEncoder.from_vae(vae)


def test_probe_reports_a_vae_that_cannot_encode_clips() -> None:
    vae = synthetic_vae(RESIDUAL)
    encode = vae.encode

    def single(pixels: torch.Tensor) -> Any:
        if pixels.shape[2] > 1:
            raise RuntimeError("no clips here")
        return encode(pixels)

    vae.encode = single
    FrameEncoder.from_vae(vae)
    with pytest.raises(UnsupportedVAEError, match=r"failed on 9 32x32 frames: no clips here"):
        ClipEncoder.from_vae(vae)


@pytest.mark.parametrize("temporal", [[False, False, True], [True, True, True]])
def test_another_temporal_factor(temporal: list[bool]) -> None:
    config = {**WAN21, "temperal_downsample": temporal}
    tensors = synthetic_state_dict(config)
    FrameEncoder.from_state_dict(tensors, config)
    with pytest.raises(UnsupportedVAEError, match=r"temporal factor must be 4, got [28]"):
        ClipEncoder.from_state_dict(tensors, config)


def test_uneven_shortcuts_take_the_general_route() -> None:
    """What makes "wan2.2 uneven" of `BUILDERS` worth its time."""
    topology = ClipEncoder.from_state_dict(synthetic_state_dict(UNEVEN), UNEVEN).topology
    halving = [stage for stage in topology.stages if stage.factor_t == 2]
    assert any(stage.out_channels != 2 * stage.in_channels for stage in halving)
