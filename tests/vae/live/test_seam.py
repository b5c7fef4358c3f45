"""A live VAE on the seam: short cuts, everything else its own, and what users do to it."""

from __future__ import annotations

import copy
import gc
import inspect
import logging
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from cosmos3_fast import UnsupportedVAEError, accelerate, refresh, restore
from cosmos3_fast.vae.live import seam
from cosmos3_fast.vae.live.announce import wanted_frames
from cosmos3_fast.vae.live.engine import Engine
from cosmos3_fast.vae.live.seam import last_encoding
from cosmos3_fast.vae.networks.decoder import FrameDecoder
from cosmos3_fast.vae.networks.encoder import FrameEncoder
from cosmos3_fast.vae.synthetic import COSMOS3_VAE_CONFIG, synthetic_vae

diffusers = pytest.importorskip("diffusers")


def make_vae(family: str = "wan22", seed: int = 0) -> Any:
    torch.manual_seed(seed)
    if family == "wan22":
        config = {**COSMOS3_VAE_CONFIG, "base_dim": 16, "z_dim": 8}
        vae = synthetic_vae(config, seed, decoder_base_dim=8)
    elif family == "wan21":
        vae = diffusers.AutoencoderKLWan(base_dim=8, num_res_blocks=1)
    else:
        vae = diffusers.AutoencoderKLQwenImage(base_dim=8, num_res_blocks=1)
    return vae.requires_grad_(False).eval()


def pixels(frames: int = 1, batch: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(batch, 3, frames, 32, 64, generator=generator, dtype=torch.float32) * 2 - 1


def latents(vae: Any, frames: int = 1, batch: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    shape = (batch, vae.config.z_dim, frames, 2, 4)
    return torch.randn(shape, generator=generator, dtype=torch.float32)


def parameters(vae: Any, x: torch.Tensor) -> torch.Tensor:
    return vae.encode(x).latent_dist.parameters


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    # DESIGN's bound for float32.
    return bool((ours - theirs).abs().max() <= 1e-5 * theirs.abs().max())


@pytest.fixture(params=["wan22", "wan21", "qwen"])
def vae(request: pytest.FixtureRequest) -> Any:
    return make_vae(request.param)


@pytest.fixture
def wan() -> Any:
    return make_vae()


def assert_own(vae: Any, x: torch.Tensor, wanted: torch.Tensor) -> None:
    assert torch.equal(parameters(vae, x), wanted)
    encoding = last_encoding(vae)
    assert encoding is not None
    assert encoding.path == "whole"


@pytest.mark.parametrize("slicing", [False, True])
def test_one_frame_is_folded_in_both_directions(vae: Any, slicing: bool) -> None:
    x, z = pixels(batch=2), latents(vae, batch=2)
    vae.use_slicing = slicing
    encoded, decoded = vae.encode(x), vae.decode(z)
    accelerate(vae)
    ours, ours_decoded = vae.encode(x), vae.decode(z)
    assert last_encoding(vae).path == "fast"
    assert type(ours) is type(encoded)
    assert type(ours.latent_dist) is type(encoded.latent_dist)
    assert close(ours.latent_dist.mean, encoded.latent_dist.mean)
    assert close(ours.latent_dist.logvar, encoded.latent_dist.logvar)
    assert not torch.equal(ours.latent_dist.parameters, encoded.latent_dist.parameters)
    assert type(ours_decoded) is type(decoded)
    assert close(ours_decoded.sample, decoded.sample)
    assert not torch.equal(ours_decoded.sample, decoded.sample)
    assert isinstance(vae.encode(x, return_dict=False), tuple)
    assert torch.equal(vae.decode(z, return_dict=False)[0], ours_decoded.sample)
    samples = [
        each.latent_dist.sample(torch.Generator().manual_seed(0)) for each in (ours, encoded)
    ]
    assert close(*samples)


def test_clips_are_the_vaes_own_where_that_is_chosen(vae: Any) -> None:
    x, z = pixels(9), latents(vae, 2)
    encoded, decoded = parameters(vae, x), vae.decode(z).sample
    accelerate(vae, clips=False)
    assert torch.equal(parameters(vae, x), encoded)
    assert torch.equal(vae.decode(z).sample, decoded)


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 7])
def test_announced_frames(vae: Any, mode: str, count: int) -> None:
    x = pixels(9)
    whole = parameters(vae, x)
    accelerate(vae, mode, clips=False)
    with wanted_frames(count):
        ours = parameters(vae, x)
    assert ours.shape == whole.shape
    if mode == "fast" and count == 1:
        assert close(ours[:, :, :1], whole[:, :, :1])
    else:
        assert torch.equal(ours[:, :, :count], whole[:, :, :count])
    assert not ours[:, :, count:].any()
    assert last_encoding(vae).pixel_frames == {0: 0, 1: 1, 2: 5}.get(count, 9)
    assert torch.equal(parameters(vae, x), whole)


