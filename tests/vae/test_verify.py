"""The error measures and the rule that judges a folded network."""

from __future__ import annotations

import math

import pytest
import torch

from cosmos3_fast.vae.verify import (
    FLOAT32_BOUND,
    Comparison,
    compare,
    compare_changes,
    largest,
    relative_error,
    rms,
)


def test_largest_and_rms_are_of_absolute_values():
    values = torch.tensor([3.0, -4.0])
    assert largest(values) == 4.0
    assert rms(values) == math.sqrt(12.5)
    assert largest(torch.empty(0, 3)) == 0.0


def test_measures_do_not_overflow_the_dtype_of_their_values():
    values = torch.full((2,), 60000.0, dtype=torch.float16)
    assert largest(values) == rms(values) == values[0].item()
    assert relative_error(-values, values) == 2.0


def test_relative_error_is_over_the_wanted_s_largest_value():
    wanted = torch.tensor([1.0, -8.0])
    assert relative_error(torch.tensor([3.0, -8.0]), wanted) == 0.25
    assert relative_error(wanted, wanted) == 0.0
    # Over zeros there is nothing to divide by.
    assert relative_error(torch.tensor([0.5]), torch.zeros(1)) == 0.5


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_never_passes(bad: float):
    good, broken = torch.ones(3), torch.tensor([1.0, bad, 1.0])
    for ours, wanted in ((broken, good), (good, broken), (broken, broken)):
        assert not math.isfinite(relative_error(ours, wanted))
        assert not compare(ours, wanted).passed
    # In 16 bits the VAE itself may overflow where the folded network does not.
    for vae in (good, broken):
        assert not compare(broken.bfloat16(), vae.bfloat16(), good).passed


def test_shapes_must_agree():
    with pytest.raises(
        ValueError, match=r"ours must have the shape of wanted, \[2\], got \[1, 2\]"
    ):
        relative_error(torch.ones(1, 2), torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_wide_dtypes_are_held_to_the_bound(dtype: torch.dtype):
    vae = torch.tensor([4.0, 0.0], dtype=dtype)
    for factor, passed in ((0.9, True), (1.1, False)):
        ours = vae + torch.tensor([0.0, factor * 4 * FLOAT32_BOUND], dtype=dtype)
        comparison = compare(ours, vae)
        assert comparison.passed is passed
        assert comparison.bound == FLOAT32_BOUND
        assert comparison.dtype == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_are_held_to_the_vae_s_own_error(dtype: torch.dtype):
    exact = torch.tensor([1.0, 1.0], dtype=torch.float64)
    near, far = torch.tensor([1.0, 1.125], dtype=dtype), torch.tensor([1.25, 1.0], dtype=dtype)
    assert compare(near, far, exact).passed
    assert compare(far, far, exact).passed
    assert not compare(far, near, exact).passed
    assert compare(near, far, exact).error == pytest.approx(0.125 / math.sqrt(2))
    with pytest.raises(
        ValueError, match=r"exact must be the result of a float64 run for .*float16, got None"
    ):
        compare(near, far)


def test_an_error_equal_to_its_bound_passes():
    assert Comparison("float32", "error", 0.5, 0.5).passed
    assert not Comparison("float32", "error", math.nan, math.inf).passed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flicker_is_seen_where_an_error_that_stays_is_not(dtype: torch.dtype):
    exact = torch.ones(1, 1, 4, 1, 1, dtype=torch.float64)
    vae = exact.to(dtype)
    steady = vae + FLOAT32_BOUND / 2 if dtype == torch.float32 else vae + 0.25
    flickering = vae.clone()
    flickering[:, :, 1::2] += 0.25
    given = None if dtype == torch.float32 else exact
    assert compare_changes(steady, vae, given).passed
    assert not compare_changes(flickering, vae, given).passed
    with pytest.raises(ValueError, match=r"exact must be|ours must have"):
        compare_changes(vae[:, :, :2], vae)
