"""Exact mode against the unpatched pipeline, bit for bit, and fast mode within its bounds."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from tiny_pipeline import (
    ACTION_FRAMES,
    ACTIONS,
    FRAMES,
    NEEDED,
    generate,
    make_clip,
    make_inputs,
    make_pipe,
    total_frames,
)

from cosmos3_fast.acceleration import accelerate, last_encoding, restore
from cosmos3_fast.vae.live.exact import encode_exact

DTYPES = [torch.float32, torch.bfloat16]


def fold_clips(pipe: Any) -> None:
    """Made at the first clip, which goes through the VAE's own encoder once, to be compared."""
    pipe.vae.encode(torch.zeros(1, 3, 5, 16, 16, dtype=pipe.vae.dtype))


def skip_slow(pipe: Any, case: str) -> None:
    """Where a processor has no bfloat16 instructions, an action takes a minute."""
    if pipe.vae.dtype == torch.bfloat16 and case in ACTIONS[1:]:
        pytest.skip("in bfloat16, policy stands for the other actions")


@functools.cache
def shared_pipe(dtype: torch.dtype) -> Any:
    return make_pipe(dtype)


@pytest.fixture(params=DTYPES, ids=["fp32", "bf16"])
def pipe(request: pytest.FixtureRequest) -> Any:
    pipe = shared_pipe(request.param)
    yield pipe
    restore(pipe)


@pytest.mark.parametrize(
    ("case", "size", "seed"),
    [
        (case, size, seed)
        for case in NEEDED
        for size, seed in ((32, 0), (48, 1), (64, 0))
        if case not in ACTIONS or size == 32
    ],
)
def test_exact_is_bit_identical(pipe: Any, case: str, size: int, seed: int) -> None:
    skip_slow(pipe, case)
    inputs = make_inputs(case, size, seed)
    plain = generate(pipe, inputs, seed)
    accelerate(pipe, "exact")
    ours = generate(pipe, inputs, seed)

    assert ours.same_as(plain)
    assert plain.frames == total_frames(inputs)
    assert ours.frames == NEEDED[case]
    encoding = last_encoding(pipe)
    assert encoding is not None
    assert (encoding.pixel_frames, encoding.of) == (NEEDED[case], plain.frames)
    assert encoding.reason is None


@pytest.mark.slow
@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("case", ["i2v", "v2v"])
def test_exact_with_more_threads(pipe: Any, case: str, size: int) -> None:
    # More threads divide a matrix product otherwise.
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        inputs = make_inputs(case, size)
        plain = generate(pipe, inputs)
        accelerate(pipe, "exact")
        assert generate(pipe, inputs).same_as(plain)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("case", list(NEEDED))
def test_fast_leaves_frames_and_clips_to_the_folded_networks(pipe: Any, case: str) -> None:
    skip_slow(pipe, case)
    inputs = make_inputs(case, 64)
    plain = generate(pipe, inputs)
    accelerate(pipe, "fast")
    wanted = (NEEDED[case] + 3) // 4
    if wanted > 1:
        fold_clips(pipe)
    ours = generate(pipe, inputs)

    encoding = last_encoding(pipe)
    assert encoding is not None
    assert encoding.path == ("fast" if wanted else "none")
    assert ours.frames == 0
    # fp32: DESIGN's bound; bf16 has a test of its own against fp64.
    bound = 1e-5 if pipe.vae.dtype == torch.float32 else 2**-5
    assert torch.equal(ours.start, plain.start) == (wanted == 0)
    assert (ours.start - plain.start).abs().max() <= bound * plain.start.abs().max()
    assert torch.equal(ours.start[:, :, wanted:], plain.start[:, :, wanted:])
    assert ours.video.shape == plain.video.shape
    assert not torch.equal(ours.video, plain.video)
    if pipe.vae.dtype == torch.float32:
        assert (ours.video - plain.video).abs().max() < 1 / 255


@pytest.mark.parametrize("case", ["i2v", "v2v"])
def test_fast_without_clips(case: str) -> None:
    pipe = make_pipe()
    inputs = make_inputs(case)
    plain = generate(pipe, inputs)
    accelerate(pipe, clips=False)
    ours = generate(pipe, inputs)
    assert ours.frames == (0 if case == "i2v" else 5)
    assert ours.same_as(plain) == (case == "v2v")
    # A VAE that the pipeline gets later is accelerated in the same way.
    pipe.vae = make_pipe().vae
    again = generate(pipe, inputs)
    assert again.same_as(ours)


