"""The modular pipelines: blocks that encode, blocks that do not, and blocks of the user's own."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from diffusers import (
    Cosmos3DistilledModularPipeline,
    Cosmos3OmniBlocks,
    Cosmos3OmniModularPipeline,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.modular_pipelines.cosmos.encoders import Cosmos3ImageVaeEncoderStep
from tiny_pipeline import (
    ACTIONS,
    FRAMES,
    NEEDED,
    generate,
    make_clip,
    make_components,
    make_inputs,
    make_modular,
    make_pipe,
    total_frames,
)

from cosmos3_fast.acceleration import accelerate, last_encoding, restore


@functools.cache
def shared_pipe(dtype: torch.dtype, distilled: bool = False) -> Any:
    if not distilled:
        return make_modular(dtype)
    scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    pipe = make_modular(dtype, cls=Cosmos3DistilledModularPipeline, scheduler=scheduler)
    pipe.update_components(distilled_sigmas=[1.0, 0.5])
    return pipe


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def pipe(request: pytest.FixtureRequest) -> Any:
    pipe = shared_pipe(request.param)
    yield pipe
    restore(pipe)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def distilled(request: pytest.FixtureRequest) -> Any:
    pipe = shared_pipe(request.param, distilled=True)
    yield pipe
    restore(pipe)


@pytest.mark.parametrize(
    ("case", "size"),
    [(case, size) for case in NEEDED for size in (32, 48, 64) if case not in ACTIONS or size == 32],
)
def test_exact_is_bit_identical(pipe: Any, case: str, size: int) -> None:
    if pipe.vae.dtype == torch.bfloat16 and case in ACTIONS[1:]:
        pytest.skip("in bfloat16, policy stands for the other actions")
    inputs = make_inputs(case, size, seed=size)
    plain = generate(pipe, inputs)
    accelerate(pipe, "exact")
    ours = generate(pipe, inputs)
    assert ours.same_as(plain)
    assert plain.frames == (0 if case in ("t2v", "t2i") else total_frames(inputs))
    assert ours.frames == NEEDED[case]


@pytest.mark.parametrize("case", list(NEEDED))
def test_fast_leaves_frames_and_clips_to_the_folded_networks(case: str) -> None:
    pipe = shared_pipe(torch.float32)
    inputs = make_inputs(case, 64)
    plain = generate(pipe, inputs)
    accelerate(pipe, "fast")
    try:
        # The networks for clips are made at the first.
        pipe.vae.encode(torch.zeros(1, 3, 5, 16, 16))
        ours = generate(pipe, inputs)
    finally:
        restore(pipe)
    wanted = (NEEDED[case] + 3) // 4
    assert ours.frames == 0
    assert torch.equal(ours.start, plain.start) == (wanted == 0)
    assert (ours.start - plain.start).abs().max() <= 1e-5 * plain.start.abs().max()
    assert torch.equal(ours.start[:, :, wanted:], plain.start[:, :, wanted:])
    assert not torch.equal(ours.video, plain.video)
    assert (ours.video - plain.video).abs().max() < 1 / 255


@pytest.mark.parametrize("case", ["t2v", "i2v", "v2v", "v2v_last"])
def test_distilled(distilled: Any, case: str) -> None:
    inputs = make_inputs(case)
    plain = generate(distilled, inputs)
    accelerate(distilled, "exact")
    ours = generate(distilled, inputs)
    assert ours.same_as(plain)
    assert ours.frames == NEEDED[case]


def noise() -> torch.Tensor:
    return torch.randn(1, 8, 5, 2, 2, generator=torch.Generator().manual_seed(5))


def test_latents_of_the_caller_need_no_encoder(pipe: Any) -> None:
    inputs = {**make_inputs("i2v"), "latents": noise()}
    plain = generate(pipe, inputs)
    accelerate(pipe, "exact")
    ours = generate(pipe, inputs)
    assert ours.same_as(plain)
    assert (plain.frames, ours.frames) == (FRAMES, 0)


def test_distilled_puts_clean_latents_back_over_those_of_the_caller(distilled: Any) -> None:
    inputs = {**make_inputs("i2v"), "latents": noise()}
    plain = generate(distilled, inputs)
    accelerate(distilled, "exact")
    ours = generate(distilled, inputs)
    assert ours.same_as(plain)
    assert ours.frames == 1


def test_transfer_is_left_whole(pipe: Any) -> None:
    inputs = {"height": 32, "width": 32, "control_videos": {"edge": make_clip(FRAMES, 32)}}

    def video() -> Any:
        generator = torch.Generator().manual_seed(0)
        arguments = {"prompt": "a cat", "num_inference_steps": 2, "output_type": "pt", **inputs}
        return pipe(output="videos", generator=generator, **arguments)

    plain = video()
    for mode, clips in (("exact", True), ("fast", False)):
        accelerate(pipe, mode, clips=clips)
        assert torch.equal(video(), plain)
        assert last_encoding(pipe).path == "whole"
    accelerate(pipe, "fast", clips=True)
    ours = video()
    assert (last_encoding(pipe).path, last_encoding(pipe).pixel_frames) == ("fast", FRAMES)
    if pipe.vae.dtype == torch.float32:
        assert (ours - plain).abs().max() < 1 / 255


@pytest.mark.parametrize(
    ("case", "used", "unused"), [("v2v", 4, 5), ("v2v_last", 12, 11), ("policy", 0, 1)]
)
@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_only_conditioned_frames_matter(mode: str, case: str, used: int, unused: int) -> None:
    pipe = shared_pipe(torch.float32)

    def start(corrupted: int | None) -> torch.Tensor:
        inputs = make_inputs(case)
        clip = inputs["video"].clone() if "video" in inputs else make_clip(9, 32)
        if corrupted is not None:
            clip[corrupted] = 1 - clip[corrupted]
        if "action" in inputs:
            inputs["action"].image, inputs["action"].video = None, clip
        else:
            inputs["video"] = clip
        return generate(pipe, inputs).start

    accelerate(pipe, mode)
    try:
        clean = start(None)
        assert not torch.equal(start(used), clean)
        assert torch.equal(start(unused), clean)
    finally:
        restore(pipe)


def test_restore_gives_back_the_blocks() -> None:
    pipe = make_modular()
    inputs = make_inputs("i2v")
    assert generate(pipe, inputs).frames == FRAMES
    before = sorted(vars(pipe))
    blocks = repr(pipe.blocks)
    for _ in range(2):
        accelerate(pipe, "exact")
    accelerate(pipe, "fast")
    assert repr(pipe.blocks) == blocks
    assert generate(pipe, inputs).frames == 0
    restore(pipe)
    assert sorted(vars(pipe)) == before
    assert repr(pipe.blocks) == blocks
    steps = pipe._blocks.sub_blocks["vae_encoder"].sub_blocks.values()
    assert Cosmos3ImageVaeEncoderStep in map(type, steps)
    assert generate(pipe, inputs).frames == FRAMES


def test_pipelines_that_share_a_vae_share_the_acceleration() -> None:
    blocks = Cosmos3OmniBlocks()
    first, second = (Cosmos3OmniModularPipeline(blocks=blocks) for _ in range(2))
    components = make_components()
    for pipe in (first, second):
        pipe.update_components(**components)
        pipe.disable_safety_checker()
    inputs = make_inputs("i2v")
    accelerate(first, "exact")
    third = Cosmos3OmniModularPipeline(blocks=first.blocks)
    third.update_components(**components)
    third.disable_safety_checker()
    assert [generate(pipe, inputs).frames for pipe in (first, second, third)] == [1, 1, 1]
    restore(first)
    assert [generate(pipe, inputs).frames for pipe in (second, third)] == [FRAMES, FRAMES]


def test_components_that_are_loaded_later() -> None:
    pipe = Cosmos3OmniModularPipeline()
    accelerate(pipe, "fast")
    pipe.update_components(**make_components())
    pipe.disable_safety_checker()
    plain = generate(make_modular(), make_inputs("i2v"))
    ours = generate(pipe, make_inputs("i2v"))
    assert last_encoding(pipe).path == "fast"
    assert (ours.start - plain.start).abs().max() <= 1e-5 * plain.start[:, :, 0].abs().max()


@pytest.mark.parametrize(("workflow", "case"), [("image2video", "i2v"), ("video2video", "v2v")])
def test_workflows(workflow: str, case: str) -> None:
    inputs = make_inputs(case)
    pipe = Cosmos3OmniModularPipeline(workflow=workflow)
    pipe.update_components(**make_components())
    pipe.disable_safety_checker()
    accelerate(pipe, "exact")
    steps = {"prompt": "a cat", "num_inference_steps": 2, "output_type": "pt"}
    ours = pipe(output="videos", generator=torch.Generator().manual_seed(0), **steps, **inputs)
    assert last_encoding(pipe).pixel_frames == NEEDED[case]
    restore(pipe)
    plain = pipe(output="videos", generator=torch.Generator().manual_seed(0), **steps, **inputs)
    assert torch.equal(ours, plain)


def test_the_encoder_blocks_alone() -> None:
    pipe = Cosmos3OmniModularPipeline(blocks=Cosmos3OmniBlocks().sub_blocks["vae_encoder"])
    pipe.update_components(vae=make_components()["vae"])
    inputs = make_inputs("v2v")
    plain = pipe(output="x0_tokens_vision", **inputs)
    accelerate(pipe, "exact")
    ours = pipe(output="x0_tokens_vision", **inputs)
    # Nothing says which frames are used.
    assert torch.equal(ours, plain)


def test_latents_that_the_user_asks_for_are_whole(pipe: Any) -> None:
    inputs = {**make_inputs("i2v"), "prompt": "a cat", "num_inference_steps": 1}
    plain = pipe(output="x0_tokens_vision", **inputs)
    accelerate(pipe, "exact")
    assert torch.equal(pipe(output="x0_tokens_vision", **inputs), plain)


def test_blocks_without_an_encoder_have_nothing_to_announce() -> None:
    pipe = Cosmos3OmniModularPipeline(workflow="text2video")
    accelerate(pipe, "exact")
    pipe.update_components(**make_components())
    pipe.disable_safety_checker()
    assert generate(pipe, make_inputs("t2v")).frames == 0


def test_both_kinds_of_pipeline_agree() -> None:
    inputs = make_inputs("v2v")
    standard, modular = make_pipe(), make_modular()
    accelerate(standard, "exact")
    accelerate(modular, "exact")
    assert torch.equal(generate(standard, inputs).start, generate(modular, inputs).start)
