"""What the encoders' tests need of diffusers."""

from __future__ import annotations

import pytest


@pytest.fixture
def attention_in_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers 0.42 hands its cache to attention blocks in down_blocks, which do not take it."""
    pytest.importorskip("diffusers")
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock

    forward = WanAttentionBlock.forward
    monkeypatch.setattr(WanAttentionBlock, "forward", lambda self, x, **cache: forward(self, x))
