"""The fast pipeline's latents against the engine's, through the engine's own methods."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from omni_pipeline import (
    CASES,
    ENCODES_ALL_FRAMES,
    FRAMES,
    HEIGHT,
    WIDTH,
    EnginePipeline,
    clip,
    frames_through,
    make_fast,
    make_pipeline,
    make_vae,
    prepared,
    registered,
)
from torch import Tensor, nn
from vllm_omni.diffusion.models.cosmos3 import pipeline_cosmos3

from cosmos3_fast.engines import vllm_omni as adapter
from cosmos3_fast.vae.live import seam
from cosmos3_fast.vae.verify import FLOAT32_BOUND, largest, relative_error, rms

FOLDED = [name for name, case in CASES.items() if case.folded]
CLIPS = [name for name, case in CASES.items() if not case.folded]


def both(vae: Any, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """The engine's pipeline and one whose VAE, a copy, is accelerated."""
    return make_pipeline(EnginePipeline, vae, dtype), make_fast(copy.deepcopy(vae), dtype)


def result_dtype(pipeline: Any) -> torch.dtype:
    """Of the latents; releases since 0.31 have one for sampling."""
    return getattr(pipeline, "sampling_dtype", pipeline.dtype)


def encode_image(pipeline: Any, pixels: Tensor) -> Tensor:
    """[B, z, 1, h, w] through the method of image-to-video that encodes."""
    image = pixels[:, :, 0]
    if ENCODES_ALL_FRAMES:
        generator = torch.Generator().manual_seed(7)
        return pipeline._prepare_latents_i2v(image, *image.shape[2:], FRAMES, generator)[2]
    return pipeline._encode_conditioning_image_latent(image)


