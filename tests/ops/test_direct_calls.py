"""The wrappers go past the Python autograd layer only where nothing has to see the call there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_inputs import latent
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from cosmos3_fast import ops
from cosmos3_fast.ops import registry


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each wrapper call that follows, whether it went through all layers."""
    seen: list[bool] = []
    decide = registry._needs_all_layers

    def record(args: tuple[Any, ...]) -> bool:
        seen.append(decide(args))
        return seen[-1]

    monkeypatch.setattr(registry, "_needs_all_layers", record)
    return seen


def pair(device: str) -> tuple[Tensor, Tensor]:
    return latent((1, 2, 1, 3, 4), device=device), latent((1, 2, 4, 3, 4), device=device, seed=1)


def test_plain_calls_are_direct(layers: list[bool], device: str):
    cond, noise = pair(device)
    wanted = torch.ops.cosmos3.prepare_latents(cond, noise, [1])
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            got = ops.prepare_latents(cond, noise, (1,))
            assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    with torch.no_grad():
        ops.prepare_latents(cond.requires_grad_(), torch.nn.Parameter(noise), (1,))
    assert layers == [False] * 3  # inference mode does not ask


def test_gradients(layers: list[bool], device: str):
    cond, noise = pair(device)
    latents, _ = ops.prepare_latents(cond.requires_grad_(), noise, (1,))
    latents.sum().backward()
    assert (cond.grad == 1).all()
    assert layers == [True]


class Tagged(Tensor):
    """A subclass whose results are of it."""


def test_subclasses(layers: list[bool], device: str):
    cond, noise = pair(device)
    latents, _ = ops.prepare_latents(cond, noise.as_subclass(Tagged))
    assert type(latents) is Tagged
    assert layers == [True]


def test_dispatch_and_function_modes(layers: list[bool], device: str):
    calls: list[str] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.append(str(function))
            return function(*args, **(kwargs or {}))

    arguments = pair(device)
    with Record():
        ops.prepare_latents(*arguments)
    assert "cosmos3.prepare_latents.default" in calls
    with torch.device(device):  # a function mode
        ops.prepare_latents(*arguments)
    assert layers == [True, True]


def test_tracing(layers: list[bool], device: str):
    graph = make_fx(lambda c, n: ops.prepare_latents(c, n, (1,)))(*pair(device))
    assert "cosmos3.prepare_latents.default" in graph.code
    assert layers == [True]


def test_function_transforms(layers: list[bool], device: str):
    cond, noise = pair(device)
    batch = torch.stack([noise, 2 * noise])
    got = torch.vmap(lambda n: ops.prepare_latents(cond, n, (1,))[0])(batch)
    for ours, each in zip(got, batch, strict=True):
        assert torch.equal(ours, ops.prepare_latents(cond, each, (1,))[0])
    _, tangent = torch.func.jvp(lambda n: ops.prepare_latents(cond, n, (1,))[0], (noise,), (noise,))
    assert not tangent[:, :, 1].any()
    assert torch.equal(tangent[:, :, 0], noise[:, :, 0])
    with forward_ad.dual_level():
        ops.prepare_latents(cond, noise)
    assert layers == [True, False, False, True, True]


def test_a_backend_by_its_name_is_direct_too(layers: list[bool], device: str):
    ops.prepare_latents(*pair(device), backend=registry.default_backend(device))
    assert layers == [False]


def test_compiled_in_one_graph(layers: list[bool], device: str):
    cond, noise = pair(device)
    compiled = torch.compile(ops.prepare_latents, fullgraph=True, backend="eager")
    with torch.no_grad():
        latents, _ = compiled(cond, noise, (1,))
    assert torch.equal(latents, ops.prepare_latents(cond, noise, (1,))[0])
