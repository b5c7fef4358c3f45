"""Fast mode: single frames through the folded encoder, the VAE left where it is."""

from __future__ import annotations

import copy
import inspect
from types import SimpleNamespace

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors.torch import save_file
from sglang.multimodal_gen.runtime.managers.memory_managers.component_manager import (
    ComponentResidencyManager,
)
from sglang.multimodal_gen.runtime.managers.memory_managers.component_residency_strategies import (
    ComponentResidencyStrategy,
)
from sglang.multimodal_gen.runtime.post_training.weights_updater import WeightsUpdater
from sglang_engine import (
    CLEARS_PIXELS,
    HAS_PLUGINS,
    SERVER_ARGS,
    AutoencoderKLWan,
    make_batch,
    make_stage,
    make_vae,
    outputs,
    patched,
    pixel_frames_encoded,
    run,
)
from torch import Tensor

from cosmos3_fast.engines import sglang as engine
from cosmos3_fast.vae.live import seam
from cosmos3_fast.vae.networks.encoder import FrameEncoder
from cosmos3_fast.vae.verify import FLOAT32_BOUND


def pixels(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator) * 2 - 1


IMAGE = pixels(1, 3, 32, 48)
CLIP = pixels(1, 3, 17, 32, 48)


@pytest.fixture
def stage():
    return make_stage(make_vae(base_dim=8))


def conditioned(stage, image: Tensor) -> Tensor:
    """The conditioned latent frame, as it lies on the batch."""
    batch = make_batch(image, height=image.shape[2], width=image.shape[3])
    return run(stage, batch).latents[:, :, :1]


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def errors(vae, images: list[Tensor]) -> tuple[float, float]:
    """Of fast and of exact mode, against the VAE with the same weights in float64."""
    stage = make_stage(vae)
    precise = make_stage(copy.deepcopy(vae).double())
    with torch.inference_mode():
        wanted = torch.cat([precise._vae_encode(i.bfloat16().double()[:, :, None]) for i in images])
    found = []
    for mode in ("fast", "exact"):
        with patched(mode):
            make_stage(vae)  # which makes the VAE ready
            with pixel_frames_encoded(vae) as seen:
                latents = torch.cat([conditioned(stage, image) for image in images])
        if mode == "exact":
            assert len(seen) == len(images)
        found.append(rms(latents - wanted))
    return found[0], found[1]


def test_bf16_error_is_no_larger_than_the_engines_own():
    images = [pixels(1, 3, 48, 64, seed=seed) for seed in range(4)]
    fast, exact = errors(make_vae(base_dim=32), images)
    assert 0 < fast <= exact


def test_full_topology_is_accepted_and_within_bounds():
    fast, exact = errors(
        make_vae(base_dim=160), [pixels(1, 3, 32, 48, seed=seed) for seed in range(6)]
    )
    assert 0 < fast <= exact


def test_fp32_vae_differs_by_rounding_to_bf16_alone():
    stage = make_stage(make_vae(torch.float32))
    with patched("exact"):
        exact = conditioned(stage, IMAGE).double()
    with patched("fast"), pixel_frames_encoded(stage.vae) as seen:
        first = conditioned(stage, IMAGE)
        seen.clear()  # folding probes the VAE
        fast = conditioned(stage, IMAGE).double()
    assert seen == []
    assert torch.equal(first.double(), fast)
    # 1e-5 of the largest value in float32, and one bf16 ulp where that crosses a tie.
    bound = exact.abs() * 2**-7 + 1e-5 * exact.abs().max()
    assert ((fast - exact).abs() <= bound).all()


def test_all_but_the_conditioned_latents_is_as_in_exact_mode(stage):
    def both(**case):
        for mode in ("exact", "fast"):
            with patched(mode):
                yield outputs(run(stage, make_batch(**case)))

    exact, fast = both(image=pixels(2, 3, 32, 48), sound_duration=0.5)
    assert not torch.equal(exact["latents"], fast["latents"])
    assert torch.equal(exact["latents"][:, :, 1:], fast["latents"][:, :, 1:])
    assert torch.equal(fast["latents"][:, :, :1], fast["extra"]["condition_latents"][:, :, :1])
    assert torch.equal(exact["extra"]["velocity_mask"], fast["extra"]["velocity_mask"])
    assert torch.equal(exact["audio_latents"], fast["audio_latents"])
    assert torch.equal(exact["generator"], fast["generator"])
    assert (fast["preprocessed_image"] is None) == CLEARS_PIXELS


