"""The self-test that decides about releases of diffusers which the tests have not run on."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from diffusers import Cosmos3OmniPipeline
from tiny_pipeline import generate, make_inputs, make_modular, make_pipe

from cosmos3_fast.acceleration import accelerate, last_encoding
from cosmos3_fast.engines import diffusers as engine
from cosmos3_fast.engines import releases
from cosmos3_fast.vae.live import seam


@pytest.fixture(autouse=True)
def untested(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers as a release that nobody has tried."""
    monkeypatch.setitem(releases.TESTED, "diffusers", ("0.0.1",))
    monkeypatch.setattr(engine, "_gates", {})
    monkeypatch.delenv(releases.TRUST_VARIABLE, raising=False)


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("make", [make_pipe, make_modular])
def test_this_release_passes_and_leaves_no_trace(
    make: Any, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, releases.__name__)
    pipe = make()
    vae, before = pipe.vae, torch.get_rng_state()
    accelerate(pipe, mode)
    assert pipe.vae is vae
    assert torch.equal(torch.get_rng_state(), before)
    assert "passed the self-test in" in caplog.text
    generate(pipe, make_inputs("v2v"))
    encoding = last_encoding(pipe)
    assert (encoding.path, encoding.pixel_frames) == (mode, 5)


@pytest.mark.parametrize(
    ("method", "fault", "reason"),
    [
        (
            "_encode_video",
            lambda own: lambda self, x: own(self, x) * (1 + seam.is_accelerated(self.vae)),
            "image to video: result.returned[0] has other values",
        ),
        ("_encode_video", lambda own: lambda self, x: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_an_engine_that_is_not_as_it_was_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    method: str,
    fault: Any,
    reason: str,
) -> None:
    pipe = make_pipe()
    own = getattr(Cosmos3OmniPipeline, method)
    monkeypatch.setattr(Cosmos3OmniPipeline, method, fault(own))
    assert accelerate(pipe, "exact") is pipe
    assert not seam.is_accelerated(pipe.vae)
    (warning,) = [r.getMessage() for r in caplog.records if r.name == releases.__name__]
    assert reason in warning
    assert "COSMOS3_FAST_TRUST=1" in warning


def test_the_users_word_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(releases.TRUST_VARIABLE, "1")
    monkeypatch.setattr(engine, "_self_test", lambda *_: pytest.fail("it was asked"))
    assert seam.is_accelerated(accelerate(make_pipe()).vae)
