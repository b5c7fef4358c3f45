"""What the networks' tests need of diffusers."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def attention_in_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers 0.42 hands its cache to attention blocks in down_blocks, which do not take it."""
    pytest.importorskip("diffusers")
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock

    forward = WanAttentionBlock.forward
    monkeypatch.setattr(WanAttentionBlock, "forward", lambda self, x, **cache: forward(self, x))


@pytest.fixture
def upsamples_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """The VAEs up-sample in float32, which a float64 run would round to."""
    pytest.importorskip("diffusers")
    from diffusers.models.autoencoders import autoencoder_kl_qwenimage, autoencoder_kl_wan

    for upsample in (autoencoder_kl_wan.WanUpsample, autoencoder_kl_qwenimage.QwenImageUpsample):
        monkeypatch.setattr(upsample, "forward", torch.nn.Upsample.forward)