def change_in_place(vae: Any) -> None:
    vae.encoder.conv_in.weight.mul_(1.5)


def load(vae: Any) -> None:
    vae.load_state_dict(make_vae(seed=1).state_dict())


def load_by_assignment(vae: Any) -> None:
    vae.load_state_dict(make_vae(seed=1).state_dict(), assign=True)
    vae.requires_grad_(False)


def replace(vae: Any) -> None:
    weight = vae.quant_conv.weight
    vae.quant_conv.weight = nn.Parameter(weight * 2, requires_grad=False)


def write_data(vae: Any) -> None:
    vae.encoder.conv_in.weight.data.mul_(1.5)
    refresh(vae)


@pytest.mark.parametrize("change", [change_in_place, load, load_by_assignment, replace, write_data])
def test_weights_are_followed(wan: Any, change: Any) -> None:
    accelerate(wan)
    before = parameters(wan, pixels())
    change(wan)
    ours = parameters(wan, pixels())
    assert last_encoding(wan).path == "fast"
    theirs = parameters(restore(wan), pixels())
    assert close(ours, theirs)
    assert not close(before, theirs)


def test_another_dtype_is_followed(wan: Any) -> None:
    accelerate(wan)
    wan.double()
    ours = parameters(wan, pixels().double())
    assert ours.dtype == torch.float64
    assert last_encoding(wan).path == "fast"
    assert close(ours, parameters(restore(wan), pixels().double()))


def hook_forward(vae: Any) -> None:
    vae.encoder.register_forward_hook(lambda module, args, out: out * 1.5)


def hook_before(vae: Any) -> None:
    vae.encoder.conv_in.register_forward_pre_hook(lambda module, args: (args[0] * 2, *args[1:]))


def parametrize(vae: Any) -> None:
    class Double(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight * 2

    nn.utils.parametrize.register_parametrization(vae.encoder.conv_in, "weight", Double())


def compile_encoder(vae: Any) -> None:
    vae.encoder.compile(backend="eager")


def tile(vae: Any) -> None:
    vae.enable_tiling(16, 16, 16, 16)


def cast_layers(vae: Any) -> None:
    vae.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)


def offload_layers(vae: Any) -> None:
    pytest.importorskip("accelerate").cpu_offload(vae, torch.device("cpu"))


OBSTACLES = [
    hook_forward,
    hook_before,
    parametrize,
    compile_encoder,
    tile,
    cast_layers,
    offload_layers,
]


@pytest.mark.parametrize("order", ["before", "after", "after use"])
@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_obstacles_leave_the_vae_its_own_path(
    wan: Any, obstacle: Any, order: str, caplog: pytest.LogCaptureFixture
) -> None:
    plain = copy.deepcopy(wan)
    obstacle(plain)
    wanted = parameters(plain, pixels())
    with caplog.at_level(logging.WARNING):
        if order == "before":
            obstacle(wan)
            accelerate(wan)
        else:
            accelerate(wan)
            if order == "after use":
                wan.encode(pixels())
            obstacle(wan)
        for _ in range(2):
            assert_own(wan, pixels(), wanted)
    warnings = [r for r in caplog.records if "own encode runs" in r.getMessage()]
    assert len(warnings) == 1