def image_latent(pipeline: Any, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        return encode_image(pipeline, pixels)


def video_latent(pipeline: Any, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        return pipeline._encode_video_tensor(pixels)


def assert_within_bound(got: Tensor, wanted: Tensor) -> None:
    assert got.shape == wanted.shape
    assert got.dtype == wanted.dtype
    assert got.device == wanted.device
    assert relative_error(got, wanted) <= FLOAT32_BOUND


@pytest.fixture(scope="module")
def vae() -> Any:
    """fp32; not to be changed."""
    return make_vae()


@pytest.mark.parametrize("name", FOLDED)
def test_single_frames_fp32(vae: Any, name: str) -> None:
    case = CASES[name]
    engine, fast = both(vae)
    pixels = clip(case.pixel_frames)
    with frames_through(vae) as calls:
        wanted = prepared(case, engine, pixels)
    assert sum(calls) == case.encoded
    with frames_through(fast.vae) as calls:
        got = prepared(case, fast, pixels)
    assert calls == []
    assert_within_bound(got[2], wanted[2])
    assert_within_bound(got[0], wanted[0])
    assert torch.equal(got[1], wanted[1])
    noise = wanted[1].flatten() == 1
    assert torch.equal(got[0][:, :, noise], wanted[0][:, :, noise])
    # Both really are encodes of the image, by two different routes.
    assert largest(wanted[2]) > 0.1
    assert not torch.equal(got[2], wanted[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CLIPS)
def test_clips_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    vae = make_vae(dtype, seed=1)
    engine, fast = both(vae)
    pixels = clip(case.pixel_frames)
    wanted = prepared(case, engine, pixels)
    with frames_through(fast.vae) as calls:
        got = prepared(case, fast, pixels)
    assert sum(calls) == case.encoded
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize(
    ("mode", "name"), [*(("exact", name) for name in CASES), ("off", "image to video")]
)
def test_other_modes_bit_for_bit(mode: str, name: str) -> None:
    case = CASES[name]
    vae = make_vae(torch.bfloat16)
    wanted = prepared(case, make_pipeline(EnginePipeline, vae), clip(case.pixel_frames))
    with registered(mode), frames_through(vae) as calls:
        got = prepared(case, make_pipeline(EnginePipeline, vae), clip(case.pixel_frames))
    assert sum(calls) == case.encoded
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_error_is_no_larger_than_the_engines(dtype: torch.dtype) -> None:
    """RMS over four images of each VAE: that of one image of 576 latents varies by 5 % with the
    CPU's order of sums."""
    for seed in range(4):
        vae = make_vae(dtype, seed)
        engine, fast = both(vae)
        in_fp64 = make_pipeline(EnginePipeline, copy.deepcopy(vae).double())
        in_fp64.sampling_dtype = torch.float64
        errors: tuple[list[Tensor], list[Tensor]] = [], []
        for image in range(seed, 16, 4):
            pixels = clip(1, image).to(dtype)
            truth = image_latent(in_fp64, pixels.double())
            assert truth.dtype == torch.float64
            wanted, got = image_latent(engine, pixels), image_latent(fast, pixels)
            assert got.dtype == wanted.dtype == result_dtype(engine)
            assert torch.equal(video_latent(fast, pixels), got)
            errors[0].append(got.double() - truth)
            errors[1].append(wanted.double() - truth)
        ours, theirs = (rms(torch.cat(each)) for each in errors)
        assert 0 < ours <= theirs


def test_batch_of_images(vae: Any) -> None:
    engine, fast = both(vae)
    images = torch.cat([clip(1, seed) for seed in range(3)])
    wanted, got = image_latent(engine, images), image_latent(fast, images)
    assert got.shape[:3] == (3, vae.config.z_dim, 1)
    assert_within_bound(got, wanted)


def test_pipeline_in_another_dtype_than_the_vae(vae: Any) -> None:
    engine, fast = both(vae, torch.bfloat16)
    for encode in (image_latent, video_latent):
        wanted, got = encode(engine, clip(1)), encode(fast, clip(1))
        assert got.dtype == wanted.dtype == result_dtype(engine)
        # Both round an fp32 result once: they may differ by one place where it is near a tie.
        assert largest(got.float() - wanted.float()) <= 2**-7 * largest(wanted.float())
    unrounded = video_latent(make_fast(copy.deepcopy(vae)), clip(1))
    assert torch.equal(video_latent(fast, clip(1)), unrounded.to(result_dtype(engine)))


def test_video_without_batch_dimension(vae: Any) -> None:
    engine, fast = both(vae)
    assert_within_bound(video_latent(fast, clip(1)[0]), video_latent(engine, clip(1)[0]))


@pytest.mark.parametrize("graphs", [False, True])
def test_graphs_where_they_are_asked_for(vae: Any, graphs: bool) -> None:
    fast = make_fast(copy.deepcopy(vae), graphs=graphs)
    choice = seam.choice_of(fast.vae)
    assert choice is not None
    assert choice.graphs == graphs
    assert_within_bound(video_latent(fast, clip(1)), video_latent(both(vae)[0], clip(1)))


def test_strided_pixels(vae: Any) -> None:
    _, fast = both(vae)
    pixels = clip(1)
    strided = clip(1).permute(3, 0, 4, 2, 1).contiguous().permute(1, 4, 3, 0, 2)
    assert not strided.is_contiguous()
    assert torch.equal(video_latent(fast, strided), video_latent(fast, pixels))


@pytest.mark.parametrize("shape", [(2, 3, 1, 32, 32), (1, 4, 1, 32, 32), (3, 32, 32)])
def test_the_engine_refuses_what_it_refused(vae: Any, shape: tuple[int, ...]) -> None:
    engine, fast = both(vae)
    with pytest.raises(ValueError, match="must have shape") as wanted:
        video_latent(engine, torch.zeros(shape))
    with pytest.raises(ValueError, match="must have shape") as got:
        video_latent(fast, torch.zeros(shape))
    assert str(got.value) == str(wanted.value)


@pytest.mark.parametrize("size", [(40, 48), (48, 36), (18, 22)])
@pytest.mark.parametrize("encode", [image_latent, video_latent])
def test_sizes_that_are_not_whole_cells(
    vae: Any, encode: Callable[[Any, Tensor], Tensor], size: tuple[int, int]
) -> None:
    engine, fast = both(vae)
    with pytest.raises(RuntimeError) as wanted:
        encode(engine, clip(1, 0, *size))
    with frames_through(fast.vae) as calls, pytest.raises(RuntimeError) as got:
        encode(fast, clip(1, 0, *size))
    assert calls[-1:] == [1]
    assert str(got.value) == str(wanted.value)


@pytest.mark.skipif(
    not hasattr(EnginePipeline, "_prepare_latents_v2v"), reason="it has no video-to-video"
)
@pytest.mark.parametrize("keep", ["first", "last"])
@pytest.mark.parametrize("indexes", [[0], [0, 1]])
def test_conditioning_on_either_end_of_a_clip(vae: Any, keep: str, indexes: list[int]) -> None:
    """From a user's frames, through the engine's preprocessing."""
    config = SimpleNamespace(model_config={"guardrails": False})
    preprocess = pipeline_cosmos3.get_cosmos3_pre_process_func(config)
    frames = list(((clip(FRAMES)[0] + 1) * 127.5).byte().permute(1, 2, 3, 0))
    sampling = SimpleNamespace(
        extra_args={"condition_frame_indexes_vision": indexes, "condition_video_keep": keep},
        height=HEIGHT,
        width=WIDTH,
        num_frames=FRAMES,
    )
    prompt = {"prompt": "", "multi_modal_data": {"video": torch.stack(frames)}}
    request = preprocess(SimpleNamespace(prompt=prompt, sampling_params=sampling))
    video = request.prompt["additional_information"]["preprocessed_video"]
    kept = 4 * max(indexes) + 1
    assert video.shape[2] == kept
    chosen = frames[:kept] if keep == "first" else frames[-kept:]
    assert largest(video[0, :, 0].permute(1, 2, 0) - (chosen[0] / 127.5 - 1)) < 0.01

    case = CASES["video, latent frame 0" if kept == 1 else "video, latent frames 0 and 1"]
    engine, fast = both(vae)
    wanted, got = prepared(case, engine, video), prepared(case, fast, video)
    if kept == 1:
        assert_within_bound(got[2], wanted[2])
    else:
        assert torch.equal(got[2], wanted[2])
    assert torch.equal(got[1], wanted[1])


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.pixel_frames > 1])
def test_which_pixels_matter(vae: Any, name: str) -> None:
    case = CASES[name]
    fast = make_fast(copy.deepcopy(vae))
    pixels = clip(case.pixel_frames)
    before = prepared(case, fast, pixels)
    last_used = min(case.encoded, case.pixel_frames)
    for frame in {0, last_used - 1}:
        corrupted = pixels.clone()
        corrupted[:, :, frame] *= -1
        assert not torch.equal(prepared(case, fast, corrupted)[0], before[0])
    if last_used < case.pixel_frames:
        corrupted = pixels.clone()
        corrupted[:, :, last_used:] = float("nan")
        after = prepared(case, fast, corrupted)
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_tiles_are_the_engines(vae: Any, caplog: pytest.LogCaptureFixture) -> None:
    tiled = copy.deepcopy(vae)
    tiled.enable_tiling(32, 32, 32, 32)
    engine, fast = both(tiled)
    for pixels in (clip(1, 0, 48, 80), clip(5, 0, 48, 80)):
        assert torch.equal(video_latent(fast, pixels), video_latent(engine, pixels))
    assert "tiling is on" in caplog.text
    # Without a second tile there is nothing that could differ.
    with frames_through(fast.vae) as calls:
        assert_within_bound(
            video_latent(fast, clip(1, 0, 32, 32)), video_latent(engine, clip(1, 0, 32, 32))
        )
    assert calls == []


def load_state_dict(vae: Any) -> None:
    vae.load_state_dict(make_vae(vae.dtype, seed=5).state_dict())


def step_in_place(vae: Any) -> None:
    with torch.no_grad():
        vae.encoder.mid_block.resnets[0].conv1.weight.mul_(1.5)


def replace_parameter(vae: Any) -> None:
    conv = vae.encoder.conv_in
    conv.weight = nn.Parameter(conv.weight.detach() * -1, requires_grad=False)


@pytest.mark.parametrize("change", [load_state_dict, step_in_place, replace_parameter])
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_changed_weights_are_followed(
    change: Callable[[Any], None], guard: Callable[[], Any]
) -> None:
    vae = make_vae()
    engine, fast = both(vae)
    with guard():
        before = fast._encode_video_tensor(clip(1))
    for each in (vae, fast.vae):
        change(each)
    wanted = video_latent(engine, clip(1))
    assert largest(wanted - before) > 100 * FLOAT32_BOUND * largest(wanted)
    with guard():
        assert_within_bound(fast._encode_video_tensor(clip(1)).clone(), wanted)


def test_loaded_weights_are_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the engine's `load_weights`, which writes through `.data`; in a subclass too."""

    class Derived(EnginePipeline):
        def load_weights(self, weights: Any) -> set[str]:
            return super().load_weights(weights)

    def load(self: Any, weights: Any) -> set[str]:
        for name, tensor in weights:
            self.get_parameter(name).data.copy_(tensor)
        return {name for name, _ in weights}

    monkeypatch.setattr(EnginePipeline, "load_weights", load)
    vae = make_vae()
    engine, served = make_pipeline(EnginePipeline, vae), make_pipeline(Derived, copy.deepcopy(vae))
    name = "vae.encoder.conv_in.weight"
    weight = served.get_parameter(name).clone()
    with registered("fast"):
        assert served.load_weights([(name, weight)]) == {name}
        before = image_latent(served, clip(1))
        assert seam.last_encoding(served.vae).path == "fast"
        weight.view(-1)[-1] += 10.0
        served.load_weights([(name, weight)])
        after = image_latent(served, clip(1))
        assert seam.last_encoding(served.vae).path == "fast"
    engine.get_parameter(name).data.copy_(weight)
    wanted = image_latent(engine, clip(1))
    assert largest(wanted - before) > 100 * FLOAT32_BOUND * largest(wanted)
    assert_within_bound(after, wanted)


def test_state_dict_and_modules_are_the_engines(vae: Any) -> None:
    engine, fast = both(vae)
    image_latent(fast, clip(1))
    assert list(fast.state_dict()) == list(engine.state_dict())
    assert [n for n, _ in fast.named_modules()] == [n for n, _ in engine.named_modules()]


def test_modes_of_torch(vae: Any) -> None:
    """The engine serves in inference_mode; what is folded there must serve outside, and back."""
    fast = make_fast(copy.deepcopy(vae))
    with torch.inference_mode():
        first = encode_image(fast, clip(1))
    assert torch.equal(image_latent(fast, clip(1)), first)
    outside = encode_image(fast, clip(1))
    assert not outside.requires_grad
    with torch.inference_mode():
        assert torch.equal(encode_image(fast, clip(1)), first)


def test_a_vae_made_in_inference_mode() -> None:
    """Its parameters have no version counter."""
    with torch.inference_mode():
        vae = make_vae()
        for module in (vae.encoder, vae.quant_conv):
            for name, parameter in list(module.named_parameters()):
                owner = module.get_submodule(name.rpartition(".")[0])
                setattr(owner, name.rpartition(".")[2], nn.Parameter(parameter.clone(), False))
        assert vae.encoder.conv_in.weight.is_inference()
        engine, fast = both(vae)
        wanted = engine._encode_video_tensor(clip(1))
        assert_within_bound(fast._encode_video_tensor(clip(1)), wanted)
        assert seam.last_encoding(fast.vae).path == "fast"
        for each in (vae, fast.vae):
            each.encoder.conv_in.bias.mul_(-3)
        seam.refresh(fast.vae)
        changed = engine._encode_video_tensor(clip(1))
        assert largest(changed - wanted) > 100 * FLOAT32_BOUND * largest(wanted)
        assert_within_bound(fast._encode_video_tensor(clip(1)), changed)


def test_a_vae_that_cannot_be_folded(caplog: pytest.LogCaptureFixture) -> None:
    vae = make_vae()
    vae.encoder.nonlinearity = nn.ReLU()
    engine, fast = both(vae)
    for encode in (image_latent, video_latent, image_latent):
        with frames_through(vae) as wanted_calls:
            wanted = encode(engine, clip(1))
        with frames_through(fast.vae) as calls:
            assert torch.equal(encode(fast, clip(1)), wanted)
        assert calls == wanted_calls
        assert calls[0] == 1
    (record,) = [r for r in caplog.records if r.name == adapter.__name__]
    assert "nonlinearity" in record.getMessage()


def test_forwards_that_the_engine_fuses_do_not_keep_it_from_folding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As its fast path for Wan does on CUDA: a function of its own bound as a module's forward."""
    vae = make_vae()
    conv = vae.encoder.conv_in

    def bind(module: str) -> None:
        def forward(self: Any, x: Tensor, *args: Any) -> Tensor:
            return type(self).forward(self, x, *args)

        forward.__module__ = module
        monkeypatch.setattr(conv, "forward", MethodType(forward, conv), raising=False)

    bind("vllm_omni.diffusion.distributed.autoencoders.wan_vae_fastpath.install")
    pipeline = make_fast(vae)
    video_latent(pipeline, clip(1))
    assert seam.last_encoding(vae).path == "fast"
    bind("somewhere.else")
    video_latent(pipeline, clip(1))
    assert seam.last_encoding(vae).path == "whole"
