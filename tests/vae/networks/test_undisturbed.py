"""Networks call ops without a question only where nothing observes the call."""

from __future__ import annotations

import contextlib
import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from decoder_cases import TINY as TINY_DECODER
from decoder_cases import TINY_CLIP
from encoder_cases import TINY, image
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from cosmos3_fast import ops
from cosmos3_fast.ops import registry
from cosmos3_fast.vae import ClipDecoder, FrameDecoder, FrameEncoder
from cosmos3_fast.vae.networks.base import FoldedNetwork
from cosmos3_fast.vae.synthetic import synthetic_decoder_state_dict, synthetic_state_dict


@pytest.fixture
def direct(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ops that are called without a question."""
    seen: list[str] = []

    def recorded(op: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            seen.append(op)
            return kernel(*args)

        return run

    for op, kernel in registry._DIRECT.items():
        monkeypatch.setitem(registry._DIRECT, op, recorded(op, kernel))
    return seen


@pytest.fixture
def encoder() -> FrameEncoder:
    return FrameEncoder.from_state_dict(synthetic_state_dict(TINY), TINY, torch.float32)


def pixels(batch: int = 1) -> Tensor:
    return image(0, batch, 16, 24, torch.float32)


def test_the_same_bits(
    encoder: FrameEncoder, direct: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = FrameDecoder.from_state_dict(
        synthetic_decoder_state_dict(TINY_DECODER), TINY_DECODER, torch.float32
    )
    latents = torch.randn(1, decoder.z_dim, 2, 3)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            ours = encoder(pixels()), decoder(latents), decoder(latents, "uint8")
            assert len(direct) > 30
            with monkeypatch.context() as patch:
                patch.setattr(FoldedNetwork, "_read", lambda *_: None)
                direct.clear()
                theirs = encoder(pixels()), decoder(latents), decoder(latents, "uint8")
                assert direct == []
        assert all(map(torch.equal, ours, theirs))
        assert not registry.is_unobserved()


def test_results_are_the_callers(encoder: FrameEncoder, direct: list[str]) -> None:
    """Whose own gradients, views and writes are as of any tensor."""
    result = encoder(pixels())
    assert direct
    version = result._version
    result[:, :, 0].add_(1)
    assert result._version == version + 1
    weight = torch.ones((), requires_grad=True)
    (encoder(pixels()) * weight).sum().backward()
    assert weight.grad is not None


@contextlib.contextmanager
def hook(encoder: FrameEncoder) -> Iterator[None]:
    handle = encoder.middle[0].register_forward_hook(lambda *_: None)
    yield
    handle.remove()


@contextlib.contextmanager
def hook_before(encoder: FrameEncoder) -> Iterator[None]:
    handle = encoder.stages[0].register_forward_pre_hook(lambda *_: None)
    yield
    handle.remove()


@contextlib.contextmanager
def hook_of_all(encoder: FrameEncoder) -> Iterator[None]:
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    yield
    handle.remove()


@contextlib.contextmanager
def own_forward(encoder: FrameEncoder) -> Iterator[None]:
    block: Any = encoder.middle[0]
    block.forward = block.forward
    yield
    del block.forward


@contextlib.contextmanager
def trained(encoder: FrameEncoder) -> Iterator[None]:
    encoder.conv_in.weight.requires_grad_(True)
    yield
    encoder.conv_in.weight.requires_grad_(False)


@contextlib.contextmanager
def another_module(encoder: FrameEncoder) -> Iterator[None]:
    before = encoder.middle[0]
    encoder.middle[0] = copy.deepcopy(before)
    encoder.middle[0].conv1.weight.requires_grad_(True)
    yield
    encoder.middle[0] = before


OBSERVED: dict[str, Callable[[FrameEncoder], Any]] = {
    "a hook": hook,
    "a hook before": hook_before,
    "a hook of all modules": hook_of_all,
    "a forward of its own": own_forward,
    "weights in training": trained,
    "another module": another_module,
    "a mode of dispatch": lambda e: FlopCounterMode(display=False),
    "a mode of functions": lambda e: torch.device("cpu"),
    "forward-mode AD": lambda e: forward_ad.dual_level(),
}


@pytest.mark.parametrize("what", OBSERVED)
def test_what_observes_sees_all(encoder: FrameEncoder, direct: list[str], what: str) -> None:
    wanted = encoder(pixels())
    assert direct
    direct.clear()
    with OBSERVED[what](encoder):
        assert torch.equal(encoder(pixels()), wanted)
        assert direct == []
    encoder(pixels())
    assert direct


def test_gradients_transforms_and_subclasses(encoder: FrameEncoder, direct: list[str]) -> None:
    given = pixels().requires_grad_()
    encoder(given).sum().backward()
    assert given.grad is not None
    assert given.grad.abs().sum() > 0
    torch.func.vmap(lambda x: encoder(x[None]))(pixels(2))

    class Tagged(Tensor):
        pass

    encoder(pixels().as_subclass(Tagged))
    assert direct == []
    with torch.no_grad():
        encoder(given)
    assert direct


def test_an_error_and_other_threads_leave_nothing(
    encoder: FrameEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[bool] = []

    def kernel(*args: Any) -> Any:
        found.append(registry.is_unobserved())
        thread = threading.Thread(target=lambda: found.append(registry.is_unobserved()))
        thread.start()
        thread.join()
        raise MemoryError

    monkeypatch.setitem(registry._DIRECT, "rms_norm_silu", kernel)
    with pytest.raises(MemoryError):
        encoder(pixels())
    assert found == [True, False]
    assert not registry.is_unobserved()
    x = torch.randn(1, 4, 2, 2, requires_grad=True)
    ops.add_pad(x).sum().backward()
    assert x.grad is not None


def test_a_clip_between_its_parts(direct: list[str]) -> None:
    decoder = ClipDecoder.from_state_dict(
        synthetic_decoder_state_dict(TINY_CLIP), TINY_CLIP, torch.float32
    )
    latents = torch.randn(1, decoder.z_dim, 3, 1, 2)
    parts = []
    for part in decoder.frames(latents):
        assert not registry.is_unobserved()
        assert direct
        parts.append(part)
    direct.clear()
    assert torch.equal(torch.cat(parts, 2), decoder(latents))
    assert torch.equal(decoder.stream().push(latents), decoder(latents))
    assert "transform_frames" in direct


def test_copies_and_pickles_look_for_themselves(encoder: FrameEncoder) -> None:
    wanted = encoder(pixels())
    for other in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder)), copy.copy(encoder)):
        assert other._parts is None
        assert torch.equal(other(pixels()), wanted)


def test_memory_that_is_used_again_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames that are held while later ones are made, of images large enough for it."""
    state = synthetic_decoder_state_dict(TINY_CLIP)
    decoder = ClipDecoder.from_state_dict(state, TINY_CLIP, torch.float32)
    latents = torch.randn(1, decoder.z_dim, 4, 40, 64)
    lent: list[bool] = []
    kernel = registry._DIRECT["transform_frames"]

    def recorded(*args: Any) -> Any:
        results = kernel(*args)
        lent.extend(not x.untyped_storage().resizable() for x in results)
        return results

    monkeypatch.setitem(registry._DIRECT, "transform_frames", recorded)
    frames, stream = [*decoder.frames(latents)], decoder.stream()
    whole, pushed = decoder(latents), [stream.push(latents[:, :, i : i + 1]) for i in range(4)]
    if torch.__version__ >= (2, 11) and ("transform_frames", "cpu") in registry.LIBRARY_KERNELS:
        assert any(lent)
    lent.clear()
    monkeypatch.setattr(registry, "_keep_memory", lambda keep: None)
    again, stream = [*decoder.frames(latents)], decoder.stream()
    assert torch.equal(whole, decoder(latents))
    assert all(map(torch.equal, frames, again))
    more = [stream.push(latents[:, :, i : i + 1]) for i in range(4)]
    assert all(map(torch.equal, pushed, more))
    assert not any(lent)
