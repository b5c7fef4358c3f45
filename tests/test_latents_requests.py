"""Requests: batches, seeds of each sample, the noise's device, and VAEs of other structure."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from cosmos3_fast.latents import LatentPreparation
from cosmos3_fast.vae import FrameEncoder
from cosmos3_fast.vae.synthetic import synthetic_config, synthetic_state_dict

H, W, FRAMES = 32, 48, 9
CONFIG = synthetic_config(
    {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "is_residual": True,
     "patch_size": 2, "in_channels": 12, "temperal_downsample": [False, True, True]}
)  # fmt: skip


@pytest.fixture(scope="module")
def encoder():
    return FrameEncoder.from_state_dict(synthetic_state_dict(CONFIG), CONFIG, torch.float32)


@pytest.fixture(scope="module")
def stage(encoder):
    return LatentPreparation(encoder)


IMAGES = np.random.default_rng(0).integers(0, 256, (3, H, W, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind", ["list", "array", "tensor", "floats"])
def test_each_sample_equals_its_own_run(stage, kind):
    floats = torch.from_numpy(IMAGES).permute(0, 3, 1, 2).float() / 127.5 - 1
    batch = {
        "list": [Image.fromarray(image) for image in IMAGES],
        "array": IMAGES,
        "tensor": torch.from_numpy(IMAGES),
        "floats": floats,
    }[kind]
    seeds = [7, 1, 7]
    together = stage(batch, FRAMES, H, W, batch=True, seed=seeds)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    again = stage(batch, FRAMES, H, W, batch=True, generator=generators)
    assert torch.equal(together.latents, again.latents)
    assert together.latents.shape == (3, 4, 3, 2, 3)
    for i, seed in enumerate(seeds):
        alone = stage(IMAGES[i], FRAMES, H, W, seed=seed)
        assert torch.equal(together.latents[i : i + 1], alone.latents)
        assert torch.equal(together.condition_latents[i : i + 1], alone.condition_latents)


def test_one_seed_draws_the_noise_of_the_batch_at_once(stage):
    prepared = stage(IMAGES, FRAMES, H, W, batch=True, seed=3, dtype=torch.float32)
    noise = torch.randn(prepared.latents.shape, generator=torch.Generator().manual_seed(3))
    assert torch.equal(prepared.latents[:, :, 1:], noise[:, :, 1:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": [1, 2]}, "one per sample: got 2 for 3 samples"),
        ({"seed": []}, "got none"),
        ({"generator": []}, "got none"),
        ({"seed": [1, 2, "3"]}, "seed must be an integer .*, got '3'"),
        ({"image_or_clip": []}, "must with batch=True be a non-empty list"),
        ({"image_or_clip": "photo.png"}, "must with batch=True be a non-empty list"),
    ],
)
def test_wrong_batches(stage, arguments, message):
    given = {"image_or_clip": IMAGES, "batch": True, **arguments}
    with pytest.raises(ValueError, match=message):
        stage(given.pop("image_or_clip"), FRAMES, H, W, **given)


def test_a_list_without_batch_is_a_clip(stage):
    clip = stage(list(IMAGES), FRAMES, H, W, seed=0)
    assert torch.equal(clip.latents, stage(IMAGES[0], FRAMES, H, W, seed=0).latents)
    last = stage(list(IMAGES), FRAMES, H, W, seed=0, keep="last")
    assert torch.equal(last.latents, stage(IMAGES[2], FRAMES, H, W, seed=0).latents)


def test_the_noise_has_a_device_of_its_own(stage):
    plain = stage(IMAGES[0], FRAMES, H, W, seed=5)
    same = stage(IMAGES[0], FRAMES, H, W, seed=5, noise_device="cpu")
    assert torch.equal(plain.latents, same.latents)
    elsewhere = SimpleNamespace(z_dim=4, spatial_factor=16, device=torch.device("meta"))
    with pytest.raises(ValueError, match="noise_device='cpu'"):
        LatentPreparation(elsewhere)(IMAGES[0], FRAMES, H, W, generator=torch.Generator())


def test_numbers_of_numpy(stage):
    wanted = stage(IMAGES[0], FRAMES, H, W, seed=5)
    numbers = (np.int64(FRAMES), np.int32(H), np.array(W), np.array([0]))
    got = stage(IMAGES[0], *numbers, seed=np.int64(5))
    assert torch.equal(got.latents, wanted.latents)
    assert got.condition_frames == (0,)


def test_a_length_that_is_rounded_down_is_told_once(stage):
    with pytest.warns(UserWarning, match=r"num_frames=12 is not 1 \+ 4k: .* of 9 frames") as caught:
        assert stage(IMAGES[0], 12, H, W, seed=5).latents.shape[2] == 3
    assert len(caught) == 1


def test_a_vae_in_the_encoders_place():
    vae = SimpleNamespace(config=SimpleNamespace(z_dim=4), z_dim=4, encode=None)
    with pytest.raises(ValueError, match=r"encoder must be .* got SimpleNamespace: give a VAE as"):
        LatentPreparation(vae)


def test_factors_are_those_of_the_structure():
    diffusers = pytest.importorskip("diffusers")
    vae = diffusers.AutoencoderKLQwenImage(base_dim=8, num_res_blocks=1)
    stage = LatentPreparation(vae=vae)
    assert (stage.spatial_factor, stage.temporal_factor) == (8, 4)
    prepared = stage(IMAGES[0], 1, H, W, seed=0)
    assert prepared.latents.shape == (1, 16, 1, H // 8, W // 8)


def test_a_compiled_vae_is_folded():
    diffusers = pytest.importorskip("diffusers")
    vae = diffusers.AutoencoderKLWan(**CONFIG, decoder_base_dim=8, out_channels=12).eval()
    wanted = FrameEncoder.from_vae(vae).state_dict()
    got = FrameEncoder.from_vae(torch.compile(vae)).state_dict()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    vae.encoder = torch.compile(vae.encoder)
    with pytest.raises(ValueError, match=r"vae\.encoder must not be compiled"):
        FrameEncoder.from_vae(vae)


def test_autocast_and_defaults_change_nothing(encoder, stage):
    wanted = stage(IMAGES[0], FRAMES, H, W, seed=5)
    with torch.autocast("cpu", torch.bfloat16):
        assert encoder(torch.zeros(1, 3, H, W)).dtype == torch.float32
        assert torch.equal(stage(IMAGES[0], FRAMES, H, W, seed=5).latents, wanted.latents)
    with torch.device("meta"):
        folded = FrameEncoder.from_state_dict(synthetic_state_dict_on_cpu(), CONFIG)
        prepared = LatentPreparation(folded)(IMAGES[0], FRAMES, H, W, seed=5)
    assert torch.equal(prepared.latents, wanted.latents)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(stage(IMAGES[0], FRAMES, H, W, seed=5).latents, wanted.latents)
    finally:
        torch.set_default_dtype(torch.float32)


def synthetic_state_dict_on_cpu():
    with torch.device("cpu"):
        return synthetic_state_dict(CONFIG)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 255.0])
def test_the_encoder_refuses_what_is_no_picture(encoder, bad):
    pixels = torch.zeros(1, 3, H, W)
    pixels[0, 1, 2, 3] = bad
    with pytest.raises(ValueError, match=r"pixels must be in \[-1, 1\], got values"):
        encoder(pixels)
    assert encoder(torch.full((1, 3, H, W), 1.2)).isfinite().all()


def test_winograd_can_be_switched_off(encoder):
    pixels = torch.rand(1, 3, 128, 128) * 2 - 1
    direct = FrameEncoder.from_state_dict(synthetic_state_dict(CONFIG), CONFIG, winograd=False)
    convolutions = [m for m in direct.modules() if hasattr(m, "winograd")]
    assert convolutions
    assert not any(m.winograd for m in convolutions)
    error = (direct(pixels) - encoder(pixels)).abs().max() / encoder(pixels).abs().max()
    assert error <= 1e-5  # the bound of float32 (`vae/verify.py`)
