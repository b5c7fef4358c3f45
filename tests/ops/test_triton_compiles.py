"""Every variant of every Triton kernel compiles, and the kernels' values at their edges."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from op_inputs import latent
from torch._subclasses.fake_tensor import FakeTensorMode

from cosmos3_fast import ops
from cosmos3_fast.ops import registry
from cosmos3_fast.ops.prepare_latents import prepare_latents_reference
from cosmos3_fast.ops.rms_norm_silu import rms_norm_silu_reference

pytest.importorskip("triton")
TESTS = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # The script imports this package, from wherever this test did.
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(TESTS.parent), environment.get("PYTHONPATH", "")]
    )
    result = subprocess.run(
        [sys.executable, TESTS / "install" / "triton_variants.py"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_every_variant_compiles(compiled: list[dict[str, Any]]):
    counts: dict[tuple[str, str], int] = {}
    for row in compiled:
        key = row["kernel"], row["architecture"]
        counts[key] = counts.get(key, 0) + 1
    kernels = {
        "prepare_latents",
        "prepare_latents_",
        "blend",
        "rms_norm_silu",
        "pack_pixels",
        "unpack_pixels",
    }
    architectures = {"sm_80", "sm_90", "sm_100", "sm_120"}
    assert set(counts) == {(k, a) for k in kernels for a in architectures}
    pairs = {"prepare_latents": 32, "prepare_latents_": 32, "blend": 32, "rms_norm_silu": 20}
    assert all(counts[kernel, "sm_90"] > least for kernel, least in pairs.items())


def test_frame_words_are_shifted_as_64_bits(compiled: list[dict[str, Any]]):
    """Shifting 32 bits by up to 63 is undefined, and words that fit 32 bits arrive as such."""
    for row in compiled:
        if row["kernel"] in ("prepare_latents", "prepare_latents_"):
            # One frame per launch leaves nothing to shift by.
            wanted = [] if row["variant"] == "launch_frames = 1" else [64]
            assert row["shifts"] == wanted, row


def test_quotients_and_roots_are_rounded(compiled: list[dict[str, Any]]):
    """Of powers of two the device has an approximation only, of two units in the last place."""
    for row in compiled:
        assert set(row["approximated"]) <= {"ex2"}, row


@pytest.fixture
def on_triton(device: str) -> str:
    if (error := registry.backend_error("triton", device)) is not None:
        pytest.skip(error)
    return device


FRAME_LISTS = {
    "31 to 63": range(31, 64),
    "0 to 63": range(64),
    "63": [63],
    "32 to 95": range(32, 96),
    "64 to 127": range(64, 128),
    "0 to 127": range(128),
    "127 to 130": range(127, 131),
    "all": range(140),
    "none": [],
}


@pytest.mark.parametrize("frames", FRAME_LISTS)
def test_every_word_of_frames(frames: str, on_triton: str):
    cond, noise = latent((1, 1, 1, 1, 3)), latent((1, 1, 140, 1, 3), seed=1)
    cond, noise = cond.to(on_triton), noise.to(on_triton)
    which = tuple(FRAME_LISTS[frames])
    wanted = prepare_latents_reference(cond, noise, which)
    got = ops.prepare_latents(cond, noise, which, backend="triton")
    velocity = ops.prepare_latents_(cond, noise, which, backend="triton")
    for actual, expected in zip((*got, noise, velocity), (*wanted, *wanted), strict=True):
        assert torch.equal(actual, expected)


def test_planes_of_several_tiles(on_triton: str):
    cond, noise = latent((1, 2, 1, 41, 53)), latent((2, 2, 3, 41, 53), seed=1)
    cond, noise = cond.to(on_triton), noise.to(on_triton)
    mask = torch.rand(2, 1, 3, 1, 1, device=on_triton)
    for arguments in ({"condition_frames": (0, 2)}, {"condition_mask": mask}):
        for got, wanted in zip(
            ops.prepare_latents(cond, noise, **arguments, backend="triton"),
            ops.prepare_latents(cond, noise, **arguments, backend="eager"),
            strict=True,
        ):
            assert torch.equal(got, wanted)
    wanted, _ = prepare_latents_reference(cond, noise, (1,))
    ops.prepare_latents_(cond, noise, (1,), backend="triton")
    assert torch.equal(noise, wanted)


def test_a_float64_norm_is_one_of_float64(on_triton: str):
    x = latent((2, 7, 3, 5, 1), torch.float64, device=on_triton)[..., 0]
    x[0, :, 0, 0] = 1e-14  # below the clamp
    weight = latent((7, 1, 1, 1, 1), torch.float64, device=on_triton, seed=1).flatten()
    got = ops.rms_norm_silu(x, weight, backend="triton")
    wanted = rms_norm_silu_reference(x, weight)
    # A few roundings of float64 in another order; √7 or 1e-12 in float32 would be 1e-8 off.
    torch.testing.assert_close(got, wanted, rtol=1e-14, atol=1e-16)


CALLS = {
    "prepare_latents": lambda e: (e(1, 2, 1, 4, 4), e(1, 2, 3, 4, 4), [0]),
    "prepare_latents_": lambda e: (e(1, 2, 1, 4, 4), e(1, 2, 3, 4, 4), [0]),
    "prepare_latents.mask": lambda e: (e(1, 2, 1, 4, 4), e(1, 2, 3, 4, 4), e(1, 1, 3, 1, 1)),
    "rms_norm_silu": lambda e: (e(1, 4, 4, 8).permute(0, 3, 1, 2), e(8), True),
    "add_rms_norm_silu": lambda e: (e(1, 4, 4, 8).permute(0, 3, 1, 2), e(8), True, e(8)),
    "add_pad": lambda e: (e(1, 4, 4, 8).permute(0, 3, 1, 2), e(8)),
    "pack_pixels": lambda e: (e(1, 3, 4, 4), 2, torch.float32),
}


@pytest.mark.parametrize("op", CALLS)
def test_launches_are_on_the_device_of_the_tensors(op: str, monkeypatch: pytest.MonkeyPatch):
    from cosmos3_fast.ops.triton import pack_pixels, prepare_latents, rms_norm_silu

    current: list[torch.device] = []
    launched: list[torch.device | None] = []

    class Device(nullcontext):
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            current.append(self.device)

        def __exit__(self, *_: object) -> None:
            current.pop()

    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *_, **__: launched.append(current[-1] if current else None)

    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(prepare_latents, "_access", lambda *_: (16, [0] * 10, {}))
    monkeypatch.setattr(prepare_latents, "apart", lambda cond, _: cond)
    for module in (pack_pixels, prepare_latents, rms_norm_silu):
        for name in [n for n in vars(module) if n.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Kernel())
    with FakeTensorMode():
        arguments = CALLS[op](lambda *shape: torch.empty(shape, device="cuda:1"))
        registry._python_kernels[op, "triton"](*arguments)
    assert launched == [torch.device("cuda:1")]


@pytest.mark.parametrize("frames", [(0,), (0, 1, 20)])
def test_one_launch_per_op(monkeypatch: pytest.MonkeyPatch, frames: tuple[int, ...]):
    if torch.cuda.is_available():
        pytest.skip("counted in the interpreter")
    from cosmos3_fast.ops.triton import prepare_latents as module

    launches = []

    class Counted:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Any:
            launches.append(self.kernel)
            return self.kernel[grid]

    for name in ("prepare_latents_kernel", "blend_kernel"):
        monkeypatch.setattr(module, name, Counted(getattr(module, name)))
    cond, noise = latent((1, 2, 1, 3, 4)), latent((1, 2, 48, 3, 4))
    for call in (
        lambda: module.prepare_latents(cond, noise, frames),
        lambda: module.prepare_latents_(cond, noise, frames),
        lambda: module.prepare_latents_mask(cond, noise, torch.rand(1, 1, 48, 1, 1)),
    ):
        launches.clear()
        call()
        assert len(launches) == 1
