"""Sets of keys that take 32 bytes each and are sent to other processes as one array."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np


class KeySet:
    """An immutable set of names of 32 characters.

    A Python set of as many strings takes five times the memory, and is unpacked anew by every
    task that it is sent to.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._keys: Any = np.unique(np.array([key.encode() for key in keys], dtype="S32"))

    def __contains__(self, key: object) -> bool:
        wanted = str(key).encode()
        place = int(self._keys.searchsorted(wanted))
        return place < len(self._keys) and self._keys[place] == wanted

    def __len__(self) -> int:
        return len(self._keys)
