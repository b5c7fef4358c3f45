"""The second look at a part of a VAE: whether anything is other than when it was surveyed.

`obstacles.survey` walks modules in Python, which costs the host more than the rest of the seam.
What it reads is arranged here once, so that reading it again is a few calls of C over all modules.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import chain, repeat
from operator import attrgetter, contains, is_, is_not, itemgetter
from typing import Any, NamedTuple

from torch import Tensor, nn

from cosmos3_fast.ops._torch import PLAIN_TENSORS
from cosmos3_fast.vae.live.obstacles import RARE, SETTINGS, Survey

_HELD = ("_modules", "_parameters", "_buffers")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_OWN = (*RARE, "use_parallel_encode", "use_parallel_decode")
_dict, _forward, _grad = attrgetter("__dict__"), attrgetter("forward"), attrgetter("grad")
_marks = attrgetter("_version", "dtype", "requires_grad")


class _Looked(NamedTuple):
    """Attributes of modules, as dictionaries that live on, and what they held.

    Modules and tensors are not among them, so that what is replaced is freed.
    """

    attributes: list[dict[str, Any]]
    types: list[type]
    empty: list[tuple[Any, list[dict[str, Any]]]]
    held: list[tuple[Any, list[dict[str, Any]], list[Any]]]
    below: list[Any]
    names: list[Any]
    modules: list[Any]
    forwards: list[tuple[Any, Any]]
    plain: list[dict[str, Any]]
    own: list[tuple[dict[str, Any], tuple[Any, ...]]]
    settings: list[tuple[Any, list[dict[str, Any]], list[Any]]]
    values: list[Any]
    tensors: list[Callable[[], Any]]
    order: Callable[[list[Any]], tuple[Tensor, ...]]
    marks: list[tuple[Any, ...]]
    addresses: list[int]
    trainable: bool


class Watch:
    """What a survey of the modules `names` of a VAE saw, for looks at the same.

    Args:
        vae: the live VAE.
        names: of its modules.
        of_class: what else the survey's traces depend on, as tuples.

    Attributes:
        seen: the survey, without its tensors; to be set by who makes both, the watch first.
    """

    def __init__(self, vae: Any, names: tuple[str, ...], of_class: list[Any]) -> None:
        self._names, self._of_class = names, of_class
        self.seen: Survey | None = None
        roots = self._roots(vae)
        modules = list(roots)
        for module in modules:  # which grows meanwhile
            modules += getattr(module, "_modules", {}).values()
        this = weakref.ref(self)

        def forget(_: Any) -> None:
            watch = this()
            if watch is not None:  # a module is gone, and what it held should go too
                watch._looked = None

        self._looked: _Looked | None = None
        if all(isinstance(module, nn.Module) for module in modules):
            self._modules = [weakref.ref(module, forget) for module in modules]
            self._looked = _look(modules, list(_survey_order(roots)))

    def _roots(self, vae: Any) -> list[Any]:
        found = (getattr(vae, name, None) for name in self._names)
        return [module for module in found if module is not None]

    def again(self, vae: Any, of_class: list[Any]) -> Survey | None:
        """The survey, where it would see the same; else None."""
        looked, seen = self._looked, self.seen
        if looked is None or seen is None or of_class != self._of_class:
            return None
        try:
            weights = _same(looked, self._roots(vae))
        except (AttributeError, KeyError, RuntimeError, TypeError):  # of something else by now
            return None
        if weights is None:
            return None
        return Survey(None, seen.trainable, seen.traces, weights, seen.training, looked.addresses)


def _survey_order(roots: list[Any]) -> Iterator[Any]:
    stack = list(roots)
    while stack:
        module = stack.pop()
        yield module
        stack += module._modules.values()


def _look(modules: list[Any], in_order: list[Any]) -> _Looked | None:
    """What there is to see; None where a survey has to look each time.

    Args:
        modules: each one's below it after it, level by level.
        in_order: the same as a survey meets them.
    """
    attributes = [vars(module) for module in modules]
    hooks = [each[name] for each in attributes for name in _HOOKS]
    settings: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    for module, each in zip(modules, attributes, strict=True):
        names = [name for name in SETTINGS if name in each and not each["_modules"]]
        if "Dropout" in type(module).__name__ and "p" in each:
            names += ["p", "training"]
        elif any(x is not None and x.requires_grad for x in each["_parameters"].values()):
            names.append("training")
        if names:
            settings[tuple(names)].append(each)
    own = [each for each in attributes if any(name in each for name in RARE)]
    holders = [held for each in attributes for held in (each["_parameters"], each["_buffers"])]
    below = [each["_modules"] for each in attributes if each["_modules"]]
    values = [each.values() for each in holders if each]
    tensors = list(chain.from_iterable(values))
    places = {id(x): i for i, x in enumerate(tensors) if x is not None}
    weights = [
        x
        for module in in_order
        for held in (module._parameters, module._buffers)
        for x in held.values()
        if x is not None
    ]
    addresses = [x.data_ptr() for x in weights if type(x) in PLAIN_TENSORS and not x.is_inference()]
    if (
        any(hooks)
        or len(addresses) != len(weights)
        or len(weights) < 2  # of which `itemgetter` would make no tuple
        or not all(addresses)
        or any(x.requires_grad and x.grad is not None for x in weights)
    ):
        return None
    return _Looked(
        attributes,
        [*map(type, modules)],
        [
            (itemgetter(name), [each for each in attributes if not each[name]])
            for name in (*_HELD, *_HOOKS)
        ],
        [_reader((name,), [each for each in attributes if each[name]]) for name in _HELD],
        below,
        [*chain.from_iterable(below)],
        [each.values() for each in below],
        [(cls, _forward(cls)) for cls in {type(module) for module in modules}],
        [each for each in attributes if not any(name in each for name in RARE)],
        [(each, tuple(map(each.get, _OWN))) for each in own],
        [_reader(names, those) for names, those in settings.items()],
        values,
        [_nothing if x is None else weakref.ref(x) for x in tensors],
        itemgetter(*(places[id(x)] for x in weights)),
        [*map(_marks, weights)],
        addresses,
        any(x.requires_grad for x in weights),
    )


def _reader(names: tuple[str, ...], those: list[dict[str, Any]]) -> tuple[Any, Any, Any]:
    read = itemgetter(*names)
    return read, those, [*map(read, those)]


def _nothing() -> None:
    return None


def _same(looked: _Looked, roots: list[Any]) -> list[Tensor] | None:
    """The weights as a survey lists them, where all is as it was."""
    modules = [*roots, *chain.from_iterable(looked.modules)]
    if (
        len(modules) != len(looked.types)
        or [*map(type, modules)] != looked.types
        or not all(map(is_, map(_dict, modules), looked.attributes))
        or [*chain.from_iterable(looked.below)] != looked.names
    ):
        return None
    for read, those in looked.empty:
        if any(map(read, those)):
            return None
    for read, those, held in looked.held:
        if not all(map(is_, map(read, those), held)):
            return None
    for name in RARE:
        if any(map(contains, looked.plain, repeat(name))):
            return None
    for cls, forward in looked.forwards:
        if cls.forward is not forward:
            return None
    for each, were in looked.own:
        if tuple(map(each.get, _OWN)) != were:
            return None
    for read, those, held in looked.settings:
        if [*map(read, those)] != held:
            return None
    found = [*chain.from_iterable(looked.values)]
    if len(found) != len(looked.tensors) or not all(
        map(is_, found, [was() for was in looked.tensors])
    ):
        return None
    weights = looked.order(found)
    if [*map(_marks, weights)] != looked.marks or [
        *map(Tensor.data_ptr, weights)
    ] != looked.addresses:
        return None
    if looked.trainable and any(map(is_not, map(_grad, weights), repeat(None))):
        return None
    return [*weights]
