"""What users do to a pipeline before and after it is accelerated."""

from __future__ import annotations

import copy
import gc
import inspect
import json
import logging
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers import Cosmos3OmniPipeline
from tiny_pipeline import FRAMES, VAE_CONFIG, cast, generate, make_inputs, make_modular, make_pipe
from torch import nn

from cosmos3_fast.acceleration import accelerate, last_encoding, refresh, restore
from cosmos3_fast.vae import UnsupportedVAEError
from cosmos3_fast.vae.synthetic import synthetic_config, synthetic_vae


@pytest.fixture
def pipe() -> Cosmos3OmniPipeline:
    return make_pipe()


def close(ours: torch.Tensor, theirs: torch.Tensor, bound: float = 1e-5) -> bool:
    return bool((ours - theirs).abs().max() <= bound * theirs.abs().max())


def names(pipe: Any) -> list[str]:
    """Attributes of the pipeline's own, not those of its class."""
    return sorted(vars(pipe))


def assert_untouched(pipe: Any, before: list[str]) -> None:
    assert names(pipe) == before
    assert len(pipe.vae.quant_conv._forward_hooks) == 0
    assert len(pipe.vae.quant_conv._forward_pre_hooks) == 0


def test_restore_gives_back_the_pipeline(pipe: Any) -> None:
    inputs = make_inputs("i2v")
    plain = generate(pipe, inputs)
    before = names(pipe)
    assert accelerate(pipe) is pipe
    accelerate(pipe, "exact")
    accelerate(pipe, "fast")
    assert generate(pipe, inputs).frames == 0
    assert type(pipe) is Cosmos3OmniPipeline
    assert restore(pipe) is pipe
    assert_untouched(pipe, before)
    again = generate(pipe, inputs)
    assert again.same_as(plain)
    assert again.frames == FRAMES
    restore(pipe)
    assert_untouched(pipe, before)
    accelerate(accelerate(pipe), "off")
    assert_untouched(pipe, before)
    assert last_encoding(pipe) is None


def test_the_mode_can_be_switched(pipe: Any) -> None:
    inputs = make_inputs("i2v")
    frames = []
    for mode in ("exact", "fast", "exact"):
        accelerate(pipe, mode)
        frames.append(generate(pipe, inputs).frames)
    assert frames == [1, 0, 1]


def test_saved_pipelines_load_without_this_package(pipe: Any, tmp_path: Path) -> None:
    inputs = make_inputs("i2v")
    plain = generate(pipe, inputs)
    accelerate(pipe).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "Cosmos3OmniPipeline"
    for file in tmp_path.rglob("*.json"):
        assert "cosmos3_fast" not in file.read_text()
    loaded = Cosmos3OmniPipeline.from_pretrained(
        tmp_path, enable_safety_checker=False, torch_dtype=torch.float32
    )
    again = generate(loaded, inputs)
    assert again.same_as(plain)
    assert again.frames == FRAMES
    accelerate(loaded, "exact")
    ours = generate(loaded, inputs)
    assert ours.same_as(plain)
    assert ours.frames == 1


def test_from_pipe_shares_the_acceleration_with_the_vae(pipe: Any) -> None:
    inputs = make_inputs("i2v")
    accelerate(pipe)
    other = Cosmos3OmniPipeline.from_pipe(pipe, enable_safety_checker=False)
    assert generate(other, inputs).frames == 0
    accelerate(other, "exact")
    assert generate(other, inputs).frames == 1
    restore(other)
    assert generate(other, inputs).frames == FRAMES


def test_copies_follow_their_own_vae(pipe: Any) -> None:
    inputs = make_inputs("i2v")
    accelerate(pipe)
    plain = generate(pipe, inputs)
    other = copy.deepcopy(pipe)
    with torch.no_grad():
        pipe.vae.encoder.conv_in.weight.mul_(1.5)
    ours = generate(other, inputs)
    assert last_encoding(other).path == "fast"
    assert ours.same_as(plain)
    assert not generate(pipe, inputs).same_as(plain)