def test_what_is_told_once_is_not_told_for_every_size(
    wan: Any, caplog: pytest.LogCaptureFixture
) -> None:
    accelerate(wan).enable_tiling(16, 16, 16, 16)
    for height in (32, 48, 64):
        x = torch.zeros(1, 3, 1, height, 32)
        wan.encode(x)
        assert "exceeds a tile of 16x16 pixels" in last_encoding(wan).reason
        wan.decode(torch.zeros(1, wan.config.z_dim, 1, height // 16, 2))
    assert caplog.text.count("own encode runs") == 1
    assert caplog.text.count("own decode runs") == 1
    accelerate(wan, "exact").disable_tiling()
    wan.use_feature_cache = False
    for frames in (5, 9):
        with wanted_frames(1):
            wan.encode(torch.zeros(1, 3, frames, 32, 32))
    assert caplog.text.count("all frames of a clip are encoded") == 1


def test_a_gradient_that_is_wanted(wan: Any) -> None:
    accelerate(wan)
    x = pixels().requires_grad_()
    parameters(wan, x).sum().backward()
    assert x.grad.abs().sum() > 0
    with torch.no_grad():
        wan.encode(x)
    assert last_encoding(wan).path == "fast"


def test_autocast(wan: Any) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        wanted = parameters(wan, pixels())
        accelerate(wan)
        assert_own(wan, pixels(), wanted)


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_is_wanted_under_autocast(wan: Any, mode: str, dtype: torch.dtype) -> None:
    accelerate(wan.to(dtype), mode)
    x = pixels(9).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = parameters(wan, x)
        with wanted_frames(0):
            ours = parameters(wan, x)
    assert last_encoding(wan).path == "none"
    assert (ours.shape, ours.dtype) == (wanted.shape, wanted.dtype)


def test_defaults_of_the_user_change_nothing(wan: Any) -> None:
    x, z = pixels(), latents(wan)
    accelerate(wan)
    wanted = parameters(wan, x), wan.decode(z).sample
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            accelerate(wan)
            ours = parameters(wan, x), wan.decode(z).sample
    finally:
        torch.set_default_dtype(torch.float32)
    assert last_encoding(wan).path == "fast"
    assert all(map(torch.equal, ours, wanted))


def test_the_random_state_is_left_alone(wan: Any) -> None:
    before = torch.get_rng_state()
    accelerate(wan).encode(pixels())
    assert torch.equal(torch.get_rng_state(), before)


def test_compiled_callers(wan: Any) -> None:
    accelerate(wan)

    @torch.compile(backend="eager")
    def run(x: torch.Tensor) -> torch.Tensor:
        return parameters(wan, x)

    ours = run(pixels())
    assert torch.equal(ours, parameters(restore(wan), pixels()))


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda vae: pickle.loads(pickle.dumps(vae))]
)
def test_copies_are_accelerated_by_themselves(wan: Any, copied: Any) -> None:
    accelerate(wan).encode(pixels())
    other = copied(wan)
    wanted = parameters(wan, pixels())
    restore(wan)
    assert torch.equal(parameters(other, pixels()), wanted)
    assert last_encoding(other).path == "fast"


def test_nothing_keeps_the_vae_alive() -> None:
    vae = accelerate(make_vae())
    vae.encode(pixels())
    reference = weakref.ref(vae)
    gc.collect()
    gc.disable()
    try:
        del vae
        assert reference() is None
    finally:
        gc.enable()


def test_what_shows_of_the_vae_is_as_before(wan: Any, tmp_path: Any) -> None:
    cls = type(wan)
    names, before = list(wan.state_dict()), sorted(vars(wan))
    accelerate(wan)
    assert list(wan.state_dict()) == names
    assert list(inspect.signature(wan.encode).parameters) == ["x", "return_dict"]
    assert inspect.getdoc(cls.encode).startswith("Encode a batch")
    wan.save_pretrained(tmp_path)
    assert not any("cosmos3_fast" in path.read_text() for path in tmp_path.glob("*.json"))
    assert list(cls.from_pretrained(tmp_path).state_dict()) == names
    wan.encode(pixels())
    restore(wan)
    assert sorted(set(vars(wan)) - set(before)) == [] or "_cosmos3_fast" not in vars(wan)


