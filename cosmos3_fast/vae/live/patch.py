"""Wrapping a method of a class, or a function of a module, once per process: the only way here."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any

ATTRIBUTE = "_cosmos3_fast"
"""What this package leaves: on a wrapper a mark, on a VAE its acceleration, on a pipeline the mode
for a VAE that it gets later."""

_lock = threading.Lock()


def wrap(owner: Any, name: str, around: Callable[[Any], Callable[..., Any]]) -> bool:
    """Put a wrapper in the place of `owner.name`, where there is not one of ours already.

    Args:
        owner: a class or a module. A method that a class inherits is wrapped for this class.
        name: of a function.
        around: gives the wrapper of the function, and is called once.

    Returns:
        Whether something was wrapped.

    Raises:
        TypeError: what is there is no function.
    """
    with _lock:
        original = inspect.getattr_static(owner, name, None)
        if not inspect.isfunction(original):
            raise TypeError(
                f"{owner.__name__}.{name} must be a function, got {type(original).__name__}"
            )
        if hasattr(original, ATTRIBUTE):
            return False
        wrapper = functools.wraps(original)(around(original))
        setattr(wrapper, ATTRIBUTE, True)
        setattr(owner, name, wrapper)
        return True


def wrap_where_defined(
    cls: type[Any], name: str, around: Callable[[Any], Callable[..., Any]]
) -> bool:
    """`wrap` in the class that defines the method, so that all that derives from it is reached.

    What is no plain function is left as it is.
    """
    owner = next((base for base in cls.__mro__ if name in vars(base)), None)
    return inspect.isfunction(vars(owner or object).get(name)) and wrap(owner, name, around)


def hooked(hook: Callable[..., Any]) -> Callable[[Any], Callable[..., Any]]:
    """For `wrap`: a wrapper that calls `hook(original, *args, **kwargs)`."""

    def around(original: Any) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return hook(original, *args, **kwargs)

        return wrapper

    return around


def signature(method: Any, plain: dict[str, Any]) -> inspect.Signature:
    """Of a method, also where an engine's decorator hides it.

    Args:
        method: a function.
        plain: names and defaults that are assumed where the method only shows `*args`.
    """
    shown = inspect.signature(method)
    kinds = [parameter.kind for parameter in shown.parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        return shown
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature([inspect.Parameter(n, kind, default=v) for n, v in plain.items()])