def scale_in_place(pipe: Any) -> None:
    with torch.no_grad():
        pipe.vae.encoder.mid_block.resnets[0].conv1.weight.mul_(1.5)


def scale_data(pipe: Any) -> None:
    pipe.vae.encoder.conv_out.weight.data.mul_(1.5)
    refresh(pipe)


def load_other_weights(pipe: Any) -> None:
    pipe.vae.load_state_dict(synthetic_vae(VAE_CONFIG, 3, decoder_base_dim=8).state_dict())


def replace_vae(pipe: Any) -> None:
    config = {**VAE_CONFIG}
    for name in ("latents_mean", "latents_std"):
        config[name] = pipe.vae.config[name]
    pipe.vae = synthetic_vae(config, 3, decoder_base_dim=8)


def change_dtype(pipe: Any) -> None:
    pipe.to(torch.float64)
    cast(pipe.transformer, torch.float64)


@pytest.mark.parametrize(
    "change", [scale_in_place, scale_data, load_other_weights, replace_vae, change_dtype]
)
def test_replaced_weights_are_never_stale(pipe: Any, change: Any) -> None:
    inputs = make_inputs("i2v")
    accelerate(pipe, "fast")
    before = generate(pipe, inputs)
    change(pipe)
    ours = generate(pipe, inputs)
    assert last_encoding(pipe).path == "fast"
    plain = generate(restore(pipe), inputs)
    assert close(ours.start, plain.start, 1e-5 if pipe.vae.dtype == torch.float32 else 1e-6)
    assert not torch.equal(ours.start, before.start)


def test_latent_statistics_that_are_not_the_vaes(pipe: Any) -> None:
    # The engine goes on with the statistics of the VAE that it was built with.
    pipe.vae = synthetic_vae(synthetic_config(VAE_CONFIG, 7), 3, decoder_base_dim=8)
    inputs = make_inputs("i2v")
    plain = generate(pipe, inputs)
    accelerate(pipe, "fast")
    ours = generate(pipe, inputs)
    assert ours.frames == 0
    assert close(ours.start, plain.start)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["i2v", "v2v", "policy"])
def test_tiling_is_respected(pipe: Any, case: str) -> None:
    inputs = make_inputs(case, 96)
    untiled = generate(pipe, inputs)
    pipe.vae.enable_tiling(32, 32, 16, 16)
    plain = generate(pipe, inputs)
    assert not torch.equal(plain.start, untiled.start)
    accelerate(pipe, "exact")
    ours = generate(pipe, inputs)
    assert ours.same_as(plain)
    assert 0 < ours.frames < plain.frames


def test_tiling_that_the_size_does_not_reach(pipe: Any) -> None:
    pipe.vae.enable_tiling()
    inputs = make_inputs("v2v", 32)
    plain = generate(pipe, inputs)
    accelerate(pipe, "exact")
    ours = generate(pipe, inputs)
    assert ours.same_as(plain)
    assert ours.frames == 5


def test_fast_mode_respects_tiling(pipe: Any, caplog: Any) -> None:
    inputs = make_inputs("i2v", 96)
    pipe.vae.enable_tiling(32, 32, 16, 16)
    plain = generate(pipe, inputs)
    accelerate(pipe, "fast")
    with caplog.at_level(logging.WARNING):
        ours = generate(pipe, inputs)
    assert ours.same_as(plain)
    assert "tiling is on" in caplog.text


@pytest.mark.parametrize("case", ["i2v", "v2v"])
def test_slicing(pipe: Any, case: str) -> None:
    pipe.vae.enable_slicing()
    inputs = make_inputs(case)
    plain = generate(pipe, inputs)
    accelerate(pipe, "exact")
    assert generate(pipe, inputs).same_as(plain)


def compile_encode(pipe: Any) -> None:
    pipe.vae.encode = torch.compile(pipe.vae.encode, backend="eager")