def test_single_frames_are_fast_and_clips_exact(stage, monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(type(stage), "log_info", lambda _, message, *args: lines.append(message))
    exact = run(stage, make_batch(video=CLIP)).latents
    with patched("fast"):
        clip = run(stage, make_batch(video=CLIP)).latents
        run(stage, make_batch(IMAGE))
        with pixel_frames_encoded(stage.vae) as seen:
            run(stage, make_batch(video=CLIP, condition_frame_indexes=[0]))
    assert torch.equal(clip, exact)
    assert seen == []
    assert [line for line in lines if "cosmos3_fast" in line] == [
        "cosmos3_fast (exact) encoded 5 of 17 pixel frames",
        "cosmos3_fast (fast) encoded 1 of 1 pixel frames",
        "cosmos3_fast (fast) encoded 1 of 17 pixel frames",
    ]


def test_the_image_matters(stage):
    with patched("fast"):
        assert not torch.equal(conditioned(stage, IMAGE), conditioned(stage, -IMAGE))


def test_new_weights_are_folded_again(stage, tmp_path):
    # The seed also gives latent statistics, which are configuration, not weights.
    new = make_vae(base_dim=8)
    new.load_state_dict(make_vae(base_dim=8, seed=1).state_dict())
    with patched("fast"):
        before = conditioned(stage, IMAGE)
        assert torch.equal(conditioned(stage, IMAGE), before)
        (tmp_path / "vae").mkdir()
        save_file(dict(new.named_parameters()), tmp_path / "vae" / "model.safetensors")
        pipeline = SimpleNamespace(modules={"vae": stage.vae})
        assert WeightsUpdater(pipeline).update_weights_from_disk(
            str(tmp_path), target_modules=["vae"]
        )[0]
        after = conditioned(stage, IMAGE)
        replaced = make_stage(new)
        assert torch.equal(conditioned(replaced, IMAGE), after)
        stage.vae = make_vae(base_dim=8)
        assert torch.equal(conditioned(stage, IMAGE), before)
    assert not torch.equal(before, after)


def test_the_weights_are_folded_once(stage, monkeypatch):
    folds: list[object] = []
    from_vae = FrameEncoder.from_vae
    monkeypatch.setattr(
        FrameEncoder,
        "from_vae",
        lambda vae, **options: folds.append(vae) or from_vae(vae, **options),
    )
    with patched("fast"):
        conditioned(stage, IMAGE)
        # As offloading does between uses: other storage for the same parameters.
        stage.vae.float().bfloat16()
        conditioned(stage, IMAGE)
    assert len(folds) == 1


def test_the_conditioning_cache_serves_fast_encodes(stage, conditioning):
    cache = conditioning.ConditioningCache(64 * 1024**2)
    with patched("fast"):
        fresh = conditioned(stage, IMAGE)
        with cache.scope():
            first, again = conditioned(stage, IMAGE), conditioned(stage, IMAGE)
            assert cache.stats()["hits"] == 1
            assert not torch.equal(conditioned(stage, -IMAGE), first)
    assert torch.equal(first, fresh)
    assert torch.equal(again, fresh)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda vae: setattr(vae.encoder, "nonlinearity", torch.nn.ReLU()), "nonlinearity"),
        (
            lambda vae: vae.encoder.mid_block.register_forward_pre_hook(lambda *_: None),
            "vae.encoder.mid_block has forward hooks",
        ),
    ],
)
def test_a_vae_that_cannot_be_folded_is_used_itself(stage, change, reason, caplog):
    change(stage.vae)
    exact = conditioned(stage, IMAGE)
    with patched("fast"), pixel_frames_encoded(stage.vae) as seen:
        assert torch.equal(conditioned(stage, IMAGE), exact)
        seen.clear()
        assert torch.equal(conditioned(stage, IMAGE), exact)
    assert seen == [1]
    loggers = {engine.logger.name, seam.logger.name}
    warnings = [record for record in caplog.records if record.name in loggers]
    assert len(warnings) == 1
    assert reason in warnings[0].getMessage()


def test_a_parallel_vae_is_used_itself(stage, monkeypatch, caplog):
    seen: list[int] = []

    def encode(self, x: Tensor) -> DiagonalGaussianDistribution:
        seen.append(x.shape[2])
        return DiagonalGaussianDistribution(torch.full((1, 96, 1, 2, 3), 2.0))

    monkeypatch.setattr(AutoencoderKLWan, "encode", encode)
    stage.vae.encoder.world_size = 2
    with patched("fast"):
        make_stage(stage.vae)
        seen.clear()
        conditioned(stage, IMAGE)
    assert seen == [1]
    assert "in parallel over ranks" in caplog.text


class Placement(ComponentResidencyStrategy):
    """Records when a component is wanted on the device and when it may leave."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def prepare_for_use(self, module, use, state) -> None:
        self.events.append("prepare")

    def finish_use(self, module, use, state) -> None:
        self.events.append("finish")


def placements(stage, batch) -> list[str]:
    """What SGLang's residency manager does with the VAE while the stage runs."""
    strategy = Placement()
    pipeline = SimpleNamespace(
        modules={"vae": stage.vae},
        _stage_name_mapping={"latents": stage},
        component_residency_strategies={"vae": strategy},
        get_module=lambda name: {"vae": stage.vae}[name],
    )
    manager = ComponentResidencyManager(pipeline, SERVER_ARGS)
    manager.refresh_pipeline(pipeline)
    stage.set_component_residency_manager(manager)
    manager.begin_request([stage], batch, SERVER_ARGS)
    manager.before_stage(stage, 0, batch, SERVER_ARGS)
    manager.begin_stage()
    run(stage, batch)
    manager.end_stage()
    stage.set_component_residency_manager(None)
    return strategy.events


