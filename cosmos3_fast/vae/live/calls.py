"""Calls of a VAE's `encode` and `decode`: handed to what the VAE carries, where it carries it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from cosmos3_fast.vae.live.patch import ATTRIBUTE, signature, wrap_where_defined
from cosmos3_fast.vae.live.returns import Finished

# Inside a VAE's own code: what it calls of itself, as `super().encode`, is its own too. Another
# thread or task may be outside of it meanwhile.
_own: ContextVar[bool] = ContextVar("cosmos3_fast_own", default=False)


def install(vae_class: type[Any]) -> None:
    """Wrap `encode` and `decode` of the class, or of the base that defines them, once."""
    for name, first in (("encode", "x"), ("decode", "z")):
        wrap_where_defined(vae_class, name, functools.partial(_inert, name=name, first=first))


def _inert(original: Any, name: str, first: str) -> Callable[..., Any]:
    """`original`, but for objects that carry a `seam.Acceleration`, whose method `name` serves.

    Args:
        original: the VAE's own method.
        name: "encode" or "decode".
        first: name of what is encoded or decoded, should the method not show it.
    """
    empty = inspect.Parameter.empty
    plain = {"self": empty, first: empty, "return_dict": True}
    shown = signature(original, plain)
    receiver, first = list(shown.parameters)[:2]
    known = {receiver, first, "return_dict"}
    more = list(shown.parameters.values())[2:]
    # What a call may give by name, and needs no matching of names.
    simple = {"return_dict"} & set(shown.parameters)
    is_enough = all(parameter.default is not empty for parameter in more)

    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return original(self, *args, **kwargs)
        state = self.__dict__.get(ATTRIBUTE)
        if state is None or _own.get():
            return original(self, *args, **kwargs)
        bound: Any = None
        finished: Finished | None = None
        if len(args) == 1 and is_enough and simple.issuperset(kwargs):
            x, others, return_dict = args[0], False, kwargs.get("return_dict", True)
        else:
            try:
                bound = shown.bind(self, *args, **kwargs)
            except TypeError:  # its own words for it
                return original(self, *args, **kwargs)
            given, taken = bound.arguments, known
            receiving = state.engine.frames_argument if name == "decode" else None
            if receiving is not None and callable(given.get(receiving)):
                given[receiving] = finished = Finished(given[receiving])
                taken = {*known, receiving}
            x, return_dict = given.get(first), given.get("return_dict", True)
            others = any(value is not None for key, value in given.items() if key not in taken)

        def own(tensor: Any) -> Any:
            if finished is not None:
                finished.restart()
            fetch = state.engine.pending_fetch()
            if fetch is not None:
                fetch()
            token = _own.set(True)
            try:
                if bound is None:
                    return original(self, tensor, **kwargs)
                bound.arguments[first] = tensor
                return original(*bound.args, **bound.kwargs)
            finally:
                _own.reset(token)

        if others or not isinstance(x, Tensor):
            return own(x)
        if finished is None:
            return getattr(state, name)(self, own, x, return_dict)
        return state.decode(self, own, x, return_dict, finished)

    return wrapper
