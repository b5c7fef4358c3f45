"""A VAE in any form: its networks are the same, and so is its hash as far as it can be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoint_files import write_checkpoint
from encoder_cases import TINY_CLIP

from cosmos3_fast.vae import ClipEncoder, FrameDecoder, FrameEncoder, synthetic
from cosmos3_fast.vae.source import VaeSource, compute_dtype

CONFIG = {**TINY_CLIP, "decoder_base_dim": 8}
CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tensors = synthetic.synthetic_state_dict(CONFIG) | synthetic.synthetic_decoder_state_dict(
        CONFIG
    )
    write_checkpoint(tmp_path / "vae", CONFIG, tensors)
    return tmp_path


def test_every_form_gives_the_same_networks(folder: Path):
    live = synthetic.synthetic_vae(CONFIG, decoder_base_dim=None)
    sources = [VaeSource(folder), VaeSource(str(folder / "vae")), VaeSource(live)]
    clip = VaeSource(folder).encoder(torch.float32, CPU, clips=True)
    assert isinstance(clip, ClipEncoder)
    sources.append(VaeSource(clip))
    pixels = torch.rand(1, 3, 5, 16, 24) * 2 - 1
    for source in sources:
        encoder = source.encoder(torch.float32, CPU, clips=False)
        assert isinstance(encoder, FrameEncoder)
        assert torch.equal(encoder(pixels[:, :, 0]), clip.first(pixels[:, :, 0]))
        assert torch.equal(source.encoder(torch.float32, CPU, clips=True)(pixels), clip(pixels))
    latents = torch.randn(1, 4, 2, 3)
    wanted = VaeSource(live).decoder(torch.float32, CPU)(latents)
    assert isinstance(VaeSource(folder).decoder(torch.float32, CPU), FrameDecoder)
    assert torch.equal(VaeSource(folder).decoder(torch.float32, CPU)(latents), wanted)
    clip_latents = torch.randn(1, 4, 3, 2, 3)
    videos = [
        VaeSource(vae).decoder(torch.float32, CPU, clips=True)(clip_latents)
        for vae in (folder, live)
    ]
    assert videos[0].shape[2] == 9
    assert torch.equal(*videos)


@pytest.mark.parametrize("clips", [False, True])
def test_a_checkpoint_and_the_live_vae_have_one_hash(folder: Path, clips: bool):
    live = synthetic.synthetic_vae(CONFIG, decoder_base_dim=None)
    found = VaeSource(live).fingerprint(clips)
    assert VaeSource(folder).fingerprint(clips) == found
    assert found != VaeSource(live).fingerprint(not clips)
    with torch.no_grad():
        live.encoder.conv_in.weight[:, :, 0] += 1  # the earliest tap
    assert (VaeSource(live).fingerprint(clips) == found) is not clips
    with torch.no_grad():
        live.encoder.conv_in.weight[:, :, -1] += 1
    assert VaeSource(live).fingerprint(clips) != found


def test_what_a_form_does_not_hold_is_refused(folder: Path):
    encoder = VaeSource(folder).encoder(torch.float32, CPU, clips=False)
    source = VaeSource(encoder)
    with pytest.raises(ValueError, match="must have a decoder to show latents, got a FrameEncoder"):
        source.decoder(torch.float32, CPU)
    with pytest.raises(ValueError, match="must be the VAE itself in exact mode"):
        source.live(torch.float32, CPU)
    with pytest.raises(ValueError, match="must be a ClipEncoder to encode clips"):
        source.encoder(torch.float32, CPU, clips=True)
    with pytest.raises(TypeError, match=r"vae must be a checkpoint's path .* got int"):
        VaeSource(3)


def test_names(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder)
    assert str(VaeSource()) == "synthetic (random weights, seed 0)"
    assert VaeSource("vae").absolute() == VaeSource(str(folder / "vae"))
    assert VaeSource("nvidia/some-repository").absolute() == VaeSource("nvidia/some-repository")
    assert str(VaeSource(synthetic.synthetic_vae(CONFIG))) == "AutoencoderKLWan"


def test_default_dtypes():
    assert compute_dtype(None, CPU) == torch.float32
    assert compute_dtype(None, torch.device("cuda")) == torch.bfloat16
    assert compute_dtype(torch.float16, CPU) == torch.float16