@pytest.mark.parametrize("case", [{"image": IMAGE}, {"video": CLIP}, {}])
def test_exact_mode_places_the_vae_as_the_engine_does(stage, case):
    unpatched = placements(stage, make_batch(**case))
    assert unpatched == ["prepare", "finish"]
    with patched("exact"):
        assert placements(stage, make_batch(**case)) == unpatched


@pytest.mark.skipif(HAS_PLUGINS, reason="this release can be told that the VAE is not used")
def test_fast_mode_without_plugins_places_the_vae_as_the_engine_does(stage):
    unpatched = placements(stage, make_batch(IMAGE))
    with patched("fast"):
        assert placements(stage, make_batch(IMAGE)) == unpatched


@pytest.mark.skipif(not HAS_PLUGINS, reason="this release fetches the VAE for each request")
def test_fast_mode_leaves_the_vae_away_but_for_clips(stage):
    with patched("fast"):
        conditioned(stage, IMAGE)
        # "finish" alone: weights that an earlier use left on the device are released.
        assert placements(stage, make_batch(IMAGE)) == ["finish"]
        assert placements(stage, make_batch()) == ["finish"]
        assert placements(stage, make_batch(video=CLIP)) == ["prepare", "finish"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_stages_decode_one_frame_through_the_folded_decoder(dtype):
    """As the engine's own: float32 pixels whatever the VAE computes in."""
    vae = make_vae(dtype, base_dim=8)
    for name, parameter in vae.decoder.named_parameters():
        generator = torch.Generator().manual_seed(len(name))
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    latents = pixels(2, 48, 1, 2, 3).to(dtype)
    with torch.inference_mode(), patched("fast"):
        theirs = vae.decode(latents)
        make_stage(vae)
        ours = vae.decode(latents)
        if "on_frames" in inspect.signature(type(vae).decode).parameters:
            assert torch.equal(vae.decode(latents, on_frames=None), ours)
            chunks: list[Tensor] = []
            assert torch.equal(vae.decode(latents, on_frames=chunks.append), ours)
            assert torch.equal(torch.cat(chunks, 2), ours)
    assert ours.dtype == theirs.dtype == torch.float32
    assert ours.shape == theirs.shape
    error = (ours - theirs).abs().max() / theirs.abs().max()
    # In 16 bits both are roundings of one value, eight bits of it.
    assert 0 < error < {torch.float32: FLOAT32_BOUND, torch.bfloat16: 2**-4}[dtype]


@pytest.mark.parametrize("mode", ["fast", "fast,clips"])
def test_clips_are_decoded_by_the_folded_decoder_where_that_is_asked_for(mode):
    """Also where each chunk is called for as it is done."""
    vae = make_vae(torch.float32, base_dim=8)
    for name, parameter in vae.decoder.named_parameters():
        generator = torch.Generator().manual_seed(len(name))
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    latents = pixels(2, 48, 3, 2, 3)
    with torch.inference_mode(), patched(mode):
        theirs = vae.decode(latents)
        make_stage(vae)
        ours = vae.decode(latents)
        assert torch.equal(ours, theirs) == (mode == "fast")
        if "on_frames" in inspect.signature(type(vae).decode).parameters:
            chunks: list[Tensor] = []
            assert torch.equal(vae.decode(latents, on_frames=chunks.append), ours)
            assert torch.equal(torch.cat(chunks, 2), ours)
            assert len(chunks) > 1
    assert ours.dtype == theirs.dtype == torch.float32
    assert (ours - theirs).abs().max() <= FLOAT32_BOUND * theirs.abs().max()


@pytest.mark.parametrize("mode", ["fast", "fast,graphs", "fast,clips,graphs"])
def test_graphs_where_they_are_asked_for(mode):
    vae = make_vae()
    with patched(mode):
        stage = make_stage(vae)
        choice = seam.choice_of(vae)
        assert (choice.clips, choice.graphs) == ("clips" in mode, "graphs" in mode)
        run(stage, make_batch(IMAGE))
        assert seam.last_encoding(vae).path == "fast"


def test_clips_are_encoded_by_the_folded_encoder_where_that_is_asked_for(stage):
    plain = run(stage, make_batch(video=CLIP)).latents[:, :, :2]
    with patched("fast,clips"):
        ours = run(make_stage(stage.vae), make_batch(video=CLIP)).latents[:, :, :2]
        encoding = seam.last_encoding(stage.vae)
    assert (encoding.path, encoding.pixel_frames) == ("fast", 5)
    # Both are roundings to 16 bits of one value.
    assert 0 < (ours - plain).abs().max() <= 2**-4 * plain.abs().max()
