"""Releases whose image-to-video encodes the image `num_frames` times; of which it uses one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from omni_pipeline import (
    ENCODES_ALL_FRAMES,
    FRAMES,
    HEIGHT,
    WIDTH,
    EnginePipeline,
    clip,
    frames_through,
    make_pipeline,
    make_vae,
    registered,
)
from torch import Tensor

from cosmos3_fast.engines import releases
from cosmos3_fast.engines import vllm_omni as adapter
from cosmos3_fast.frames import latent_frames, pixel_frames
from cosmos3_fast.vae.live import seam
from cosmos3_fast.vae.verify import FLOAT32_BOUND, largest, relative_error

pytestmark = pytest.mark.skipif(
    not ENCODES_ALL_FRAMES, reason="this release's image-to-video encodes one frame"
)

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def nothing_to_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EnginePipeline, "load_weights", lambda self, weights: set())


class Inheriting(EnginePipeline):
    pass


class Overriding(EnginePipeline):
    def load_weights(self, weights: Any) -> set[str]:
        return super().load_weights(weights)

    def _prepare_latents_i2v(self, *args: Any, **kwargs: Any) -> Any:
        return super()._prepare_latents_i2v(*args, **kwargs)


def load(vae: Any, cls: type = EnginePipeline) -> Any:
    """A pipeline around a copy of the VAE, as the engine's loader leaves it."""
    pipeline = make_pipeline(cls, copy.deepcopy(vae))
    pipeline.load_weights([])
    return pipeline


def image_to_video(
    pipeline: Any, num_frames: int = FRAMES, height: int = HEIGHT, width: int = WIDTH
) -> tuple[tuple[Tensor, ...], list[int]]:
    """Latents, velocity mask, condition and the generator's state; frames of each `conv_in`."""
    generator = torch.Generator().manual_seed(7)
    image = clip(1, 3, height, width)[:, :, 0]
    with torch.inference_mode(), frames_through(pipeline.vae) as calls:
        left = pipeline._prepare_latents_i2v(image, height, width, num_frames, generator)
    return (*left, generator.get_state()), calls


def action(pipeline: Any, mode: str) -> tuple[tuple[Tensor, ...], list[int]]:
    generator = torch.Generator().manual_seed(7)
    size = HEIGHT, WIDTH, FRAMES
    with torch.inference_mode(), frames_through(pipeline.vae) as calls:
        left = pipeline._prepare_latents_action_video(clip(FRAMES), mode, *size, generator)
    return (*left, generator.get_state()), calls


def assert_equal(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    """In every bit but the sign of a zero."""
    for ours, theirs in zip(got, wanted, strict=True):
        assert torch.equal(ours, theirs)
        assert (ours.dtype, ours.stride()) == (theirs.dtype, theirs.stride())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_frames", [1, 2, 5, 9, 12, 17])
@pytest.mark.parametrize("cls", [EnginePipeline, Inheriting, Overriding])
def test_exact_bit_for_bit(cls: type, num_frames: int, dtype: torch.dtype) -> None:
    vae = make_vae(dtype, seed=num_frames)
    wanted, own_calls = image_to_video(load(vae, cls), num_frames)
    assert sum(own_calls) == pixel_frames(latent_frames(num_frames))
    with registered("exact"):
        got, calls = image_to_video(load(vae, cls), num_frames)
    assert calls == [1]
    assert_equal(got, wanted)
    assert largest(wanted[2]) > 0.1


@pytest.mark.parametrize("size", [(16, 32), (64, 64), (48, 80), (96, 160)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_at_other_sizes(dtype: torch.dtype, size: tuple[int, int]) -> None:
    vae = make_vae(dtype, seed=2)
    wanted, _ = image_to_video(load(vae), FRAMES, *size)
    with registered("exact"):
        got, calls = image_to_video(load(vae), FRAMES, *size)
    assert calls == [1]
    assert_equal(got, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_in_tiles(dtype: torch.dtype) -> None:
    vae = make_vae(dtype)
    vae.enable_tiling(32, 32, 32, 32)
    wanted, own_calls = image_to_video(load(vae), FRAMES, 48, 80)
    with registered("exact"):
        got, calls = image_to_video(load(vae), FRAMES, 48, 80)
    tiles = 2
    assert (sum(calls), sum(own_calls)) == (tiles, tiles * FRAMES)
    assert_equal(got, wanted)


@pytest.mark.parametrize("num_frames", [1, 5, 17])
@pytest.mark.parametrize("cls", [EnginePipeline, Inheriting, Overriding])
def test_fast(cls: type, num_frames: int) -> None:
    vae = make_vae()
    wanted, _ = image_to_video(load(vae, cls), num_frames)
    with registered("fast"):
        got, calls = image_to_video(load(vae, cls), num_frames)
    assert calls == []
    assert 0 < relative_error(got[2], wanted[2]) <= FLOAT32_BOUND
    assert relative_error(got[0][:, :, :1], wanted[0][:, :, :1]) <= FLOAT32_BOUND
    assert_equal((got[0][:, :, 1:], got[1], got[3]), (wanted[0][:, :, 1:], wanted[1], wanted[3]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["policy", "forward_dynamics", "inverse_dynamics"])
@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_actions_are_the_engines(mode: str, name: str, dtype: torch.dtype) -> None:
    """All latents of the clip, which its caller reads too."""
    vae = make_vae(dtype)
    wanted, _ = action(load(vae), name)
    with registered(mode):
        got, calls = action(load(vae), name)
    assert sum(calls) == FRAMES
    assert_equal(got, wanted)


def test_off_is_the_engine() -> None:
    vae = make_vae()
    wanted, own_calls = image_to_video(load(vae))
    with registered("off"):
        got, calls = image_to_video(load(vae))
    assert calls == own_calls
    assert_equal(got, wanted)


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_what_the_gate_refuses_is_the_engines(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An untested release in which image-to-video uses another latent frame too."""
    own = EnginePipeline._prepare_latents_i2v

    def changed(self: Any, image: Tensor, height: int, width: int, *rest: Any) -> Any:
        last = self._encode_conditioning_video(image, rest[0], height, width)[:, :, -1:]
        return *own(self, image, height, width, *rest), last

    monkeypatch.setattr(EnginePipeline, "_prepare_latents_i2v", changed)
    monkeypatch.setitem(releases.TESTED, "vllm-omni", ("0.0.1",))
    monkeypatch.setattr(adapter, "_gate", releases.Gate("vllm-omni"))
    monkeypatch.delenv(releases.TRUST_VARIABLE, raising=False)
    vae = make_vae()
    wanted, own_calls = image_to_video(load(vae))
    with registered(mode):
        pipeline = load(vae)
        got, calls = image_to_video(pipeline)
    assert not seam.is_accelerated(pipeline.vae)
    assert calls == own_calls
    assert_equal(got, wanted)
