"""How many latent frames of a clip are used: said around an encode, and heard by the VAE."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from cosmos3_fast.frames import conditioned_span

# Latent frames that the caller of `encode` will use; None: all; `_ALL`: all, whatever is announced
# inside. A context variable, since the one who knows and the VAE have an engine between them, and
# another thread or task may be encoding for a request of its own.
_ALL = -1
_wanted: ContextVar[int | None] = ContextVar("cosmos3_fast_wanted", default=None)


def announced() -> int | None:
    """What is announced here: the first so many latent frames are used; None: all of them."""
    count = _wanted.get()
    return None if count == _ALL else count


@contextmanager
def wanted_frames(count: int | None) -> Iterator[None]:
    """Inside, `encode` of an accelerated VAE computes only the first `count` latent frames.

    The others are zeros. 0: nothing runs. None: all of them. Seen by this thread and task only.
    """
    if _wanted.get() == _ALL:
        yield
        return
    token = _wanted.set(count)
    try:
        yield
    finally:
        _wanted.reset(token)


@contextmanager
def all_frames() -> Iterator[None]:
    """Inside, what is announced has no effect: someone reads the latents of all frames."""
    token = _wanted.set(_ALL)
    try:
        yield
    finally:
        _wanted.reset(token)


def wanted_at(indexes: Iterable[int], total: int) -> int | None:
    """Latent frames of a clip that are used where those at `indexes` are.

    Args:
        indexes: of latent frames.
        total: latent frames of the clip.

    Returns:
        None where an index is counted from the end or out of range: it is the engine's to resolve
        or to refuse.
    """
    given = list(indexes)
    return conditioned_span(given) if all(0 <= index < total for index in given) else None
