"""Without a private name of torch: everything imports and is right, or what is lost is said."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from cosmos3_fast import ops
from cosmos3_fast.ops import _torch, registry
from cosmos3_fast.vae.networks.encoder import check_values
from cosmos3_fast.vae.networks.layers import write_sum

NAMES = dict(re.findall(r'^(_\w+) = _found\("(.+)"\)$', inspect.getsource(_torch), re.MULTILINE))
LEVEL = "forward_ad"
ROOT = Path(__file__).parents[2]


@pytest.fixture(params=["nothing", "everything", LEVEL, *NAMES])
def hidden(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What this torch lacks."""
    for name in NAMES:
        if request.param in (name, "everything"):
            monkeypatch.setattr(_torch, name, None)
    if request.param in (LEVEL, "everything"):
        monkeypatch.setattr(_torch, "forward_ad", SimpleNamespace())
    return request.param


def test_each_name_is_one_of_this_torch():
    """Else a name that moved would be lost without a word."""
    assert len(NAMES) >= 7
    assert [name for name in NAMES if getattr(_torch, name) is None] == []
    assert isinstance(forward_ad._current_level, int)


def test_no_other_file_has_private_names():
    private = re.compile(r"torch\._[a-z]*\.|torch\._(?!check\b|_version__)|_current_level|_cdata")
    found = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "cosmos3_fast").rglob("*.py")
        if private.search(path.read_text())
    }
    assert found == {"cosmos3_fast/ops/_torch.py"}


def plain(device: str) -> tuple[Tensor, Tensor]:
    args = registry.EXAMPLES["prepare_latents"](device)
    return args[0], args[1]


def test_calls_and_gradients(hidden: str, device: str):
    for op in registry.OPS:
        args = registry.EXAMPLES[op](device)
        leaves = [x for x in args if isinstance(x, Tensor) and x.is_floating_point()]
        got = registry.select(op, None, torch.device(device))(*args)
        wanted = registry.REFERENCES[op](*registry.EXAMPLES[op](device))
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)  # Winograd's is float32
        for x in leaves:
            x.requires_grad_()
        if op.startswith("winograd") or op.endswith("_") or not leaves:
            if leaves:
                with pytest.raises(RuntimeError, match="require a gradient"):
                    registry.select(op, None, torch.device(device))(*args)
            continue
        gradients = [
            torch.autograd.grad(
                sum(y.square().sum() for y in (out if isinstance(out, tuple) else (out,))), leaves
            )
            for out in (
                registry.select(op, None, torch.device(device))(*args),
                registry.REFERENCES[op](*args),
            )
        ]
        torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_compiled_in_one_graph(hidden: str, device: str):
    def run(cond: Tensor, noise: Tensor) -> Tensor:
        latents, _ = ops.prepare_latents(cond, noise, (0, 2))
        flat = latents.flatten(0, 1).flatten(1, 2)[None, :3]
        return ops.rms_norm_silu(flat[:, :, :, :, None].flatten(3), None)

    cond, noise = plain(device)
    torch.compiler.reset()
    got = torch.compile(run, fullgraph=True, backend="aot_eager")(cond, noise.requires_grad_())
    got.sum().backward()
    assert noise.grad is not None
    torch.testing.assert_close(got, run(cond, noise), rtol=0, atol=0)


def test_tangents_and_transforms(hidden: str, device: str):
    cond, noise = plain(device)
    for called in (ops.prepare_latents, torch.ops.cosmos3.prepare_latents):
        _, tangent = torch.func.jvp(lambda n: called(cond, n, [0, 2])[0], (noise,), (noise,))  # noqa: B023
        assert not tangent[:, :, [0, 2]].any()
        assert torch.equal(tangent[:, :, [1, 3]], noise[:, :, [1, 3]])
    got = torch.vmap(lambda n: ops.prepare_latents(cond, n, (1,))[0])(torch.stack([noise, noise]))
    assert torch.equal(got[1], ops.prepare_latents(cond, noise, (1,))[0])
    weight, taken = torch.randn(32, 16, 3, 3), []

    def convolve(x: Tensor) -> Tensor:
        taken.append(ops.takes_winograd(x, weight, 0))
        return torch.nn.functional.conv2d(x, weight)

    x = torch.randn(1, 16, 8, 8)
    torch.func.jvp(convolve, (x,), (x,))
    torch.vmap(convolve)(x[None])
    with forward_ad.dual_level():
        convolve(forward_ad.make_dual(x, x))
    convolve(x)
    assert taken == [False, False, False, ("winograd_conv3x3", "cpu") in registry.LIBRARY_KERNELS]


def test_modes_see_the_calls(hidden: str, device: str):
    with FakeTensorMode():
        cond, noise = plain(device)
        for in_place in (False, True):
            call = ops.prepare_latents_ if in_place else ops.prepare_latents
            assert "FakeTensor" in str(type(call(cond, noise, (0,))[0]))
        dense = torch.empty(1, 1, 4, 2, 3, device=device)
        with pytest.raises(RuntimeError, match="cond_latent must not overlap noise"):
            ops.prepare_latents_(dense[:, :, 1:2], dense, (0,))


def test_negated_views(hidden: str, device: str):
    z = torch.randn(1, 2, 3, 2, 2, dtype=torch.complex64, device=device)
    noise = z.conj().imag
    assert noise.is_neg()
    cond = torch.ones(1, 2, 1, 2, 2, device=device)
    before, version = z.clone(), z._version
    ops.prepare_latents_(cond, noise, (1,))
    assert z._version > version
    assert (z[:, :, 1].imag == -1).all()
    assert torch.equal(z[:, :, [0, 2]], before[:, :, [0, 2]])


def test_helpers_of_the_networks(hidden: str, device: str):
    x, y = torch.randn(2, 3, device=device), torch.randn(2, 3, device=device)

    def total(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        write_sum(out, x, y)
        return out

    assert torch.equal(total(x), x + y)
    assert torch.equal(torch.func.jvp(total, (x,), (y,))[1], y)
    with pytest.raises(ValueError, match="pixels must be in"):
        check_values(torch.full((2,), 9.0))
    torch.vmap(check_values, in_dims=0, out_dims=None)(torch.zeros(3, 2))


WITHOUT_ANY = """
import importlib, importlib.util, sys
import torch
import torch.autograd.forward_ad

name, path = "cosmos3_fast.ops._torch", sys.argv[1]
spec = importlib.util.spec_from_file_location(name, path)
module = sys.modules[name] = importlib.util.module_from_spec(spec)
real = importlib.import_module

def hiding(name, *rest):
    if name.startswith("torch"):
        raise ImportError(name)
    return real(name, *rest)

importlib.import_module = hiding
spec.loader.exec_module(module)
importlib.import_module = real
assert module._below_autograd is None and module.is_watched()

from cosmos3_fast import ops
from cosmos3_fast.ops import registry
assert registry._torch is module
x = torch.randn(1, 4, 3, 5, requires_grad=True)
ops.rms_norm_silu(x, None).sum().backward()
assert x.grad is not None
print("right", registry.default_backend())
"""


def test_the_package_imports_without_any_of_them():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_ANY, str(ROOT / "cosmos3_fast" / "ops" / "_torch.py")],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.strip() == f"right {registry.default_backend()}", done.stderr
