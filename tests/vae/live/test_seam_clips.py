"""Clips on the seam: through the folded networks, or as they are, never wrong and never stopped."""

from __future__ import annotations

import copy
import logging
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import nn

from cosmos3_fast import accelerate, refresh, restore
from cosmos3_fast.vae.live import parts, seam
from cosmos3_fast.vae.live.announce import wanted_frames
from cosmos3_fast.vae.live.engine import Engine
from cosmos3_fast.vae.live.seam import last_encoding
from cosmos3_fast.vae.networks.decoder import ClipDecoder
from cosmos3_fast.vae.networks.encoder import ClipEncoder
from cosmos3_fast.vae.synthetic import COSMOS3_VAE_CONFIG, synthetic_vae
from cosmos3_fast.vae.verify import FLOAT32_BOUND, relative_error, rms

diffusers = pytest.importorskip("diffusers")


def make_vae(family: str = "wan22", seed: int = 0) -> Any:
    torch.manual_seed(seed)
    if family == "wan22":
        config = {**COSMOS3_VAE_CONFIG, "base_dim": 8, "z_dim": 4, "num_res_blocks": 1}
        return synthetic_vae(config, seed, decoder_base_dim=8)
    cls = diffusers.AutoencoderKLWan if family == "wan21" else diffusers.AutoencoderKLQwenImage
    return cls(base_dim=8, num_res_blocks=1).requires_grad_(False).eval()


@pytest.fixture
def wan() -> Any:
    return make_vae()