def test_subclasses_that_override_encode() -> None:
    class Halved(diffusers.AutoencoderKLWan):
        def encode(self, x: torch.Tensor, return_dict: bool = True) -> Any:
            return super().encode(x * 0.5, return_dict)

    vae = make_vae("wan21")
    accelerate(vae)
    vae.__class__ = Halved
    restore(vae)
    # The probe sees that it computes something else.
    with pytest.raises(UnsupportedVAEError, match="computes something"):
        accelerate(vae)
    wanted = parameters(vae, pixels())
    accelerate(vae, "exact")
    assert torch.equal(parameters(vae, pixels()), wanted)


class Tensors(nn.Module):
    """A VAE whose `encode` and `decode` return plain tensors, the mean normalised or not."""

    def __init__(self, vae: Any, normalized: bool) -> None:
        super().__init__()
        for name in ("encoder", "quant_conv", "decoder", "post_quant_conv"):
            setattr(self, name, getattr(vae, name))
        self.__dict__["inner"], self.config, self.normalized = vae, vae.config, normalized

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        mean = self.inner.encode(x).latent_dist.mean
        if not self.normalized:
            return mean
        shape = (1, -1, 1, 1, 1)
        statistics = (self.config.latents_mean, self.config.latents_std)
        offset, scale = (torch.tensor(values).view(shape) for values in statistics)
        return (mean - offset) / scale

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return self.inner.decode(z).sample


@pytest.mark.parametrize("normalized", [False, True])
def test_plain_tensors(wan: Any, normalized: bool) -> None:
    vae = Tensors(wan, normalized)
    wanted = vae.encode(pixels()), vae.decode(latents(wan))
    accelerate(vae)
    ours = vae.encode(pixels()), vae.decode(latents(wan))
    assert last_encoding(vae).path == "fast"
    assert all(map(close, ours, wanted))


def test_padding_kept_in_the_convolutions(wan: Any) -> None:
    wanted = parameters(wan, pixels())
    for module in wan.encoder.modules():
        if isinstance(module, nn.Conv3d) and any(module._padding):
            left, right, top, bottom, front, back = module._padding
            if left == right == top == bottom:
                module.padding = (0, top, left)
                module._padding = (0, 0, 0, 0, front, back)
    assert torch.equal(parameters(wan, pixels()), wanted)
    accelerate(wan)
    assert close(parameters(wan, pixels()), wanted)
    assert last_encoding(wan).path == "fast"


def without_encoder(vae: Any) -> None:
    del vae.encoder


def wrapped_encoder(vae: Any) -> None:
    vae.encoder = nn.Sequential(vae.encoder)


def other_nonlinearity(vae: Any) -> None:
    vae.encoder.nonlinearity = nn.GELU()


@pytest.mark.parametrize("fault", [without_encoder, wrapped_encoder, other_nonlinearity])
def test_other_networks_are_refused(wan: Any, fault: Any) -> None:
    fault(wan)
    with pytest.raises(UnsupportedVAEError):
        accelerate(wan)
    assert "_cosmos3_fast" not in vars(wan)


