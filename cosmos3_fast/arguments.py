"""Checks of plain arguments: integers of every kind, and how a value stands in a message."""

from __future__ import annotations

import operator
from typing import Any

LARGEST = 2**31 - 1
"""Of any size or count taken here: more is a mistake, and its products would not fit 64 bits."""

_QUOTED = 80


def quoted(value: object) -> str:
    """`repr(value)`, of at most 80 characters: what came in may be a picture in base64."""
    if isinstance(value, (str, bytes)):
        cut = value[:_QUOTED]
        return repr(cut) + ("…" if len(cut) < len(value) else "")
    try:
        text = repr(value)
    except Exception:  # an integer of more digits than Python prints, a broken __repr__
        return f"a {type(value).__name__}"
    return text if len(text) <= _QUOTED else f"{text[:_QUOTED]}…"


def dtype_name(dtype: object) -> str:
    """A torch dtype without "torch."."""
    return str(dtype).removeprefix("torch.")


def as_int(value: Any) -> int | None:
    """A Python integer of anything that is one (also of numpy's and torch's), None for others.

    A bool is no integer here: `True` frames are a mistake.
    """
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def positive_int(name: str, value: Any) -> int:
    """`value` as a Python integer in [1, 2^31).

    Raises:
        ValueError: it is no integer, or outside; the message names `name`.
    """
    number = as_int(value)
    if number is None or number < 1:
        raise ValueError(f"{name} must be a positive integer, got {quoted(value)}")
    if number > LARGEST:
        raise ValueError(f"{name} must be below 2^31, got {quoted(number)}")
    return number