def pixels(frames: int = 9, batch: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(batch, 3, frames, 32, 32, generator=generator, dtype=torch.float32) * 2 - 1


def latents(vae: Any, frames: int = 3, batch: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    shape = (batch, vae.config.z_dim, frames, 2, 3)
    return torch.randn(shape, generator=generator, dtype=torch.float32)


def encode(vae: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return vae.encode(x).latent_dist.parameters


def decode(vae: Any, z: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return vae.decode(z).sample


def both(vae: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return encode(vae, pixels().to(vae.dtype)), decode(vae, latents(vae).to(vae.dtype))


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """By frame, in float32."""
    return ours.dtype == theirs.dtype and all(
        relative_error(a, b) <= FLOAT32_BOUND
        for a, b in zip(ours.unbind(2), theirs.unbind(2), strict=True)
    )


def has_folded(vae: Any) -> tuple[bool, bool]:
    """Whether there is a network for clips, of the encoder and of the decoder."""
    state = vars(vae)["_cosmos3_fast"]
    snapshots = [part._clip._snapshot for part in (state.encoder, state.decoder)]
    return tuple(each is not None and each.network is not None for each in snapshots)


def assert_own(vae: Any, wanted: tuple[torch.Tensor, ...]) -> None:
    assert all(map(torch.equal, both(vae), wanted))
    assert last_encoding(vae).path == "whole"


@pytest.mark.parametrize("slicing", [False, True])
@pytest.mark.parametrize("family", ["wan22", "wan21", "qwen"])
def test_both_directions(family: str, slicing: bool) -> None:
    vae = make_vae(family)
    vae.use_slicing = slicing
    x, z = pixels(9, 2), latents(vae, 3, 2)
    with torch.no_grad():
        encoded, decoded = vae.encode(x), vae.decode(z)
        accelerate(vae)
        vae.encode(x[:, :, :1])
        vae.decode(z[:, :, :1])
        assert has_folded(vae) == (False, False)
        ours, ours_decoded = vae.encode(x), vae.decode(z)
        assert (last_encoding(vae).path, last_encoding(vae).pixel_frames) == ("fast", 9)
        assert has_folded(vae) == (True, True)
        assert type(ours) is type(encoded)
        assert type(ours.latent_dist) is type(encoded.latent_dist)
        assert close(ours.latent_dist.mean, encoded.latent_dist.mean)
        assert close(ours.latent_dist.logvar, encoded.latent_dist.logvar)
        assert type(ours_decoded) is type(decoded)
        assert close(ours_decoded.sample, decoded.sample)
        assert not torch.equal(ours_decoded.sample, decoded.sample)
        assert torch.equal(vae.decode(z, return_dict=False)[0], ours_decoded.sample)
        assert isinstance(vae.encode(x, return_dict=False), tuple)
        # A clip's first frame is the frame.
        first = vae.encode(x[:, :, :1]).latent_dist.parameters
        assert torch.equal(ours.latent_dist.parameters[:, :, :1], first)


def test_sixteen_bits_are_no_further_from_float64_than_the_vae() -> None:
    vae = make_vae().bfloat16()
    own = both(vae)
    exact = both(copy.deepcopy(vae).double())
    rounded = pixels().bfloat16().double(), latents(vae).bfloat16().double()
    double = copy.deepcopy(vae).double()
    exact = encode(double, rounded[0]), decode(double, rounded[1])
    accelerate(vae)
    for ours, theirs, wanted in zip(both(vae), own, exact, strict=True):
        assert ours.dtype == torch.bfloat16
        assert not torch.equal(ours, theirs)
        assert rms(ours.double() - wanted) <= rms(theirs.double() - wanted)
    assert last_encoding(vae).path == "fast"


@pytest.mark.parametrize("products", ["float16", torch.float16])
def test_float16_products_of_a_float32_vae(wan: Any, products: Any) -> None:
    own = both(wan)
    accelerate(wan, products=products)
    ours = both(wan)
    state = vars(wan)["_cosmos3_fast"]
    assert state.decoder._clip._snapshot.network.roundings == (torch.float32, torch.float16)
    for mine, theirs in zip(ours, own, strict=True):
        assert mine.dtype == torch.float32
        # Eight bits finer than bfloat16, which is allowed 2^-8 a layer.
        assert FLOAT32_BOUND < relative_error(mine, theirs) < 2**-8


def test_odd_arguments_are_refused(wan: Any) -> None:
    with pytest.raises(ValueError, match=r"products must be torch.float16, 'float16' or None, got"):
        accelerate(wan, products="bfloat16")
    with pytest.raises(TypeError, match="clips must be True, False or None, got 1"):
        accelerate(wan, clips=1)  # type: ignore[arg-type]
    assert not seam.is_accelerated(wan)


def test_clips_stay_the_vaes_own_where_that_is_chosen(wan: Any) -> None:
    own = both(wan)
    accelerate(wan, clips=False)
    assert_own(wan, own)
    accelerate(wan, "exact")
    for other in (accelerate(wan), copy.deepcopy(wan), pickle.loads(pickle.dumps(wan))):
        assert_own(other, own)
    accelerate(wan, clips=True)
    assert all(map(close, both(wan), own))
    assert last_encoding(wan).path == "fast"
    accelerate(wan, "exact")
    assert_own(wan, own)
    # What an engine has by default is for whoever says nothing.
    seam.accelerate(restore(wan), engine=Engine(clips=False))
    assert_own(wan, own)
    seam.accelerate(wan, clips=True)
    both(wan)
    assert last_encoding(wan).path == "fast"


def test_copies_have_networks_of_their_own(wan: Any) -> None:
    wanted = both(accelerate(wan, products="float16"))
    for other in (copy.deepcopy(wan), pickle.loads(pickle.dumps(wan))):
        assert seam.choice_of(other) == seam.choice_of(wan)
        assert has_folded(other) == (False, False)
        assert all(map(torch.equal, both(other), wanted))


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_announced_frames(wan: Any, count: int) -> None:
    whole = encode(wan, pixels())
    accelerate(wan)
    with wanted_frames(count):
        ours = encode(wan, pixels())
    assert ours.shape == whole.shape
    if count:
        assert close(ours[:, :, :count], whole[:, :, :count])
    assert not ours[:, :, count:].any()
    encoding = last_encoding(wan)
    assert encoding.path == ("fast" if count else "none")
    assert encoding.pixel_frames == (4 * count - 3 if count else 0)


def test_a_rest_of_frames_is_the_vaes_to_judge(wan: Any) -> None:
    own = encode(wan, pixels(7))
    accelerate(wan)
    assert torch.equal(encode(wan, pixels(7)), own)
    assert last_encoding(wan).path == "whole"


def scale_in_place(vae: Any) -> None:
    vae.encoder.conv_in.weight.mul_(1.5)
    vae.decoder.conv_in.weight.mul_(1.5)


def load(vae: Any) -> None:
    vae.load_state_dict(make_vae(seed=1).state_dict())


def write_data(vae: Any) -> None:
    vae.encoder.conv_in.weight.data.mul_(1.5)
    vae.decoder.conv_in.weight.data.mul_(1.5)
    refresh(vae)


@pytest.mark.parametrize("change", [scale_in_place, load, write_data])
def test_weights_are_followed(wan: Any, change: Any) -> None:
    before = both(accelerate(wan))
    change(wan)
    ours = both(wan)
    assert last_encoding(wan).path == "fast"
    theirs = both(restore(wan))
    assert all(map(close, ours, theirs))
    assert not any(map(close, before, theirs))


def hook(vae: Any) -> None:
    vae.encoder.register_forward_hook(lambda module, args, out: out * 1.5)
    vae.decoder.register_forward_hook(lambda module, args, out: out * 1.5)


def parametrize(vae: Any) -> None:
    class Double(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight * 2

    for part in (vae.encoder, vae.decoder):
        nn.utils.parametrize.register_parametrization(part.conv_in, "weight", Double())


def compile_parts(vae: Any) -> None:
    vae.encoder.compile(backend="eager")
    vae.decoder.compile(backend="eager")


def tile(vae: Any) -> None:
    vae.enable_tiling(16, 16, 16, 16)


def cast_layers(vae: Any) -> None:
    vae.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)


def offload_layers(vae: Any) -> None:
    pytest.importorskip("accelerate").cpu_offload(vae, torch.device("cpu"))


@pytest.mark.parametrize("after_use", [False, True])
@pytest.mark.parametrize(
    "obstacle", [hook, parametrize, compile_parts, tile, cast_layers, offload_layers]
)
def test_obstacles_leave_clips_as_they_are(
    wan: Any, obstacle: Any, after_use: bool, caplog: pytest.LogCaptureFixture
) -> None:
    plain = copy.deepcopy(wan)
    obstacle(plain)
    wanted = both(plain)
    accelerate(wan)
    if after_use:
        both(wan)
    obstacle(wan)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert_own(wan, wanted)
    told = [r.getMessage() for r in caplog.records if "own" in r.getMessage()]
    assert sum("own encode runs" in each for each in told) == 1
    assert sum("own decode runs" in each for each in told) == 1


def test_a_gradient_that_is_wanted_goes_through_the_vae(wan: Any) -> None:
    accelerate(wan)
    z = latents(wan).requires_grad_()
    wan.decode(z).sample.sum().backward()
    assert z.grad.abs().sum() > 0
    assert has_folded(wan) == (False, False)


def out_of_memory(*args: Any, **kwargs: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def no_memory(*args: Any, **kwargs: Any) -> Any:
    raise MemoryError


def no_host_memory(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")


@pytest.mark.parametrize("where", ["from_vae", "forward"])
@pytest.mark.parametrize("fault", [out_of_memory, no_memory, no_host_memory])
def test_too_little_memory(
    wan: Any, fault: Any, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The VAE's own code, one warning, no second try, and the network is dropped."""
    own = both(wan)
    small = wan.decode(latents(wan, 2)).sample
    accelerate(wan)
    calls = []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        fault()

    with pytest.MonkeyPatch.context() as patch:
        for network, name in ((ClipEncoder, "forward"), (ClipDecoder, "decode_unnormalized")):
            patched = classmethod(failing) if where == "from_vae" else failing
            patch.setattr(network, where if where == "from_vae" else name, patched)
        if where == "forward":
            # The probe is not what fails.
            patch.setattr(ClipDecoder, "_probe", lambda self, vae: None)
            patch.setattr(parts, "probe_posterior", lambda own, net, frames=1: state_returns(wan))
        for _ in range(3):
            assert_own(wan, own)
    assert len(calls) == 2
    assert has_folded(wan) == (False, False)
    told = [r.getMessage() for r in caplog.records if "memory" in r.getMessage()]
    assert len([each for each in told if "memory does not suffice" in each]) == 2
    assert "refresh(vae)" in told[0]
    assert_own(wan, own)
    # A smaller clip may fit, and after refresh all are tried again.
    assert close(decode(wan, latents(wan, 2)), small)
    assert has_folded(wan) == (False, True)
    refresh(wan)
    assert all(map(close, both(wan), own))
    assert has_folded(wan) == (True, True)


def state_returns(vae: Any) -> Any:
    return vars(vae)["_cosmos3_fast"].encoder.returns


def test_another_failure_is_not_taken_for_memory() -> None:
    assert not parts.is_out_of_memory(RuntimeError("shapes differ"))
    assert not parts.is_out_of_memory(ValueError("out of memory"))
    assert parts.is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert parts.is_out_of_memory(RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling"))


def test_a_fold_that_fails_is_not_tried_at_each_clip(
    wan: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    own = both(wan)
    accelerate(wan)
    tries = []

    def failing(*args: Any, **kwargs: Any) -> Any:
        tries.append(1)
        raise RuntimeError("of a kind that nobody foresaw")

    monkeypatch.setattr(ClipDecoder, "from_vae", failing)
    for _ in range(3):
        assert torch.equal(decode(wan, latents(wan)), own[1])
    assert len(tries) == 1
    assert caplog.text.count("of a kind that nobody foresaw") == 1


def test_threads_fold_once_and_agree(wan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own = both(wan)
    accelerate(wan)
    folds: list[int] = []
    from_vae = ClipDecoder.from_vae.__func__

    def counting(cls: Any, *args: Any, **kwargs: Any) -> Any:
        folds.append(1)
        return from_vae(cls, *args, **kwargs)

    monkeypatch.setattr(ClipDecoder, "from_vae", classmethod(counting))
    results: list[Any] = []
    threads = [threading.Thread(target=lambda: results.append(both(wan))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(folds) == 1
    assert len(results) == 3
    for result in results:
        assert all(map(torch.equal, result, results[0]))
        assert all(map(close, result, own))


class Handing(diffusers.AutoencoderKLWan):
    """With an argument as in engines that write a video while it is decoded."""

    def decode(self, z: torch.Tensor, return_dict: bool = True, on_frames: Any = None) -> Any:
        out = super().decode(z, return_dict=return_dict)
        if on_frames is not None:
            frames = out.sample if return_dict else out[0]
            for i, each in enumerate((frames[:, :, :1], *frames[:, :, 1:].split(4, 2))):
                if each.shape[2] or i == 0:
                    on_frames(each.clone())
        return out


def handing(clips: bool = True) -> Any:
    vae = make_vae()
    vae.__class__ = Handing
    return seam.accelerate(vae, "fast", Engine(clips=clips, frames_argument="on_frames"))


def handed(vae: Any, z: torch.Tensor) -> tuple[list[int], torch.Tensor, torch.Tensor]:
    """Sizes of what is handed on, the frames in it, and the result. Each is changed when it comes,
    as who takes them may do."""
    parts: list[torch.Tensor] = []

    def take(frames: torch.Tensor) -> None:
        parts.append(frames.clone())
        frames.zero_()

    with torch.no_grad():
        out = vae.decode(z, on_frames=take).sample
    return [part.shape[2] for part in parts], torch.cat(parts, 2), out


@pytest.mark.parametrize("slicing", [False, True])
def test_frames_are_handed_on_as_they_come(slicing: bool) -> None:
    vae = handing()
    vae.use_slicing = slicing
    for count in (7, 1):
        z = latents(vae, count, 2)
        ours = decode(vae, z)
        sizes, frames, out = handed(vae, z)
        assert sizes[0] == 1
        assert len(sizes) > 1 or count == 1
        assert torch.equal(frames, out)
        # They are of the whole batch, also where it is sliced otherwise.
        assert close(out, ours) if slicing else torch.equal(out, ours)
        with torch.no_grad():
            assert torch.equal(vae.decode(z, on_frames=None).sample, ours)
        assert not torch.equal(ours, decode(restore(copy.copy(vae)), z))
    assert has_folded(vae) == (False, True)


def test_frames_of_the_vaes_own_are_handed_on() -> None:
    vae = handing(clips=False)
    z = latents(vae, 3)
    found, frames, out = handed(vae, z)
    theirs = decode(restore(vae), z)
    assert found == [1, 4, 4]
    assert torch.equal(frames, theirs)
    assert torch.equal(out, theirs)


def test_an_unknown_function_is_the_vaes_own_business() -> None:
    vae = seam.accelerate(handing(), "fast", Engine())
    assert handed(vae, latents(vae, 3))[0] == [1, 4, 4]
    assert has_folded(vae) == (False, False)


def test_frames_are_handed_on_once_where_memory_ends_halfway(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vae = handing()
    z = latents(vae, 7)
    ours, theirs = decode(vae, z), decode(copy.deepcopy(restore(vae)), z)
    vae = handing()
    frames_of = ClipDecoder.frames

    def frames(*args: Any, **options: Any) -> Any:
        given = frames_of(*args, **options)
        yield next(given)
        yield next(given)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(ClipDecoder, "frames", frames)
    sizes, taken, out = handed(vae, z)
    done = sum(sizes[:2])
    assert 1 < done < sum(sizes) == out.shape[2] == 25
    # What has been handed on stays; the rest and the result are the VAE's own.
    assert torch.equal(taken[:, :, :done], ours[:, :, :done])
    assert torch.equal(taken[:, :, done:], theirs[:, :, done:])
    assert torch.equal(out, theirs)


@pytest.mark.parametrize("count", [1, 3])
def test_an_error_of_who_takes_the_frames_is_theirs(count: int) -> None:
    vae = handing()
    taken: list[int] = []

    def take(frames: torch.Tensor) -> None:
        taken.append(frames.shape[2])
        raise RuntimeError("the disk is full; out of memory too")

    with torch.no_grad(), pytest.raises(RuntimeError, match="the disk is full"):
        vae.decode(latents(vae, count), on_frames=take)
    assert taken == [1]
    # Nothing is held against the decoder.
    z = latents(vae, 7)
    assert torch.equal(handed(vae, z)[1], decode(vae, z))
    assert not torch.equal(decode(vae, z), decode(restore(vae), z))