def test_a_failed_encode_leaves_nothing_behind(wan: Any) -> None:
    accelerate(wan, "exact")
    with wanted_frames(2):
        wanted = parameters(wan, pixels(9))
        handle = wan.encoder.conv_out.register_forward_pre_hook(lambda module, args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            wan.encode(pixels(9))
        handle.remove()
        assert torch.equal(parameters(wan, pixels(9)), wanted)
    assert not wan.quant_conv._forward_hooks


def test_any_values_are_encoded(vae: Any) -> None:
    """The VAE's own encode takes them, also pixels that were never brought to [-1, 1]."""
    x = 255 * pixels()
    wanted = parameters(vae, x)
    accelerate(vae)
    ours = parameters(vae, x)
    assert last_encoding(vae).path == "fast"
    assert close(ours, wanted)


@pytest.mark.parametrize("wrong", [lambda y: y[:, :1], lambda y: y.double()])
@pytest.mark.parametrize(
    ("network", "method", "run", "make"),
    [
        (FrameEncoder, "forward", parameters, lambda vae: pixels()),
        (
            FrameDecoder,
            "decode_unnormalized",
            lambda vae, z: vae.decode(z).sample,
            latents,
        ),
    ],
)
def test_a_result_of_another_form_is_not_given_out(
    wan: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    wrong: Any,
    network: Any,
    method: str,
    run: Any,
    make: Any,
) -> None:
    """The VAE's own code runs, then and from now on, with one warning."""
    x = make(wan)
    with torch.no_grad():
        own = run(wan, x)
        accelerate(wan)
        right, calls = getattr(network, method), []

        def other(self: Any, given: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            return wrong(right(self, given))

        monkeypatch.setattr(network, method, other)
        for _ in range(3):
            assert torch.equal(run(wan, x), own)
    assert len(calls) == 1
    assert len([r for r in caplog.records if "the folded network gave" in r.getMessage()]) == 1


def test_an_engines_cache_is_asked_first(wan: Any) -> None:
    """By the name of what is computed, which differs for clips of another length."""
    asked: list[str] = []
    kept: dict[Any, torch.Tensor] = {}

    def cached(name: str, encode: Any) -> Any:
        def method(vae: Any, frames: torch.Tensor) -> torch.Tensor:
            asked.append(name)
            key = (name, frames.shape, frames.sum().item())
            if key not in kept:
                kept[key] = encode(vae, frames)
            return kept[key].clone()

        return method

    clip = pixels(9)
    with torch.no_grad():
        seam.accelerate(wan, "fast", Engine(cached), clips=False)
        first = parameters(wan, pixels())
        assert torch.equal(parameters(wan, pixels()), first)
        with wanted_frames(2):
            head = parameters(wan, clip)
            assert torch.equal(parameters(wan, clip), head)
            parameters(wan, pixels(13))
    assert asked == [*["encode_folded"] * 2, *["encode_head_of_3"] * 2, "encode_head_of_4"]
    assert len(kept) == 3


def test_what_fetches_the_vae_is_called_before_its_own_code_only(wan: Any) -> None:
    fetched: list[int] = []
    pending: list[Any] = [lambda: fetched.append(1)]
    with torch.no_grad():
        seam.accelerate(wan, "fast", Engine(pending_fetch=lambda: pending[0], clips=False))
        wan.encode(pixels())
        assert fetched == []
        wan.encode(pixels(5))
        assert fetched == [1]
        pending[0] = None
        wan.encode(pixels(5))
    assert fetched == [1]


def test_a_decorator_that_hides_the_signature_is_seen_through(wan: Any) -> None:
    """As diffusers up to 0.41 decorates `encode` and `decode`."""

    class Hidden(type(wan)):
        def encode(self, *args: Any, **kwargs: Any) -> Any:
            return super().encode(*args, **kwargs)

    wan.__class__ = Hidden
    with torch.no_grad():
        own = parameters(wan, pixels())
        accelerate(wan)
        assert close(parameters(wan, pixels()), own)
        assert last_encoding(wan).path == "fast"
        (posterior,) = wan.encode(x=pixels(), return_dict=False)
        assert torch.equal(posterior.parameters, parameters(wan, pixels()))
        with pytest.raises(TypeError):
            wan.encode(pixels(), nonsense=True)


def test_forwards_that_the_engine_vouches_for(wan: Any) -> None:
    conv = wan.encoder.conv_in

    def fused(x: torch.Tensor, *args: Any) -> torch.Tensor:
        return type(conv).forward(conv, x, *args)

    conv.forward = fused
    wanted = parameters(wan, pixels())
    seam.accelerate(wan, "fast")
    assert_own(wan, pixels(), wanted)
    seam.accelerate(wan, "fast", Engine(is_equivalent=lambda forward: forward is fused))
    assert close(parameters(wan, pixels()), wanted)
    assert last_encoding(wan).path == "fast"


def test_copies_and_pickles_keep_the_engine(wan: Any) -> None:
    engine = Engine(is_equivalent=callable)
    seam.accelerate(wan, "exact", engine)
    assert seam.engine_of(copy.deepcopy(wan)) is engine
    assert seam.engine_of(pickle.loads(pickle.dumps(wan))) == engine
