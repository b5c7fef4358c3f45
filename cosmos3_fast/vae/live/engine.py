"""What an engine does around its VAE, handed to the seam by the engine's adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Encode = Callable[[Any, Tensor], Tensor]
"""`encode(vae, frames)`: the parameters of the posterior."""


def _uncached(name: str, encode: Encode) -> Encode:
    return encode


def _not_equivalent(forward: Any) -> bool:
    return False


def _nothing_to_fetch() -> None:
    return None


@dataclass(frozen=True)
class Engine:
    """The defaults are those of a VAE by itself. To pickle a VAE, give functions that pickle.

    Attributes:
        cached: `cached(name, encode)` is `encode` through the engine's cache of encodings; `name`
            tells apart what gives other results for the same frames.
        is_equivalent: whether a `forward` that is bound to one of the VAE's modules computes what
            that of the module's class does, as where an engine fuses operations.
        pending_fetch: what brings the VAE to its device in the running request, to be called
            before code of its own runs; None where it is there. A folded network stays on its
            device: where it serves, the VAE need not come.
        clips: whether clips go through folded networks where nobody says whether they are to.
        frames_argument: name of the argument of the VAE's `decode` that is a function, called with
            each frame of the result, in order, as soon as it is finished; None: there is none.
    """

    cached: Callable[[str, Encode], Encode] = _uncached
    is_equivalent: Callable[[Any], bool] = _not_equivalent
    pending_fetch: Callable[[], Callable[[], None] | None] = _nothing_to_fetch
    clips: bool = True
    frames_argument: str | None = None
