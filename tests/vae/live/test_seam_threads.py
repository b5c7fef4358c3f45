"""`refresh`, `restore`, changes of mode beside running calls: each call sees one state, whole."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from cosmos3_fast import accelerate, refresh, restore
from cosmos3_fast.vae.live import seam
from cosmos3_fast.vae.live.announce import wanted_frames
from cosmos3_fast.vae.live.exact import as_in_clip
from cosmos3_fast.vae.live.parts import EncoderPart
from cosmos3_fast.vae.live.seam import last_encoding
from cosmos3_fast.vae.synthetic import COSMOS3_VAE_CONFIG, synthetic_vae

pytest.importorskip("diffusers")

SECONDS = 60.0


@pytest.fixture
def vae() -> Any:
    config = {**COSMOS3_VAE_CONFIG, "base_dim": 8, "z_dim": 4, "num_res_blocks": 1}
    return synthetic_vae(config, 0, decoder_base_dim=8).requires_grad_(False).eval()


def pixels(frames: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(1, 3, frames, 32, 32, generator=generator, dtype=torch.float32) * 2 - 1


def parameters(vae: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return vae.encode(x).latent_dist.parameters


def in_a_thread(run: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    results: list[Any] = []

    def target() -> None:
        try:
            results.append(run())
        except BaseException as error:  # what the test is to see
            results.append(error)

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    return thread, results


def to_exact(vae: Any) -> None:
    accelerate(vae, "exact")


@pytest.mark.parametrize("event", [refresh, restore, to_exact, accelerate])
def test_an_event_inside_a_call(vae: Any, event: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The call ends as it began."""
    accelerate(vae)
    wanted = parameters(vae, pixels())
    call = EncoderPart._call

    def call_and_be_disturbed(self: Any, network: Any, x: torch.Tensor) -> torch.Tensor:
        monkeypatch.setattr(EncoderPart, "_call", call)
        event(vae)
        return call(self, network, x)

    monkeypatch.setattr(EncoderPart, "_call", call_and_be_disturbed)
    assert torch.equal(parameters(vae, pixels()), wanted)


def test_events_beside_many_calls(vae: Any) -> None:
    """Every result is the folded network's or the VAE's own, and nothing is raised."""
    x, z = pixels(), torch.zeros(1, 4, 1, 2, 2)
    own = parameters(vae, x), vae.decode(z).sample
    accelerate(vae)
    fast = parameters(vae, x), vae.decode(z).sample
    over = threading.Event()

    def encode() -> int:
        calls = 0
        while not over.is_set():
            found = parameters(vae, x), vae.decode(z).sample
            for ours, a, b in zip(found, own, fast, strict=True):
                assert torch.equal(ours, a) or torch.equal(ours, b)
            calls += 1
        return calls

    thread, results = in_a_thread(encode)
    for event in [refresh, to_exact, accelerate, restore, accelerate] * 4:
        event(vae)
    over.set()
    thread.join(SECONDS)
    assert isinstance(results[0], int), results
    assert results[0] > 0


@pytest.fixture
def paused(vae: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A thread in the middle of the exact encode of a clip's first two latent frames of three."""
    accelerate(vae, clips=False)
    inside, go_on = threading.Event(), threading.Event()
    encode = type(vae)._encode

    def pausing(self: Any, x: torch.Tensor) -> torch.Tensor:
        if threading.current_thread() is not threading.main_thread() and not inside.is_set():
            inside.set()
            assert go_on.wait(SECONDS)
        return encode(self, x)

    monkeypatch.setattr(type(vae), "_encode", pausing)

    def encode_head() -> torch.Tensor:
        with wanted_frames(2):
            return parameters(vae, pixels(9))

    thread, results = in_a_thread(encode_head)
    assert inside.wait(SECONDS)

    def finish() -> torch.Tensor:
        go_on.set()
        thread.join(SECONDS)
        return results[0]

    yield finish
    finish()


def test_a_frame_beside_a_clip_is_fast(
    vae: Any, paused: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """What exact mode hooks for the clip is no reason against the folded network."""
    with caplog.at_level(logging.WARNING, seam.logger.name):
        ours = parameters(vae, pixels(9)[:, :, :1])
    assert last_encoding(vae).path == "fast"
    assert not caplog.records
    head = paused()
    assert last_encoding(vae).path == "exact"
    restore(vae)
    wanted = parameters(vae, pixels(9))
    assert torch.equal(head[:, :, :2], wanted[:, :, :2])
    assert (ours - wanted[:, :, :1]).abs().max() <= 1e-5 * wanted.abs().max()


def test_own_code_waits_for_own_code_whatever_the_mode(vae: Any, paused: Any) -> None:
    """It keeps its caches on the VAE."""
    accelerate(vae, "exact")
    thread, results = in_a_thread(lambda: parameters(vae, pixels(9)))
    thread.join(0.2)
    assert results == []
    head = paused()
    thread.join(SECONDS)
    restore(vae)
    wanted = parameters(vae, pixels(9))
    assert torch.equal(head[:, :, :2], wanted[:, :, :2])
    assert torch.equal(results[0], wanted)


def test_the_beginning_of_a_clip_does_not_cut_clips_of_other_threads(vae: Any) -> None:
    wanted = parameters(vae, pixels(9))
    with as_in_clip(vae, pixels(5), 3):
        thread, results = in_a_thread(lambda: parameters(vae, pixels(9)))
        thread.join(SECONDS)
    assert torch.equal(results[0], wanted)


def test_networks_are_freed_with_what_they_were_made_for(vae: Any) -> None:
    """By their reference counts: on a GPU their memory is wanted back at once."""
    networks = weakref.WeakSet()
    call = EncoderPart._call

    def remembering(self: Any, network: Any, x: torch.Tensor) -> torch.Tensor:
        networks.add(network)
        return call(self, network, x)

    accelerate(vae)
    EncoderPart._call = remembering
    try:
        parameters(vae, pixels())
    finally:
        EncoderPart._call = call
    assert len(networks) == 1
    gc.collect()
    gc.disable()
    try:
        restore(vae)
        assert len(networks) == 0
    finally:
        gc.enable()
