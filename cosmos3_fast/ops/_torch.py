"""Every private name of torch that this package uses, and what is done without it.

Such a name may be gone from a later release: it is then None here, and nothing is lost but what the
function that needs it says.
"""

from __future__ import annotations

import importlib
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)


def _found(path: str) -> Any:
    """Gives what the dotted `path` names, or None where this torch has no such thing."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return None


_below_autograd = _found("torch._C._AutoDispatchBelowAutograd")
_count_dispatch_modes = _found("torch._C._len_torch_dispatch_stack")
_count_function_modes = _found("torch._C._len_torch_function_stack")
_innermost_transform = _found("torch._C._functorch.peek_interpreter_stack")
_is_tracing = _found("torch._C._is_tracing")
_has_any_global_hook = _found("torch.nn.modules.module._has_any_global_hook")
_fake_tensor = _found("torch._subclasses.fake_tensor.FakeTensor")
_negative_view = _found("torch._neg_view")


def below_autograd() -> Any:
    """Gives a context in which an op skips its Autograd kernel.

    Where torch has none, the op does not skip it (`is_watched` says so), and what an eager backend
    returns may be a view, which cannot be written to while it requires a gradient.
    """
    return nullcontext() if _below_autograd is None else _below_autograd()


def callable_of(op: Any) -> Any:
    """Gives what calls an op past its Python object; where torch has no such thing, that object."""
    return getattr(op, "_op", op)


def has_hooks_of_all_modules() -> bool:
    """Tells whether hooks of all modules are registered; True where torch does not tell."""
    return _has_any_global_hook is None or bool(_has_any_global_hook())


def redispatch(op: Any, keyset: Any, *args: Any) -> Any:
    """Calls the kernel below the one that runs, whose registration asked for its `keyset`."""
    with below_autograd():
        return op.redispatch(keyset.remove(keyset.highestPriorityTypeId()), *args)


def is_watched() -> bool:
    """Tells whether a mode, a transform, a tracer or forward-mode AD may have to see each call.

    True where torch does not tell: each call then goes through all of torch's layers, which costs
    the host some microseconds.
    """
    if (
        _below_autograd is None
        or _count_dispatch_modes is None
        or _count_function_modes is None
        or _innermost_transform is None
        or _is_tracing is None
    ):
        return True
    return (
        _count_dispatch_modes() > 0
        or _count_function_modes() > 0
        or _innermost_transform() is not None
        or forward_mode_is_on()
        or _is_tracing()
    )


def forward_mode_is_on() -> bool:
    """Tells whether there may be tangents; True, too, where torch does not say so."""
    return getattr(forward_ad, "_current_level", 0) >= 0


def has_memory(x: Tensor) -> bool:
    """Tells whether a plain tensor has memory of its own; those of transforms have none."""
    try:
        return x.data_ptr() != 0
    except RuntimeError:
        return False


def in_transform(*tensors: Tensor) -> bool:
    """Tells whether a function transform of `torch.func` runs.

    Where torch does not tell: whether one of `tensors` is a transform's.
    """
    if _innermost_transform is None:
        return any(x.numel() > 0 and not has_memory(x) for x in tensors if _may_have_memory(x))
    return _innermost_transform() is not None


def _may_have_memory(x: Tensor) -> bool:
    return type(x) in PLAIN_TENSORS and x.device.type != "meta"


def has_address(x: Tensor) -> bool:
    """Tells whether the address of `x` means anything, which that of a fake tensor does not.

    Where torch does not tell: whether `x` is of no subclass.
    """
    if x.device.type == "meta":
        return False
    return type(x) in PLAIN_TENSORS if _fake_tensor is None else not isinstance(x, _fake_tensor)


def beneath_negation(x: Tensor) -> Tensor | None:
    """Gives the memory of a view that torch negates when it is read; None where torch keeps it."""
    return None if _negative_view is None else _negative_view(x)
