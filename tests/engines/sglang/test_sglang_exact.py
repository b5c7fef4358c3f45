"""Exact mode against the unpatched stage: everything it writes on the batch, value for value."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from sglang_engine import (
    PADS_CLIPS,
    AutoencoderKLWan,
    DataType,
    make_batch,
    make_stage,
    make_vae,
    outputs,
    patched,
    pixel_frames_encoded,
    run,
)
from torch import Tensor

from cosmos3_fast.frames import latent_frames, pixel_frames
from cosmos3_fast.vae.live import seam

ACTION = {"data_type": DataType.ACTION, "domain_id": 3, "raw_action_dim": 5}


def pixels(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator) * 2 - 1


IMAGE = pixels(1, 3, 32, 48)
CLIP = pixels(1, 3, 17, 32, 48)
ACTIONS = pixels(16, 6).tolist()

# Name: the request, the pixel frames encoded unpatched, and those encoded patched.
CASES: dict[str, tuple[dict[str, Any], int, int]] = {
    "t2v": ({}, 0, 0),
    "t2i": ({"num_frames": 1, "data_type": DataType.IMAGE}, 0, 0),
    "t2i, image ignored": (
        {"image": IMAGE, "num_frames": 1, "data_type": DataType.IMAGE},
        0,
        0,
    ),
    "i2v": ({"image": IMAGE}, 1, 1),
    "i2v, another seed": ({"image": IMAGE, "seed": 1234}, 1, 1),
    "i2v, 81 frames": ({"image": IMAGE, "num_frames": 81}, 1, 1),
    "i2v, one frame": ({"image": IMAGE, "num_frames": 1}, 1, 1),
    "i2v, sound": ({"image": IMAGE, "sound_duration": 1.5}, 1, 1),
    "v2v": ({"video": CLIP}, 17, 5),
    "v2v, sound": ({"video": CLIP, "sound_duration": 0.01}, 17, 5),
    "v2v, first": ({"video": CLIP, "condition_frame_indexes": [0]}, 17, 1),
    "v2v, not the first": ({"video": CLIP, "condition_frame_indexes": [1]}, 17, 5),
    "v2v, gap": ({"video": CLIP, "condition_frame_indexes": [0, 2]}, 17, 9),
    "v2v, repeated": ({"video": CLIP, "condition_frame_indexes": [2, 0, 2]}, 17, 9),
    "v2v, last": ({"video": CLIP, "condition_frame_indexes": [4]}, 17, 17),
    "v2v, from the end": ({"video": CLIP, "condition_frame_indexes": [0, -1]}, 17, 17),
    "v2v, short source": ({"video": CLIP[:, :, :3]}, 17, 5),
    "v2v, one source frame": ({"video": CLIP[:, :, :1]}, 17, 5),
    "v2v, source as needed": ({"video": CLIP[:, :, :5]}, 17, 5),
    "v2v, long source": ({"video": CLIP, "num_frames": 9}, 17, 5),
    "v2v, num_frames no 1 + 4k": ({"video": CLIP[:, :, :14], "num_frames": 15}, 13, 5),
    "v2v, 61 frames": ({"video": CLIP[:, :, :5], "num_frames": 61}, 61, 5),
    "v2v and an image": ({"video": CLIP, "image": IMAGE}, 17, 5),
    "policy": ({"image": IMAGE, "action_mode": "policy", **ACTION}, 1, 1),
    "policy, batch": (
        {"image": pixels(3, 3, 32, 48), "action_mode": "policy", **ACTION},
        3,
        3,
    ),
    "forward dynamics": (
        {"image": IMAGE, "action_mode": "forward_dynamics", "action": ACTIONS, **ACTION},
        1,
        1,
    ),
    "inverse dynamics": (
        {"video": CLIP, "action_mode": "inverse_dynamics", **ACTION},
        17,
        17,
    ),
    "transfer": ({"extra": {"transfer_plan": {"chunk_frames": 9}}}, 0, 0),
    "transfer, clip left for later": (
        {"extra": {"transfer_plan": {"chunk_frames": 9}}, "video": CLIP},
        0,
        0,
    ),
    "warm-up": ({"image": IMAGE, "is_warmup": True}, 1, 1),
}


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=str)
def stage(request):
    return make_stage(make_vae(request.param, base_dim=8))


@pytest.fixture
def stage16():
    return make_stage(make_vae(base_dim=8))


def make(case: dict[str, Any]):
    case = dict(case)
    if "generator" in case:
        case["generator"] = torch.Generator().manual_seed(case["generator"])
    return make_batch(**case)


def assert_same(ours: Any, theirs: Any, where: str = "batch") -> None:
    assert type(ours) is type(theirs), where
    if isinstance(ours, Tensor):
        assert ours.dtype == theirs.dtype, where
        assert ours.shape == theirs.shape, where
        assert ours.stride() == theirs.stride(), where
        assert torch.equal(ours, theirs), where
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_same(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(a, b, f"{where}[{i}]")
    else:
        assert ours == theirs, where


def adopt(stage) -> None:
    """Where the engine makes a stage the VAE is made ready, which encodes the smallest frame."""
    make_stage(stage.vae)


def run_both(stage, case: dict[str, Any], mode: str = "exact"):
    """Outputs and encoded pixel frames, unpatched and patched."""
    results = []
    for which in (None, mode):
        batch = make(case)
        if which is None:
            with pixel_frames_encoded(stage.vae) as seen:
                run(stage, batch)
        else:
            with patched(which):
                adopt(stage)
                with pixel_frames_encoded(stage.vae) as seen:
                    run(stage, batch)
        batch_size = 1 if case.get("image") is None else case["image"].shape[0]
        results.append((outputs(batch), sum(seen) * batch_size))
    return results


@pytest.mark.parametrize("name", CASES)
def test_writes_the_same_and_encodes_less(stage, name):
    case, frames_before, frames_after = CASES[name]
    (theirs, theirs_frames), (ours, ours_frames) = run_both(stage, case)
    assert_same(ours, theirs)
    if not PADS_CLIPS and case.get("video") is not None:
        frames_before = min(frames_before, pixel_frames(latent_frames(case["video"].shape[2])))
        frames_after = min(frames_after, frames_before)
    assert (theirs_frames, ours_frames) == (frames_before, frames_after)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (16, 32), (32, 32), (48, 64)])
@pytest.mark.parametrize("num_frames", [17, 29, 81])
def test_the_encode_itself_is_the_same(stage, monkeypatch, height, width, num_frames):
    """Before its rounding to bfloat16, which hides most differences of a float32 VAE.

    At small sizes the number of latent frames decides how `quant_conv` rounds.
    """
    encoded: list[Tensor] = []
    encode = stage._vae_encode
    monkeypatch.setattr(
        stage, "_vae_encode", lambda video: encoded.append(encode(video)) or encoded[-1]
    )
    case = {"video": pixels(1, 3, 5, height, width), "height": height, "width": width}
    (theirs, _), (ours, frames) = run_both(stage, {**case, "num_frames": num_frames})
    assert_same(ours, theirs)
    assert frames == 5
    assert torch.equal(encoded[1][:, :, :2], encoded[0][:, :, :2])


def test_transfer_controls_beside_a_clip_are_encoded_whole(stage16):
    """SGLang 0.5.19 encodes them in this stage; other releases leave them to another one."""
    controls = {"preprocessed_control": [pixels(1, 3, 9, 32, 48, seed=1)]}
    (theirs, _), (ours, _) = run_both(stage16, {"video": CLIP, "extra": controls})
    assert_same(ours, theirs)


def test_the_comparison_sees_one_changed_bit(stage16):
    (theirs, _), (ours, _) = run_both(stage16, CASES["v2v"][0])
    ours["extra"]["condition_latents"].view(torch.int16)[0, 47, 1, 1, 2] ^= 1
    with pytest.raises(AssertionError, match=r"batch\.extra\.condition_latents"):
        assert_same(ours, theirs)


@pytest.mark.parametrize("name", ["t2v", "i2v", "v2v", "policy, batch"])
def test_a_given_generator_is_drawn_from_alike(stage16, name):
    case = {**CASES[name][0], "generator": 99, "sound_duration": 0.5}
    (theirs, _), (ours, _) = run_both(stage16, case)
    assert_same(ours, theirs)
    (other, _), _ = run_both(stage16, {**case, "generator": 98})
    assert not torch.equal(other["latents"], theirs["latents"])


@pytest.mark.parametrize(
    ("case", "transformer"),
    [
        ({"video": CLIP, "condition_frame_indexes": [5]}, {}),
        ({"video": CLIP, "condition_frame_indexes": [0, 99]}, {}),
        ({"video": CLIP, "condition_frame_indexes": [-9]}, {}),
        ({"video": CLIP, "sound_duration": 1.0}, {"sound_gen": False}),
        (CASES["policy"][0], {"action_dim": None}),
        ({"image": IMAGE, **ACTION, "action_mode": "dream"}, {}),
        ({"image": IMAGE, **ACTION, "action_mode": "policy", "domain_id": None}, {}),
        ({"image": IMAGE, **ACTION, "action_mode": "policy", "raw_action_dim": 9}, {}),
        ({"image": IMAGE, "height": 40}, {}),
    ],
)
@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_raises_what_the_stage_raises(stage16, case, transformer, mode):
    stage = make_stage(stage16.vae, **transformer)
    with pytest.raises(Exception) as theirs:  # noqa: PT011  whatever it is
        run(stage, make(case))
    with patched(mode), pytest.raises(type(theirs.value)) as ours:
        run(stage, make(case))
    assert type(ours.value) is type(theirs.value)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize(
    "case", [{"image": pixels(1, 3, 48, 48)}, {"video": pixels(1, 3, 17, 48, 48)}]
)
def test_pixels_of_another_size_are_refused(stage16, case):
    with pytest.raises(RuntimeError):
        run(stage16, make(case))
    with patched("exact"), pytest.raises(RuntimeError):
        run(stage16, make(case))


def test_a_used_frame_matters_and_an_unused_one_does_not(stage16):
    def latents(video: Tensor) -> Tensor:
        with patched("exact"):
            return run(stage16, make({"video": video})).latents

    reference = latents(CLIP)
    for frame in range(5):
        corrupted = CLIP.clone()
        corrupted[:, :, frame] = 1.0
        assert not torch.equal(latents(corrupted), reference), frame
    corrupted = CLIP.clone()
    corrupted[:, :, 5:] = float("nan")
    assert torch.equal(latents(corrupted), reference)


def test_condition_latents_are_the_latents_of_conditioned_frames(stage16):
    with patched("exact"):
        batch = run(stage16, make(CASES["v2v, gap"][0]))
    conditioned = torch.tensor([True, False, True, False, False])
    stash = batch.extra["condition_latents"]
    assert torch.equal(batch.latents[:, :, conditioned], stash[:, :, conditioned])
    assert stash[:, :, ~conditioned].count_nonzero() == 0
    assert torch.equal(batch.extra["velocity_mask"].flatten(), (~conditioned).to(torch.bfloat16))


def test_tiling_without_effect_does_not_keep_clips_whole():
    vae = make_vae(base_dim=8, use_tiling=True, use_temporal_tiling=True)
    vae.tile_sample_min_height = vae.tile_sample_min_width = 16
    (theirs, _), (ours, frames) = run_both(make_stage(vae), CASES["v2v"][0])
    assert_same(ours, theirs)
    assert frames == 5


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda vae: setattr(vae, "_encode", None), "vae._encode was replaced"),
        (lambda vae: setattr(vae, "use_feature_cache", False), "feature cache is off"),
        (lambda vae: setattr(vae.encoder, "world_size", 2), "in parallel over ranks"),
    ],
)
def test_a_vae_whose_clips_cannot_be_cut_gets_them_whole(change, reason, caplog, monkeypatch):
    stage = make_stage(make_vae(base_dim=8))
    seen: list[int] = []

    def encode(self: object, x: Tensor) -> DiagonalGaussianDistribution:
        seen.append(x.shape[2])
        return DiagonalGaussianDistribution(torch.zeros(1, 96, latent_frames(x.shape[2]), 2, 3))

    monkeypatch.setattr(AutoencoderKLWan, "encode", encode)
    with patched("exact"):
        adopt(stage)
        seen.clear()
        change(stage.vae)
        run(stage, make(CASES["v2v"][0]))
        run(stage, make(CASES["v2v"][0]))
    assert seen == [17, 17]
    warnings = [record for record in caplog.records if record.name == seam.logger.name]
    assert len(warnings) == 1
    assert reason in warnings[0].getMessage()


def test_a_vae_with_an_encode_of_its_own_is_left_alone():
    stage = make_stage(make_vae(base_dim=8))
    seen: list[int] = []

    def encode(x: Tensor) -> DiagonalGaussianDistribution:
        seen.append(x.shape[2])
        return DiagonalGaussianDistribution(torch.zeros(1, 96, 5, 2, 3))

    stage.vae.encode = encode
    with patched("exact"):
        run(stage, make(CASES["v2v"][0]))
    assert seen == [17]


@pytest.mark.parametrize("tiled", [False, True])
def test_without_the_feature_cache_the_stage_is_as_it_was(tiled):
    wan21 = {"is_residual": False, "patch_size": None, "in_channels": 3, "scale_factor_spatial": 8}
    vae = make_vae(
        base_dim=8,
        arch=wan21,
        use_feature_cache=False,
        use_tiling=tiled,
        use_temporal_tiling=tiled,
        tile_sample_min_num_frames=8,
        tile_sample_stride_num_frames=4,
    )
    stage = make_stage(vae)
    (theirs, theirs_frames), (ours, frames) = run_both(stage, CASES["v2v"][0])
    assert_same(ours, theirs)
    assert frames == theirs_frames


class TestConditioningCache:
    def test_hits_give_what_misses_gave(self, stage, conditioning):
        cache = conditioning.ConditioningCache(64 * 1024**2)
        with ExitStack() as stack:
            stack.enter_context(patched("exact"))
            adopt(stage)
            stack.enter_context(cache.scope())
            seen = stack.enter_context(pixel_frames_encoded(stage.vae))
            first = outputs(run(stage, make(CASES["v2v"][0])))
            again = outputs(run(stage, make(CASES["v2v"][0])))
            image = outputs(run(stage, make(CASES["i2v"][0])))
            image_again = outputs(run(stage, make(CASES["i2v"][0])))
        assert_same(again, first)
        assert_same(image_again, image)
        assert sum(seen) == 5 + 1
        assert cache.stats()["hits"] == 2

    def test_clips_of_different_length_are_kept_apart(self, stage, conditioning):
        cases = [{"video": CLIP, "num_frames": n} for n in (17, 21, 41, 17)]
        theirs = [outputs(run(stage, make(case))) for case in cases]
        cache = conditioning.ConditioningCache(64 * 1024**2)
        with cache.scope(), patched("exact"):
            ours = [outputs(run(stage, make(case))) for case in cases]
        assert_same(ours, theirs)
        # Where the stage does not pad them, these are one clip.
        assert cache.stats()["hits"] == (1 if PADS_CLIPS else 3)

    def test_new_weights_empty_it(self, stage16, conditioning):
        cache = conditioning.ConditioningCache(64 * 1024**2)
        with cache.scope(), patched("exact"):
            before = run(stage16, make(CASES["v2v"][0])).latents
            conditioning.invalidate_conditioning_caches()
            stage16.vae.load_state_dict(make_vae(base_dim=8, seed=1).state_dict())
            after = run(stage16, make(CASES["v2v"][0])).latents
        assert not torch.equal(before, after)
        assert torch.equal(after, run(stage16, make(CASES["v2v"][0])).latents)


def offload_layerwise(vae) -> None:
    """As SGLang does, which needs a GPU for it: weights are there only while their block runs."""
    vae.layerwise_offload_managers = [SimpleNamespace(enabled=True)]
    for block in vae.encoder.down_blocks:
        held = {parameter: parameter.data for parameter in block.parameters()}

        def drop(*_, held=held) -> None:
            for parameter in held:
                parameter.data = parameter.data.new_empty(1)

        def fetch(*_, held=held) -> None:
            for parameter, value in held.items():
                parameter.data = value

        drop()
        block.register_forward_pre_hook(fetch)
        block.register_forward_hook(drop)


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("name", ["i2v", "v2v", "v2v, first"])
def test_layers_may_be_offloaded_between_uses(stage16, mode, name):
    case = CASES[name][0]
    resident = outputs(run(stage16, make(case)))
    offload_layerwise(stage16.vae)
    (theirs, _), (ours, frames) = run_both(stage16, case, mode)
    assert_same(theirs, resident)
    assert_same(ours, theirs)
    assert frames == CASES[name][2]


def test_nothing_stays_on_the_vae(stage16):
    def state():
        quant = stage16.vae.quant_conv
        hooks = len(quant._forward_hooks), len(quant._forward_pre_hooks)
        return set(vars(stage16.vae)), hooks

    run(stage16, make(CASES["v2v"][0]))
    before = state()
    with patched("exact"):
        run(stage16, make(CASES["v2v"][0]))
        assert state()[1] == before[1]
        with pytest.raises(RuntimeError):
            run(stage16, make({"video": pixels(1, 2, 17, 32, 48)}))
        assert state()[1] == before[1]
    assert state() == before


def test_threads_do_not_disturb_each_other(stage16):
    names = ["v2v", "i2v", "v2v, gap", "v2v, first", "policy, batch", "v2v, short source"]
    theirs = [outputs(run(stage16, make(CASES[name][0]))) for name in names]
    with patched("exact"), ThreadPoolExecutor(4) as pool:
        ours = list(pool.map(lambda name: outputs(run(stage16, make(CASES[name][0]))), names * 2))
    assert_same(ours, theirs * 2)


def test_logs_what_the_stage_logs_and_what_it_encoded(stage16, monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(type(stage16), "log_info", lambda _, message, *args: lines.append(message))
    run(stage16, make(CASES["v2v"][0]))
    unpatched = list(lines)
    lines.clear()
    with patched("exact"):
        run(stage16, make(CASES["v2v"][0]))
    assert [line for line in lines if "cosmos3_fast" not in line] == unpatched
    assert "cosmos3_fast (exact) encoded 5 of 17 pixel frames" in lines
