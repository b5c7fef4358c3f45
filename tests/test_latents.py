"""The stage against the eager formulas of SGLang, and every error of its arguments."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from cosmos3_fast import latents as latents_module
from cosmos3_fast.frames import latent_frames, pixel_frames
from cosmos3_fast.images.load import load_pixels
from cosmos3_fast.latents import LatentPreparation, PreparedLatents
from cosmos3_fast.vae import ClipEncoder, FrameEncoder
from cosmos3_fast.vae.synthetic import COSMOS3_VAE_CONFIG, synthetic_vae
from cosmos3_fast.vae.verify import FLOAT32_BOUND, relative_error

H, W, FRAMES = 64, 96, 17
CONFIG = {**COSMOS3_VAE_CONFIG, "base_dim": 8}


@pytest.fixture(scope="module")
def vae():
    pytest.importorskip("diffusers")
    return synthetic_vae(CONFIG, seed=3, decoder_base_dim=4)


@pytest.fixture(scope="module")
def encoder(vae):
    return FrameEncoder.from_vae(vae)


@pytest.fixture
def photograph():
    array = np.random.default_rng(0).integers(0, 256, (80, 130, 3), dtype=np.uint8)
    return Image.fromarray(array)


@pytest.fixture
def clip():
    return np.random.default_rng(1).integers(0, 256, (9, H, W, 3), dtype=np.uint8)


class FakeVae:
    """Records what reaches `encode`, whose latents are the mean pixels of each latent frame."""

    def __init__(self, dtype=torch.float32):
        weight = torch.zeros(1, dtype=dtype)
        self.encoder = SimpleNamespace(conv_in=SimpleNamespace(weight=weight))
        self.config = SimpleNamespace(
            z_dim=4,
            scale_factor_spatial=16,
            scale_factor_temporal=4,
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        )
        self.quant_conv = torch.nn.Identity()
        self.seen = []

    def encode(self, pixels):
        self.seen.append(pixels)
        frames = latent_frames(pixels.shape[2])
        per_frame = pixels[:, :, ::4].mean(dim=(1, 3, 4))
        latents = per_frame[:, None, :, None, None].expand(
            -1, 4, frames, pixels.shape[3] // 16, pixels.shape[4] // 16
        )
        return SimpleNamespace(mode=lambda: latents)


def sglang_engine(vae, pixels, num_frames, frames, seed, dtype):
    """Cosmos3LatentPreparationStage.forward of SGLang 0.5.23 for [B,3,T,H,W] pixels on the CPU."""
    shape = (
        pixels.shape[0],
        vae.config.z_dim,
        latent_frames(num_frames),
        pixels.shape[3] // 16,
        pixels.shape[4] // 16,
    )
    noise = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=dtype)
    posterior = vae.encode(pixels.to(next(vae.parameters()).dtype)).latent_dist
    latent = posterior.mode()
    mean = torch.as_tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1).to(latent.dtype)
    std = torch.as_tensor(vae.config.latents_std).view(1, -1, 1, 1, 1).to(latent.dtype)
    cond_latent = ((latent - mean) / std).to(dtype)
    condition_latents = torch.zeros_like(noise)
    mask = torch.zeros(shape[0], 1, shape[2], 1, 1, dtype=dtype)
    for index in frames:
        condition_latents[:, :, index] = cond_latent[:, :, min(index, cond_latent.shape[2] - 1)]
        mask[:, :, index] = 1.0
    return mask * condition_latents + (1.0 - mask) * noise, 1.0 - mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_exact_mode_equals_sglang_bit_for_bit(vae, photograph, dtype):
    stage = LatentPreparation(vae=vae)
    prepared = stage(photograph, FRAMES, H, W, seed=7, dtype=dtype)
    pixels = load_pixels(photograph, H, W)[:, :, None]
    latents, velocity_mask = sglang_engine(vae, pixels, FRAMES, [0], 7, dtype)
    assert prepared.mode == "exact"
    assert torch.equal(prepared.latents, latents)
    assert torch.equal(prepared.velocity_mask, velocity_mask)
    assert prepared.condition_latents.shape == (1, 48, 1, H // 16, W // 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fast_mode(vae, encoder, photograph, dtype):
    fast = LatentPreparation(encoder)(photograph, FRAMES, H, W, seed=7, dtype=dtype)
    exact = LatentPreparation(vae=vae)(photograph, FRAMES, H, W, seed=7, dtype=dtype)
    assert fast.mode == "fast"
    assert fast.condition_frames == (0,)
    for name in ("latents", "velocity_mask", "condition_latents"):
        ours, theirs = getattr(fast, name), getattr(exact, name)
        assert ours.dtype == theirs.dtype == dtype
        assert ours.shape == theirs.shape
    assert torch.equal(fast.latents[:, :, 1:], exact.latents[:, :, 1:])
    assert torch.equal(fast.latents[:, :, :1], fast.condition_latents)
    assert torch.equal(fast.velocity_mask, exact.velocity_mask)
    assert fast.velocity_mask.flatten().tolist() == [0.0] + [1.0] * (fast.latents.shape[2] - 1)
    if dtype == torch.float32:
        error = relative_error(fast.condition_latents, exact.condition_latents)
        assert error <= FLOAT32_BOUND


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("size", [(32, 32), (48, 64), (64, 96)])
@pytest.mark.parametrize("frames", [(0,), (0, 1), (2,)])
def test_clip_equals_the_whole_encode(clip, size, frames, dtype, tiled):
    """Of a clip padded as SGLang pads, the beginning gives the first latents, bit for bit."""
    vae = synthetic_vae(CONFIG, 3).to(dtype)
    if tiled:
        vae.enable_tiling(32, 32, 16, 16)
    given = clip[: pixel_frames(frames[-1] + 1)]
    prepared = LatentPreparation(vae=vae)(given, FRAMES, *size, frames, seed=1, dtype=torch.float32)
    pixels = load_pixels(given, *size)
    padding = pixels[:, :, -1:].expand(-1, -1, FRAMES - len(given), -1, -1)
    padded = torch.cat([pixels, padding], dim=2)
    latents, velocity_mask = sglang_engine(vae, padded, FRAMES, frames, 1, torch.float32)
    assert torch.equal(prepared.latents, latents)
    assert torch.equal(prepared.velocity_mask, velocity_mask)
    assert not vae.quant_conv._forward_pre_hooks
    assert not vae.quant_conv._forward_hooks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frames", [(0,), (0, 1), (2,)])
def test_bytes_reach_the_encoder_as_bytes(vae, clip, frames, dtype, monkeypatch):
    """And give what the same image in floats gives, bit for bit; short clips are padded alike."""
    encoder = ClipEncoder.from_vae(vae, dtype=dtype)
    given = clip[:3]
    stage = LatentPreparation(encoder)
    wanted = stage(load_pixels(given, H, W), FRAMES, H, W, frames, seed=1).latents
    seen = []
    forward = ClipEncoder.forward
    monkeypatch.setattr(
        ClipEncoder, "forward", lambda self, pixels: (seen.append(pixels), forward(self, pixels))[1]
    )
    for each in (given, [Image.fromarray(frame) for frame in given]):
        assert torch.equal(stage(each, FRAMES, H, W, frames, seed=1).latents, wanted)
    needed = pixel_frames(frames[-1] + 1)
    shape = (1, H, W, 3) if needed == 1 else (1, needed, H, W, 3)
    assert [(x.dtype, x.shape) for x in seen] == [(torch.uint8, shape)] * 2


def test_batch_of_images(encoder):
    pixels = torch.rand(3, 3, H, W, generator=torch.Generator().manual_seed(0)) * 2 - 1
    stage = LatentPreparation(encoder)
    both = stage(pixels, FRAMES, H, W, seed=5, dtype=torch.float32)
    assert both.latents.shape == (3, 48, 5, H // 16, W // 16)
    assert both.velocity_mask.shape == (1, 1, 5, 1, 1)
    one = stage(pixels[1], FRAMES, H, W, seed=5, dtype=torch.float32)
    torch.testing.assert_close(
        both.condition_latents[1:2], one.condition_latents, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("num_frames", [1, 2, 4, 5, 6, 16, 17, 81, 189])
def test_latent_frames_are_floored_as_in_the_engines(num_frames):
    prepared = LatentPreparation(vae=FakeVae())(Image.new("RGB", (9, 9)), num_frames, 32, 32)
    assert prepared.latents.shape == (1, 4, latent_frames(num_frames), 2, 2)
    assert prepared.velocity_mask.shape == (1, 1, latent_frames(num_frames), 1, 1)


def test_seed_reproduces(encoder, photograph):
    stage = LatentPreparation(encoder)
    first, again = (stage(photograph, FRAMES, H, W, seed=42).latents for _ in range(2))
    other = stage(photograph, FRAMES, H, W, seed=43).latents
    generator = torch.Generator().manual_seed(42)
    by_generator = stage(photograph, FRAMES, H, W, generator=generator)
    assert torch.equal(first, again)
    assert torch.equal(first, by_generator.latents)
    assert not torch.equal(first[:, :, 1:], other[:, :, 1:])
    assert torch.equal(first[:, :, 0], other[:, :, 0])
    # The generator has moved on by exactly one draw of the noise.
    reference = torch.Generator().manual_seed(42)
    torch.randn(first.shape, generator=reference, dtype=first.dtype)
    assert torch.equal(generator.get_state(), reference.get_state())


def test_without_a_seed_the_default_generator_draws(encoder, photograph):
    stage = LatentPreparation(encoder)
    torch.manual_seed(11)
    first = stage(photograph, FRAMES, H, W).latents
    torch.manual_seed(11)
    assert torch.equal(first, stage(photograph, FRAMES, H, W).latents)


@pytest.mark.parametrize(
    ("frames", "encoded"), [((0,), 1), ((0, 1), 5), ((1,), 5), ((3, 0), 13), ((4,), 17)]
)
@pytest.mark.parametrize("given", [1, 7, 30])
def test_only_the_frames_that_matter_reach_the_vae(frames, encoded, given):
    vae = FakeVae()
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(1, 3, given, 32, 48, generator=generator) * 2 - 1
    prepared = LatentPreparation(vae=vae)(pixels, 20, 32, 48, frames, dtype=torch.float32)
    (seen,) = vae.seen
    assert seen.shape == (1, 3, encoded, 32, 48)
    for i in range(encoded):
        assert torch.equal(seen[:, :, i], pixels[:, :, min(i, given - 1)])
    assert prepared.condition_frames == tuple(sorted(frames))
    assert prepared.condition_latents.shape[2] == max(frames) + 1
    for t in range(5):
        fixed = t in frames
        assert prepared.velocity_mask.flatten()[t] == (0.0 if fixed else 1.0)
        if fixed:
            assert torch.equal(prepared.latents[:, :, t], prepared.condition_latents[:, :, t])


def test_an_image_is_repeated_for_later_frames():
    vae = FakeVae()
    LatentPreparation(vae=vae)(Image.new("RGB", (9, 9), (255, 0, 0)), 9, 32, 32, (0, 2))
    (seen,) = vae.seen
    assert seen.shape[2] == 9
    assert torch.equal(seen, seen[:, :, :1].expand_as(seen))


@pytest.mark.parametrize("bad", [math.nan, math.inf, 255.0])
def test_a_corrupted_unused_frame_changes_nothing(vae, encoder, bad):
    clip = torch.rand(1, 3, 9, H, W, generator=torch.Generator().manual_seed(2)) * 2 - 1
    corrupted = clip.clone()
    corrupted[:, :, 5:] = bad
    stage = LatentPreparation(encoder, vae=vae)
    for frames in ((0,), (0, 1)):
        good, same = (stage(x, FRAMES, H, W, frames, seed=0) for x in (clip, corrupted))
        assert torch.equal(good.latents, same.latents)
    with pytest.raises(ValueError, match="float32"):
        stage(corrupted, FRAMES, H, W, (0, 2), seed=0)


def test_mode_follows_what_is_there(vae, encoder, photograph):
    both = LatentPreparation(encoder, vae=vae)
    assert both(photograph, FRAMES, H, W).mode == "fast"
    assert both(photograph, FRAMES, H, W, mode="exact").mode == "exact"
    assert both(photograph, FRAMES, H, W, (0, 1)).mode == "exact"
    assert both(photograph, FRAMES, H, W, (1,)).mode == "exact"
    assert LatentPreparation(vae=vae)(photograph, FRAMES, H, W).mode == "exact"


@pytest.mark.parametrize(
    ("frames", "given"), [((0, 1), 9), ((0, 1), 2), ((2,), 30), ((2, 0), 1), ((0,), 9)]
)
def test_a_clip_encoder_serves_every_frame(vae, frames, given):
    pixels = torch.rand(1, 3, given, H, W, generator=torch.Generator().manual_seed(6)) * 2 - 1
    stage = LatentPreparation(ClipEncoder.from_vae(vae, probe=False), vae=vae)
    fast, exact = (
        stage(pixels, FRAMES, H, W, frames, seed=4, dtype=torch.float32, mode=mode)
        for mode in (None, "exact")
    )
    assert (fast.mode, exact.mode) == ("fast", "exact")
    assert fast.condition_frames == exact.condition_frames
    assert fast.condition_latents.shape == exact.condition_latents.shape
    error = relative_error(fast.condition_latents, exact.condition_latents)
    assert error <= FLOAT32_BOUND
    for t in range(fast.latents.shape[2]):
        ours, theirs = fast.latents[:, :, t], exact.latents[:, :, t]
        if t in frames:
            assert torch.equal(ours, fast.condition_latents[:, :, t])
        else:
            assert torch.equal(ours, theirs)
    assert torch.equal(fast.velocity_mask, exact.velocity_mask)


def test_a_clip_encoder_needs_no_vae(vae, clip, photograph):
    encoder = ClipEncoder.from_vae(vae, dtype=torch.bfloat16, probe=False)
    stage = LatentPreparation(encoder)
    prepared = stage(clip, FRAMES, H, W, (0, 1, 2), seed=0)
    assert prepared.mode == "fast"
    assert prepared.latents.dtype == torch.bfloat16
    pixels = load_pixels(clip, H, W).to(torch.bfloat16)
    assert torch.equal(prepared.latents[:, :, :3], encoder(pixels))
    of_image = stage(photograph, FRAMES, H, W, seed=0)
    of_frame = LatentPreparation(encoder.first)(photograph, FRAMES, H, W, seed=0)
    assert torch.equal(of_image.latents, of_frame.latents)
    with pytest.raises(ValueError, match="mode='exact' needs a vae"):
        stage(clip, FRAMES, H, W, (0, 1), mode="exact")


def test_the_first_frame_of_a_clip_is_served_fast(encoder, clip):
    stage = LatentPreparation(encoder)
    of_clip = stage(clip, FRAMES, H, W, seed=0)
    of_frame = stage(clip[0], FRAMES, H, W, seed=0)
    assert of_clip.mode == "fast"
    assert torch.equal(of_clip.latents, of_frame.latents)


def test_results_have_no_gradient_and_are_frozen(encoder, photograph):
    encoder = FrameEncoder.from_vae(synthetic_vae(CONFIG, 3, 4)).requires_grad_(True)
    prepared = LatentPreparation(encoder)(photograph, FRAMES, H, W)
    assert isinstance(prepared, PreparedLatents)
    assert not prepared.latents.requires_grad
    assert not prepared.condition_latents.requires_grad
    with pytest.raises(dataclasses.FrozenInstanceError):
        prepared.mode = "exact"


def test_an_encoder_in_another_dtype_casts_pixels(vae, photograph):
    encoder = FrameEncoder.from_vae(vae, dtype=torch.bfloat16)
    prepared = LatentPreparation(encoder)(photograph, FRAMES, H, W, seed=0, dtype=torch.float32)
    assert prepared.latents.dtype == torch.float32
    assert prepared.latents.isfinite().all()


class UntouchedEncoder:
    """Fails the test if anything is encoded."""

    z_dim, spatial_factor = 48, 16
    dtype, device = torch.float32, torch.device("cpu")

    def __call__(self, pixels):
        raise AssertionError("encoded before all arguments were checked")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_frames": 0}, "num_frames must be a positive integer, got 0"),
        ({"num_frames": 17.0}, r"num_frames must be a positive integer, got 17\.0"),
        ({"num_frames": True}, "num_frames must be a positive integer, got True"),
        ({"height": 72}, "height must be a multiple of .* 16, got 72"),
        ({"width": 100}, "width must be a multiple of .* 16, got 100"),
        ({"height": -16}, "height must be a positive integer, got -16"),
        ({"condition_frames": (5,)}, r"in \[0, 5\) for num_frames=17, got 5"),
        ({"condition_frames": (0, -1)}, r"in \[0, 5\) for num_frames=17, got -1"),
        ({"condition_frames": (0, 0)}, r"distinct, got \[0, 0\]"),
        ({"condition_frames": ()}, r"non-empty sequence of integers, got \(\)"),
        ({"condition_frames": 0}, "sequence of integers, got 0 of type int"),
        ({"condition_frames": "0"}, "sequence of integers, got '0' of type str"),
        ({"condition_frames": (0.0,)}, "sequence of integers"),
        ({"condition_frames": (0, 1)}, r"\[0, 1\] need a ClipEncoder or the VAE itself"),
        (
            {"condition_frames": (1,), "mode": "fast"},
            r"serves .*\[0\] only, got \[1\]: give a Clip",
        ),
        ({"mode": "exact"}, "mode='exact' needs a vae"),
        ({"mode": "quick"}, "mode must be 'fast', 'exact' or None, got 'quick'"),
        ({"seed": 1, "generator": torch.Generator()}, "seed or generator, not both"),
        ({"seed": 1.5}, r"seed must be an integer .*, got 1\.5"),
        ({"seed": 2**64}, "seed must be an integer"),
        ({"seed": -(2**63) - 1}, "seed must be an integer"),
        ({"dtype": torch.int32}, r"dtype must be one of float32, .* on cpu, got torch\.int32"),
        ({"dtype": "bfloat16"}, "dtype must be one of .*, got bfloat16"),
        ({"image_or_clip": torch.zeros(3, H, W + 16)}, "height and width must be 64x96"),
        ({"image_or_clip": torch.full((3, H, W), 9.0)}, r"must be in \[-1,1\]"),
    ],
)
def test_wrong_arguments(arguments, message):
    generator = arguments.setdefault("generator", torch.Generator().manual_seed(3))
    if "seed" in arguments and "not both" not in message:
        arguments["generator"] = None
    before = generator.get_state()
    image = arguments.pop("image_or_clip", Image.new("RGB", (8, 8)))
    stage = LatentPreparation(UntouchedEncoder())
    with pytest.raises(ValueError, match=message):
        stage(image, **{"num_frames": FRAMES, "height": H, "width": W, **arguments})
    assert torch.equal(generator.get_state(), before)


def test_wrong_generators():
    stage = LatentPreparation(UntouchedEncoder())
    image = Image.new("RGB", (8, 8))
    with pytest.raises(TypeError, match=r"generator must be a torch\.Generator, got int"):
        stage(image, FRAMES, H, W, generator=3)
    elsewhere = LatentPreparation(UntouchedEncoder())
    elsewhere.encoder.device = torch.device("meta")
    with pytest.raises(
        ValueError, match=r"generator must be on the encoder's device meta, got .*cpu"
    ):
        elsewhere(image, FRAMES, H, W, generator=torch.Generator("cpu"))


def test_fast_by_name_without_an_encoder():
    with pytest.raises(ValueError, match="mode='fast' needs an encoder"):
        LatentPreparation(vae=FakeVae())(Image.new("RGB", (8, 8)), 5, 32, 32, mode="fast")


def test_neither_encoder_nor_vae():
    with pytest.raises(ValueError, match="needs an encoder, a vae, or both; got neither"):
        LatentPreparation()


def test_encoder_and_vae_that_disagree():
    with pytest.raises(ValueError, match=r"must agree .*\(48, 16\) and \(4, 16\)"):
        LatentPreparation(UntouchedEncoder(), vae=FakeVae())


def test_the_noise_itself_becomes_the_latents(encoder, photograph, monkeypatch):
    """Only its conditioned frames are written: no second tensor of that size."""
    written = []
    in_place = latents_module.ops.prepare_latents_

    def record(condition, noise, frames):
        written.append(noise)
        return in_place(condition, noise, frames)

    monkeypatch.setattr(latents_module.ops, "prepare_latents_", record)
    prepared = LatentPreparation(encoder)(photograph, FRAMES, H, W, seed=1)
    assert prepared.latents is written[0]
    noise = torch.randn(
        prepared.latents.shape, generator=torch.Generator().manual_seed(1), dtype=torch.bfloat16
    )
    assert torch.equal(prepared.latents[:, :, 1:], noise[:, :, 1:])
    assert torch.equal(prepared.latents[:, :, :1], prepared.condition_latents)