def compile_encoder(pipe: Any) -> None:
    pipe.vae.encoder.compile(backend="eager")


def wrap_encoder(pipe: Any) -> None:
    pipe.vae.encoder = torch.compile(pipe.vae.encoder, backend="eager")


@pytest.mark.slow
@pytest.mark.parametrize("compile_part", [compile_encode, compile_encoder, wrap_encoder])
def test_compiled_encoders(pipe: Any, compile_part: Any, caplog: Any) -> None:
    inputs = make_inputs("i2v")
    eager = generate(pipe, inputs)
    compile_part(pipe)
    plain = generate(pipe, inputs)
    assert close(plain.start, eager.start)
    # A compiled function may round differently at another length: it keeps the length.
    for mode in ("fast", "exact"):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            accelerate(pipe, mode)
            ours = generate(pipe, inputs)
            generate(pipe, inputs)
        assert torch.equal(ours.start, plain.start)
        if mode == "exact":
            assert ours.same_as(plain)
        else:  # a folded network decodes the video
            assert (ours.video - plain.video).abs().max() < 1 / 255
        told = "vae.encode was replaced" if compile_part is compile_encode else "compiled"
        assert told in caplog.text
        if compile_part is not compile_encode:
            assert last_encoding(pipe).path == "whole"
            assert caplog.text.count("all frames of a clip are encoded") == 1
            assert generate(pipe, make_inputs("t2v")).frames == 0


def test_vae_wrapped_by_compile_still_encodes_eagerly(pipe: Any) -> None:
    inputs = make_inputs("i2v")
    plain = generate(pipe, inputs)
    pipe.vae = torch.compile(pipe.vae, backend="eager")
    accelerate(pipe, "exact")
    ours = generate(pipe, inputs)
    assert ours.same_as(plain)
    assert ours.frames == 1
    accelerate(pipe, "fast")
    ours = generate(pipe, inputs)
    assert ours.frames == 0
    assert close(ours.start, plain.start)


