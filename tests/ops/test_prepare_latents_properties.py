"""Random shapes, strides, dtypes and frame lists against the reference (hypothesis)."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from op_inputs import DTYPES, LAYOUTS, latent

from cosmos3_fast.ops.prepare_latents import (
    prepare_latents_mask_reference,
    prepare_latents_reference,
)

OPS = torch.ops.cosmos3
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
many = settings(
    max_examples=1000,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=False,
)


@st.composite
def calls(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    batch, channels, frames = (
        draw(st.integers(0, 3)),
        draw(st.integers(0, 4)),
        draw(st.integers(1, 9)),
    )
    height, width = draw(st.integers(0, 6)), draw(st.integers(0, 9))
    which = draw(st.lists(st.integers(0, frames - 1), unique=True, max_size=frames))
    cond_frames = draw(st.one_of(st.just(1), st.integers(max(which, default=0) + 1, frames + 2)))
    seed = draw(st.integers(0, 2**31))
    dtype, layout = st.sampled_from(DTYPES), st.sampled_from(LAYOUTS)
    cond_shape = (draw(st.sampled_from([1, batch])), channels, cond_frames, height, width)
    cond = latent(cond_shape, draw(dtype), draw(layout), DEVICE, seed)
    noise = latent(
        (batch, channels, frames, height, width), draw(dtype), draw(layout), DEVICE, seed + 1
    )
    return cond, noise, which


def assert_same(actual: torch.Tensor, wanted: torch.Tensor) -> None:
    assert actual.shape == wanted.shape
    assert actual.dtype == wanted.dtype
    assert actual.is_contiguous()
    torch.testing.assert_close(actual, wanted, rtol=0, atol=0, equal_nan=True)


def is_expanded(x: torch.Tensor) -> bool:
    return any(n > 1 and s == 0 for n, s in zip(x.shape, x.stride(), strict=True))


@many
@given(calls(), st.booleans())
def test_frames(call: tuple[torch.Tensor, torch.Tensor, list[int]], corrupt: bool):
    cond, noise, frames = call
    if corrupt and not is_expanded(noise):
        noise[..., ::3] = float("nan")
    for actual, wanted in zip(
        OPS.prepare_latents(cond, noise, frames),
        prepare_latents_reference(cond, noise, frames),
        strict=True,
    ):
        assert_same(actual, wanted)


@many
@given(calls(), st.sampled_from(DTYPES), st.booleans())
def test_mask(
    call: tuple[torch.Tensor, torch.Tensor, list[int]], dtype: torch.dtype, per_batch: bool
):
    cond, noise, frames = call
    if cond.shape[2] != 1:
        cond = cond[:, :, :1]
    mask = torch.rand(noise.shape[0] if per_batch else 1, 1, noise.shape[2], 1, 1).to(DEVICE, dtype)
    mask[:, :, frames] = 1.0
    for actual, wanted in zip(
        OPS.prepare_latents(cond, noise, mask),
        prepare_latents_mask_reference(cond, noise, mask),
        strict=True,
    ):
        assert_same(actual, wanted)


@many
@given(calls())
def test_in_place(call: tuple[torch.Tensor, torch.Tensor, list[int]]):
    cond, noise, frames = call
    if is_expanded(noise):
        noise = noise.clone()
    wanted, wanted_velocity = prepare_latents_reference(cond, noise, frames)
    assert_same(OPS.prepare_latents_(cond, noise, frames), wanted_velocity)
    torch.testing.assert_close(noise, wanted, rtol=0, atol=0)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(calls())
def test_opcheck(call: tuple[torch.Tensor, torch.Tensor, list[int]]):
    cond, noise, frames = call
    assume(cond.numel() and noise.numel())  # opcheck itself fails on empty strided tensors
    torch.library.opcheck(
        OPS.prepare_latents.default,
        (cond, noise, frames),
        test_utils=("test_schema", "test_faketensor"),
    )
