"""The matrices of Winograd's short convolutions F(m, 3), by Cook and Toom's construction.

m outputs of a correlation with three taps g, `y[i] = sum_k d[i + k] g[k]`, from m + 2 products
instead of 3m: `y = A^T [(G g) * (B^T d)]`. Lavin & Gray, "Fast Algorithms for Convolutional Neural
Networks" (2015), give the scheme; Toom (1963) and Cook (1966) the construction: the polynomials are
multiplied by their values at m + 1 points and at infinity. Points closer together than Lavin's keep
the rounding error small.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

# The finite points, by m. Those of m = 4 are the best of what was tried for the VAEs' networks.
POINTS: dict[int, tuple[Fraction, ...]] = {
    2: (Fraction(0), Fraction(1), Fraction(-1)),
    4: (Fraction(0), Fraction(3, 4), Fraction(-3, 4), Fraction(3, 2), Fraction(-3, 2)),
}

# F(2, 3) on 0, ±3/4 and infinity, four of the points of F(4, 3), needs no kernels of its own: a row
# of G is a polynomial's value at its point, divided by what depends on the other points. With the
# kernels of F(4, 3) numbered `SHARED`, its products are to be multiplied by `SHARED_SCALES`.
SHARED = (0, 1, 2, 5)
SHARED_POINT, _FAR = float(POINTS[4][1]), float(POINTS[4][3])
SHARED_SCALES = (-(_FAR**2), *[SHARED_POINT**2 - _FAR**2] * 2, 1.0)

Rows = tuple[tuple[float, ...], ...]


class CookToom(NamedTuple):
    """`inverse` is A^T [m, m + 2], `kernel` G [m + 2, 3] and `inputs` B^T [m + 2, m + 2]."""

    inverse: Rows
    kernel: Rows
    inputs: Rows


@functools.cache
def cook_toom(outputs: int) -> CookToom:
    """The matrices of F(`outputs`, 3) for `outputs` in `POINTS`.

    Those of 4 are exact but for G, which is rounded once. The last row of G is the last tap.
    """
    points = POINTS[outputs]
    inverse = [[*(p**i for p in points), Fraction(i == outputs - 1)] for i in range(outputs)]
    kernel: list[list[Fraction]] = []
    inputs: list[list[Fraction]] = []
    for p in points:
        others = [q for q in points if q != p]
        scale = Fraction(1)
        for q in others:
            scale *= p - q
        kernel.append([p**k / scale for k in range(3)])
        inputs.append([*_monic(others), Fraction(0)])
    kernel.append([Fraction(0), Fraction(0), Fraction(1)])
    inputs.append(_monic(points))
    return CookToom(
        *(tuple(tuple(map(float, row)) for row in m) for m in (inverse, kernel, inputs))
    )


def _monic(roots: Sequence[Fraction]) -> list[Fraction]:
    """The coefficients of the product of all `x - root`, the constant one first."""
    coefficients = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *coefficients]
        coefficients = [
            a - root * b for a, b in itertools.zip_longest(shifted, coefficients, fillvalue=0)
        ]
    return coefficients


def cook_toom_tensors(outputs: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`cook_toom(outputs)` in float64 on the device of `like`."""

    def make(rows: Rows) -> Tensor:
        return torch.tensor(rows, dtype=torch.float64, device=like.device)

    inverse, kernel, inputs = cook_toom(outputs)
    return make(inverse), make(kernel), make(inputs)
