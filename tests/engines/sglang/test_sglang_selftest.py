"""The self-test that decides about releases of SGLang which the tests have not run on."""

from __future__ import annotations

import logging

import pytest
import torch
from sglang_engine import Cosmos3LatentPreparationStage, make_stage, make_vae, patched

from cosmos3_fast.engines import releases
from cosmos3_fast.engines import sglang as engine
from cosmos3_fast.vae.live import seam
from cosmos3_fast.vae.live.paths import Choice


@pytest.fixture
def untested(monkeypatch):
    """SGLang as a release that nobody has tried."""
    monkeypatch.setitem(releases.TESTED, "sglang", ("0.0.1",))
    monkeypatch.delenv(releases.TRUST_VARIABLE, raising=False)


def accelerates(mode: str) -> bool:
    with patched(mode):
        stage = make_stage(make_vae(base_dim=8))
        return seam.is_accelerated(stage.vae)


@pytest.mark.parametrize("mode", ["exact", "fast", "fast,clips"])
def test_this_release_passes_and_leaves_no_trace(untested, mode, caplog):
    caplog.set_level(logging.INFO, releases.logger.name)
    choice = Choice(mode.partition(",")[0], clips=mode == "fast,clips")
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with patched(mode):
        stage = make_stage(make_vae(base_dim=8))
        caplog.clear()
        torch.set_rng_state(before)
        assert engine._self_test(stage, choice) is None
        assert torch.equal(torch.get_rng_state(), before)
        assert seam.choice_of(stage.vae) == choice
    assert accelerates(mode)
    assert "passed the self-test in" in caplog.text


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize(
    ("method", "fault", "reason"),
    [
        # Another normalisation of what the VAE gives, where it is cut short.
        (
            "_vae_encode",
            lambda own: lambda self, video: own(self, video) * (1 + seam.is_accelerated(self.vae)),
            "result.latents",
        ),
        # Latent frames that nobody is conditioned on are used all the same.
        (
            "_vae_encode",
            lambda own: (
                lambda self, video: own(self, video).mean(2, True).expand(-1, -1, 3, -1, -1)
            ),
            "result.latents",
        ),
        ("forward", lambda own: lambda self, batch, args: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_an_engine_that_is_not_as_it_was_is_left_alone(
    untested, monkeypatch, caplog, mode, method, fault, reason
):
    own = vars(Cosmos3LatentPreparationStage)[method]
    monkeypatch.setattr(Cosmos3LatentPreparationStage, method, fault(own))
    assert not accelerates(mode)
    (warning,) = [r.getMessage() for r in caplog.records if r.name == releases.logger.name]
    assert reason in warning
    assert "tested releases: 0.0.1" in warning
    assert "COSMOS3_FAST_TRUST=1" in warning


def test_the_users_word_counts(untested, monkeypatch):
    monkeypatch.setenv(releases.TRUST_VARIABLE, "1")
    monkeypatch.setattr(engine, "_self_test", lambda *_: pytest.fail("it was asked"))
    assert accelerates("exact")
