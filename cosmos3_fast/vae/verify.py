"""How far a folded network may be from the VAE: the error measures, their bounds, the comparison.

Used by the command line, the benchmarks and the tests, so that a bound is written down once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cosmos3_fast.arguments import dtype_name

FLOAT32_BOUND = 1e-5
"""Largest error over the VAE's largest value in float32: orders of summation differ over up to
5760 products, which is about √5760 = 76 roundings of 6e-8, and layers add to it."""


def largest(values: Tensor) -> float:
    """The largest absolute value, in float64; 0 for a tensor without elements."""
    return values.double().abs().max().item() if values.numel() else 0.0


def rms(values: Tensor) -> float:
    """The root of the mean square, in float64."""
    return values.double().square().mean().sqrt().item()


def relative_error(ours: Tensor, wanted: Tensor) -> float:
    """The largest difference over the largest value of `wanted`; not finite if either is not.

    Raises:
        ValueError: the shapes differ.
    """
    if ours.shape != wanted.shape:
        raise ValueError(
            f"ours must have the shape of wanted, {list(wanted.shape)}, got {list(ours.shape)}"
        )
    scale = largest(wanted)
    difference = largest(ours.double() - wanted.double())
    return difference / scale if scale else difference


def peak_signal_to_noise(ours: Tensor, wanted: Tensor) -> float:
    """PSNR in dB of pictures in [-1, 1], whose peak-to-peak range is 2; inf where they are equal.

    `20 log10(2 / rms(ours - wanted))`.
    """
    error = rms(ours.double() - wanted.double())
    return 20 * math.log10(2 / error) if error else math.inf


@dataclass(frozen=True)
class Comparison:
    """One measured error against the bound it must keep.

    Attributes:
        dtype: of the network, without "torch.".
        measure: what was measured, in words.
        error: of the folded network.
        bound: what it may be; in 16 bits the VAE's own error.
    """

    dtype: str
    measure: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        """Whether the error is finite and within the bound."""
        return math.isfinite(self.error) and self.error <= self.bound


def compare_changes(ours: Tensor, vae: Tensor, exact: Tensor | None = None) -> Comparison:
    """Judge how a clip changes from frame to frame, where an error shows as flicker.

    Args:
        ours, vae, exact: as for `compare`, [B, C, T, H, W] with T > 1. float32 and float64 may be
            off by twice `FLOAT32_BOUND` of the VAE's largest value, as two frames' errors add up.

    Raises:
        ValueError: as `compare`.
    """
    whole = compare(ours, vae, exact)
    if exact is None:
        scale = largest(vae) or 1.0
        error = largest((ours.double() - vae.double()).diff(dim=2)) / scale
        return Comparison(whole.dtype, "max of changes by frame", error, 2 * FLOAT32_BOUND)
    scale = rms(exact)
    errors = (rms((each.double() - exact.double()).diff(dim=2)) / scale for each in (ours, vae))
    return Comparison(whole.dtype, "rms of changes by frame", *errors)


def compare(ours: Tensor, vae: Tensor, exact: Tensor | None = None) -> Comparison:
    """Judge a folded network's result by the rule of its dtype.

    Args:
        ours: the folded network's result, whose dtype decides: float32 and float64 must be within
            `FLOAT32_BOUND` of the VAE's largest value; 16 bits need `exact`.
        vae: the VAE's own result on the same pixels or latents.
        exact: the VAE's result in float64 with the same (rounded) weights and input. The rms error
            of `ours` must not exceed that of `vae`.

    Raises:
        ValueError: `exact` is missing in 16 bits, or shapes differ.
    """
    name = dtype_name(ours.dtype)
    if ours.dtype not in (torch.bfloat16, torch.float16):
        error = relative_error(ours, vae)
        return Comparison(name, "max |fast-ref| / max |ref|", error, FLOAT32_BOUND)
    if exact is None:
        raise ValueError(f"exact must be the result of a float64 run for {name}, got None")
    scale = rms(exact)
    return Comparison(
        name,
        "rms error against float64",
        rms(ours.double() - exact.double()) / scale,
        rms(vae.double() - exact.double()) / scale,
    )