def test_clips_in_bf16_are_no_further_from_fp64_than_the_pipelines() -> None:
    pipe = make_pipe(torch.bfloat16)
    reference = copy.deepcopy(pipe.vae).double()
    shape = (1, pipe.vae.config.z_dim, 3, 2, 4)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        wanted = reference.decode(latents.double()).sample
        own = pipe.vae.decode(latents).sample.double()
        ours = accelerate(pipe).vae.decode(latents).sample.double()
    assert not torch.equal(ours, own)
    assert (ours - wanted).square().mean() <= (own - wanted).square().mean()


def test_fast_in_bf16_is_no_further_from_fp64_than_the_pipeline() -> None:
    pipe = make_pipe(torch.bfloat16)
    reference = copy.deepcopy(pipe.vae).double()
    errors = {"exact": 0.0, "fast": 0.0}
    for seed in range(6):
        pixels = make_clip(1, 64, seed).movedim(0, 1)[None].mul(2).sub(1)
        # The pipeline quantises its image to 8 bits first.
        quantised = ((pixels + 1) * 127.5).round() / 127.5 - 1
        wanted = encode_exact(reference, quantised.bfloat16().double())
        for mode in errors:
            accelerate(pipe, mode)
            with torch.no_grad():
                start = pipe.prepare_latents(
                    image=pixels[0, :, 0], num_frames=FRAMES, height=64, width=64, device="cpu",
                    dtype=torch.float32,
                )[0]  # fmt: skip
            errors[mode] += (start[:, :, :1].double() - wanted).square().sum().item()
    assert 0 < errors["fast"] <= errors["exact"]


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize(
    ("case", "used", "unused"),
    [
        ("v2v", 4, 5),
        ("v2v_last", 12, 11),
        ("v2v_last", 20, 0),
        ("policy", 0, 1),
        ("forward_dynamics", 0, 4),
        ("inverse_dynamics", 4, None),
    ],
)
def test_only_conditioned_frames_matter(
    mode: str, case: str, used: int, unused: int | None
) -> None:
    pipe = shared_pipe(torch.float32)

    def start(corrupted: int | None) -> torch.Tensor:
        inputs = make_inputs(case)
        clip = inputs["video"].clone() if "video" in inputs else make_clip(ACTION_FRAMES, 32)
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
        if unused is not None:
            assert torch.equal(start(unused), clean)
    finally:
        restore(pipe)


@pytest.mark.parametrize("case", ["t2v", "i2v", "v2v", "policy", "inverse_dynamics"])
def test_latents_of_the_caller_need_no_encoder(pipe: Any, case: str) -> None:
    inputs = make_inputs(case, 32)
    latent_frames = (total_frames(inputs) - 1) // 4 + 1
    inputs["latents"] = torch.randn(
        1, 8, latent_frames, 2, 2, generator=torch.Generator().manual_seed(5)
    )
    plain = generate(pipe, inputs)
    accelerate(pipe, "exact")
    ours = generate(pipe, inputs)
    assert ours.same_as(plain)
    assert torch.equal(ours.start, inputs["latents"].to(ours.start.dtype))
    assert (plain.frames, ours.frames) == (total_frames(inputs), 0)


@pytest.mark.parametrize(
    "change",
    [
        {"num_frames": 2},
        {"num_frames": 4},
        {"num_frames": 19},
        {"height": 32, "width": 80},
        {"condition_frame_indexes_vision": [3, 1]},
        {"condition_frame_indexes_vision": [4]},
        {"video": make_clip(3, 32)},
        {"video": make_clip(40, 32), "condition_video_keep": "last"},
    ],
    ids=["2 frames", "4 frames", "19 frames", "wide", "unordered", "last", "short", "long"],
)
def test_exact_on_odd_requests(pipe: Any, change: dict[str, Any]) -> None:
    for case in ("i2v", "v2v"):
        inputs = {**make_inputs(case, 32), **change}
        if case == "i2v":
            inputs.pop("video", None)
        else:
            latent_frames = (inputs["num_frames"] - 1) // 4 + 1
            if latent_frames == 1:
                inputs["condition_frame_indexes_vision"] = [0]
        plain = generate(pipe, inputs)
        accelerate(pipe, "exact")
        ours = generate(pipe, inputs)
        restore(pipe)
        assert ours.same_as(plain)
        assert ours.frames <= plain.frames


def test_positional_arguments_and_a_one_shot_iterable(pipe: Any) -> None:
    def start() -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(0)
        arguments = (None, make_clip(FRAMES, 32), iter([0, 1]), "first", FRAMES, 32, 32, 24.0)
        return pipe.prepare_latents(*arguments, generator=generator, device="cpu")

    plain = start()
    accelerate(pipe, "exact")
    for ours, theirs in zip(start(), plain, strict=True):
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
