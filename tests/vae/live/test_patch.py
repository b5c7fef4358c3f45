"""Methods are wrapped once, where they are meant to be."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

from cosmos3_fast.vae.live.patch import hooked, signature, wrap, wrap_where_defined


def make_classes() -> tuple[Any, Any]:
    class Base:
        def method(self, x: int = 1) -> int:
            """Words."""
            return x

    class Derived(Base):
        pass

    return Base, Derived


def one_more(original: Any, self: Any, *args: Any) -> int:
    return original(self, *args) + 1


def test_a_method_is_wrapped_once() -> None:
    base, derived = make_classes()
    assert wrap(base, "method", hooked(one_more))
    assert not wrap(base, "method", hooked(one_more))
    assert not wrap(derived, "method", hooked(one_more))
    assert base().method(5) == derived().method(5) == 6
    assert base.method.__doc__ == "Words."
    assert base.method.__wrapped__ is not base.method


def test_for_a_class_alone_and_for_all_that_share_the_method() -> None:
    base, derived = make_classes()
    assert wrap(derived, "method", hooked(one_more))
    assert (base().method(5), derived().method(5)) == (5, 6)
    base, derived = make_classes()
    assert wrap_where_defined(derived, "method", hooked(one_more))
    assert (base().method(5), derived().method(5)) == (6, 6)


def test_functions_of_a_module() -> None:
    module = ModuleType("somewhere")
    module.double = lambda x: 2 * x
    assert wrap(module, "double", hooked(lambda original, x: original(x) + 1))
    assert module.double(3) == 7


def test_what_is_no_function() -> None:
    class Other:
        method = property(lambda self: 1)

    with pytest.raises(TypeError, match=r"Other\.method must be a function, got property"):
        wrap(Other, "method", hooked(one_more))
    with pytest.raises(TypeError, match=r"Other\.nothing must be a function, got NoneType"):
        wrap(Other, "nothing", hooked(one_more))
    assert not wrap_where_defined(Other, "method", hooked(one_more))
    assert not wrap_where_defined(Other, "nothing", hooked(one_more))


def test_signatures() -> None:
    base, _ = make_classes()
    assert list(signature(base.method, {}).parameters) == ["self", "x"]
    plain = {"self": None, "x": None}
    assert list(signature(lambda *args, **kwargs: None, plain).parameters) == ["self", "x"]