@pytest.fixture
def onloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the models that accelerate's hooks move in, in order."""
    from accelerate.hooks import CpuOffload

    seen: list[str] = []
    original = CpuOffload.pre_forward

    def spy(self: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.append(type(module).__name__)
        return original(self, module, *args, **kwargs)

    monkeypatch.setattr(CpuOffload, "pre_forward", spy)
    return seen


@pytest.mark.parametrize("order", ["offload first", "accelerate first"])
def test_model_offload_does_not_pull_the_vae_in(pipe: Any, onloads: list[str], order: str) -> None:
    inputs = {**make_inputs("i2v"), "output_type": "latent"}
    plain = generate(pipe, inputs)
    if order == "offload first":
        pipe.enable_model_cpu_offload(device="cpu")
        accelerate(pipe, "fast")
    else:
        accelerate(pipe, "fast")
        pipe.enable_model_cpu_offload(device="cpu")
    assert hasattr(pipe.vae, "_hf_hook")
    ours = generate(pipe, inputs)
    assert ours.frames == 0
    assert close(ours.start, plain.start)
    assert "Cosmos3OmniTransformer" in onloads
    assert "AutoencoderKLWan" not in onloads

    accelerate(pipe, "exact")
    assert generate(pipe, inputs).same_as(plain)
    assert "AutoencoderKLWan" in onloads


def test_layerwise_offload_leaves_nothing_to_fold(pipe: Any, caplog: Any) -> None:
    inputs = make_inputs("i2v")
    plain = generate(pipe, inputs)
    # Of the whole pipeline, accelerate cannot do it with the CPU in the place of the GPU.
    cpu_offload(pipe.vae.requires_grad_(False), torch.device("cpu"))
    with caplog.at_level(logging.WARNING):
        accelerate(pipe, "fast")
        ours = generate(pipe, inputs)
    assert ours.same_as(plain)
    assert "cosmos3_fast" in caplog.text
    accelerate(pipe, "exact")
    assert generate(pipe, inputs).same_as(plain)


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("kind", ["i2v", "v2v"])
def test_weights_stored_in_8_bits(pipe: Any, kind: str, mode: str, caplog: Any) -> None:
    pipe.vae.requires_grad_(False)
    pipe.vae.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    inputs = make_inputs(kind)
    plain = generate(pipe, inputs)
    with caplog.at_level(logging.WARNING):
        accelerate(pipe, mode)
        ours = generate(pipe, inputs)
    assert ours.same_as(plain)
    assert ours.frames == {"i2v": 1, "v2v": 5}[kind]
    assert "is not known" not in caplog.text
    assert caplog.text.count("own encode runs") == (mode == "fast")


@pytest.mark.parametrize("offload_type", ["leaf_level", "block_level"])
def test_group_offload(pipe: Any, offload_type: str) -> None:
    inputs = make_inputs("v2v")
    plain = generate(pipe, inputs)
    cpu = torch.device("cpu")
    try:
        pipe.vae.enable_group_offload(cpu, cpu, offload_type=offload_type, num_blocks_per_group=1)
    except AttributeError as error:
        if torch.accelerator.is_available():
            raise
        pytest.skip(f"this diffusers offloads to an accelerator only: {error}")
    accelerate(pipe, "exact")
    ours = generate(pipe, inputs)
    assert ours.same_as(plain)
    assert ours.frames == 5
    accelerate(pipe, "fast")
    assert close(
        generate(pipe, make_inputs("i2v")).start, generate(restore(pipe), make_inputs("i2v")).start
    )


def test_a_vae_that_can_no_longer_be_folded(pipe: Any, caplog: Any) -> None:
    accelerate(pipe, "fast")
    pipe.vae.encoder.nonlinearity = nn.GELU()
    with torch.no_grad():
        pipe.vae.encoder.conv_in.weight.mul_(1.5)
    inputs = make_inputs("i2v")
    with caplog.at_level(logging.WARNING):
        ours = generate(pipe, inputs)
    assert ours.frames == 1
    assert "nonlinearity" in last_encoding(pipe).reason
    assert "own encode runs" in caplog.text
    plain = generate(restore(pipe), inputs)
    assert torch.equal(ours.start, plain.start)
    assert (ours.video - plain.video).abs().max() < 1 / 255


def test_a_vae_that_cannot_be_folded(pipe: Any) -> None:
    pipe.vae.encoder.nonlinearity = nn.GELU()
    inputs = make_inputs("i2v")
    plain = generate(pipe, inputs)
    before = names(pipe)
    with pytest.raises(UnsupportedVAEError, match="nonlinearity"):
        accelerate(pipe, "fast")
    assert_untouched(pipe, before)
    accelerate(pipe, "exact")
    assert generate(pipe, inputs).same_as(plain)
    # Refusing a mode leaves the one that is on.
    with pytest.raises(UnsupportedVAEError, match="nonlinearity"):
        accelerate(pipe, "fast")
    assert generate(pipe, inputs).frames == 1


def test_an_error_in_between_leaves_nothing_behind(pipe: Any) -> None:
    accelerate(pipe, "exact")
    inputs = make_inputs("v2v")
    plain = generate(pipe, inputs)
    failing = pipe.vae.encoder.conv_out.register_forward_pre_hook(_fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        generate(pipe, inputs)
    failing.remove()
    with pytest.raises(ValueError, match="Pass either"):
        generate(pipe, {**inputs, "image": make_inputs("i2v")["image"]})
    assert not pipe.vae.quant_conv._forward_hooks
    assert generate(pipe, inputs).same_as(plain)
    pixels = torch.zeros(1, 3, FRAMES, 32, 32)
    assert torch.equal(pipe._encode_video(pixels), Cosmos3OmniPipeline._encode_video(pipe, pixels))


def _fail(module: Any, args: Any) -> None:
    raise RuntimeError("on purpose")


class Overriding(Cosmos3OmniPipeline):
    def _encode_video(self, x: torch.Tensor) -> torch.Tensor:
        return super()._encode_video(x)


class Renamed(Cosmos3OmniPipeline):
    pass


@pytest.mark.parametrize("thing", [None, object(), nn.Linear(1, 1), "pipe"])
def test_other_objects_are_refused(thing: Any) -> None:
    with pytest.raises(TypeError, match="must be a VAE or a pipeline"):
        accelerate(thing)
    restore(thing)


def test_unknown_modes_are_refused(pipe: Any) -> None:
    before = names(pipe)
    with pytest.raises(ValueError, match="must be one of exact, fast, off, got 'quick'"):
        accelerate(pipe, "quick")
    assert_untouched(pipe, before)


def test_subclasses(pipe: Any) -> None:
    inputs = make_inputs("i2v")
    components = {**pipe.components, "enable_safety_checker": False}
    plain = generate(pipe, inputs)
    for cls in (Overriding, Renamed):
        other = cls(**components)
        other.set_progress_bar_config(disable=True)
        accelerate(other, "exact")
        ours = generate(other, inputs)
        assert ours.same_as(plain)
        assert ours.frames == 1
        restore(other)


def test_somebody_elses_patch_is_left_in_force(pipe: Any) -> None:
    inputs = make_inputs("i2v")
    plain = generate(pipe, inputs)
    original = type(pipe).prepare_latents
    called = []

    def prepare_latents(*args: Any, **kwargs: Any) -> Any:
        called.append(None)
        return inspect.unwrap(original)(pipe, *args, **kwargs)

    pipe.prepare_latents = prepare_latents
    accelerate(pipe, "exact")
    ours = generate(pipe, inputs)
    assert called
    assert ours.same_as(plain)
    assert ours.frames == FRAMES


def test_another_release_is_encoded_whole(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs("i2v")
    plain = generate(pipe, inputs)
    original = inspect.unwrap(Cosmos3OmniPipeline.prepare_latents)

    def prepare_latents(self: Any, **given: Any) -> Any:
        return original(self, **given)

    monkeypatch.setattr(Cosmos3OmniPipeline, "prepare_latents", prepare_latents)
    accelerate(pipe, "exact")
    ours = generate(pipe, inputs)
    assert ours.same_as(plain)
    assert ours.frames == FRAMES


@pytest.mark.parametrize("make", [make_pipe, make_modular])
def test_pickles(make: Any) -> None:
    inputs = make_inputs("i2v")
    pipe = make()
    plain = generate(pipe, inputs)
    other = pickle.loads(pickle.dumps(accelerate(pipe, "exact")))
    ours = generate(other, inputs)
    assert ours.same_as(plain)
    assert ours.frames == 1


def test_a_copy_with_another_vae_encodes_with_that(pipe: Any) -> None:
    inputs = make_inputs("i2v")
    accelerate(pipe, "exact")
    other = copy.copy(pipe)
    other.vae = make_pipe(seed=1).vae
    plain = make_pipe()
    plain.vae = other.vae
    assert generate(other, inputs).same_as(generate(restore(plain), inputs))


def test_a_failed_encode_leaves_the_generator_as_the_engine_does(pipe: Any) -> None:
    states = []
    for mode in ("off", "exact"):
        accelerate(pipe, mode)
        generator = torch.Generator().manual_seed(0)
        failing = pipe.vae.encoder.conv_out.register_forward_pre_hook(_fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            pipe(prompt="a cat", generator=generator, num_inference_steps=1, **make_inputs("i2v"))
        failing.remove()
        states.append(generator.get_state())
    assert torch.equal(*states)


def test_nothing_keeps_a_removed_vae_alive(pipe: Any) -> None:
    accelerate(pipe)
    generate(pipe, make_inputs("i2v"))
    reference = weakref.ref(pipe.vae)
    pipe.vae = None
    gc.collect()
    assert reference() is None
