"""What holds for every op of the registry, so that the next one cannot be forgotten."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import cosmos3_fast.ops  # noqa: F401  (fills the registry)
from cosmos3_fast.ops import registry


def floats(values: Any) -> list[Tensor]:
    """The floating tensors among what an op takes or returns, those in lists included."""
    if isinstance(values, (tuple, list)):
        return [x for each in values for x in floats(each)]
    return [values] if isinstance(values, Tensor) and values.is_floating_point() else []


def of_floats(function: Callable[..., Any], args: tuple[Any, ...]) -> Callable[..., Any]:
    """`function` of the floating tensors of `args`, which it does not write; its floats."""

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        replaced = iter(tensors)

        def given(x: Any) -> Any:
            if isinstance(x, list) and floats(x):
                return [given(each) for each in x]
            return next(replaced).clone() if floats(x) else x

        return tuple(floats(function(*map(given, args))))

    return call


@pytest.fixture(params=registry.OPS)
def op(request: pytest.FixtureRequest) -> str:
    return request.param


def test_it_has_an_example(op: str, device: str):
    assert op in registry.EXAMPLES, f"register({op!r}, …) must be given an example"
    args = registry.EXAMPLES[op](device)
    registry.CHECKS[op](*args)
    assert all(x.device.type == device for x in args if isinstance(x, Tensor))


def test_the_example_equals_the_reference(op: str, device: str):
    args = registry.EXAMPLES[op](device)
    got = of_floats(registry.select(op, None, torch.device(device)), args)(*floats(args))
    wanted = of_floats(registry.REFERENCES[op], args)(*floats(args))
    for ours, theirs in zip(got, wanted, strict=True):
        # Winograd's products in float32 are summed in another order.
        bound = 1e-12 if ours.dtype == torch.float64 else 1e-4
        torch.testing.assert_close(ours, theirs, rtol=bound, atol=bound)


@pytest.mark.parametrize("through", ["op", "wrapper"])
def test_forward_mode_is_right_or_refused(op: str, through: str, device: str):
    args = registry.EXAMPLES[op](device)
    called = registry.REGISTERED[op]
    if through == "wrapper":
        called = registry.select(op, None, torch.device(device))
    function, reference = (of_floats(f, args) for f in (called, registry.REFERENCES[op]))
    primals = floats(args)
    # A tangent of one argument alone, and of all of them.
    for chosen in (*({i} for i in range(len(primals))), set(range(len(primals)))):

        def some(f: Callable[..., Any], *tensors: Tensor, chosen: set[int] = chosen) -> Any:
            replaced = iter(tensors)
            return f(*(next(replaced) if i in chosen else p for i, p in enumerate(primals)))

        moved = tuple(p for i, p in enumerate(primals) if i in chosen)
        tangents = tuple(torch.cos(3 * p) for p in moved)
        if not moved:
            continue
        try:
            _, got = torch.func.jvp(lambda *t: some(function, *t), moved, tangents)
        except RuntimeError as error:
            if "require a gradient" not in str(error):
                raise
            with forward_ad.dual_level(), pytest.raises(RuntimeError, match="require a gradient"):
                some(function, *map(forward_ad.make_dual, moved, tangents))
            continue
        _, wanted = torch.func.jvp(lambda *t: some(reference, *t), moved, tangents)
        assert any(each.any() for each in wanted)
        with forward_ad.dual_level():
            outputs = some(function, *map(forward_ad.make_dual, moved, tangents))
            duals = [forward_ad.unpack_dual(x).tangent for x in outputs]
        for ours, theirs, dual in zip(got, wanted, duals, strict=True):
            # The same formula in float64.
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
            zero = torch.zeros_like(theirs)
            torch.testing.assert_close(
                zero if dual is None else dual, theirs, rtol=1e-12, atol=1e-12
            )


def test_nested_transforms_are_right_or_raise(op: str, device: str):
    """Torch itself does not batch every plain operation that stands in for an op there."""
    if op.endswith("_"):
        pytest.skip("what is written in place has no derivatives")
    args = registry.EXAMPLES[op](device)
    leaves = floats(args)
    for i, x in enumerate(leaves):
        if x.numel() > 64:
            continue

        def total(f: Callable[..., Any], i: int = i) -> Callable[[Tensor], Tensor]:
            whole = of_floats(f, args)
            return lambda t: sum(y.square().sum() for y in whole(*leaves[:i], t, *leaves[i + 1 :]))

        gradient = torch.func.grad(total(registry.REFERENCES[op]))
        wanted, batch = gradient(x), torch.stack([x, x / 2])
        called = total(registry.REGISTERED[op])
        for transform, point, expected in (
            (torch.func.jacfwd(called), x, wanted),
            (torch.func.jacrev(called), x, wanted),
            (torch.vmap(torch.func.grad(called)), batch, torch.stack([*map(gradient, batch)])),
        ):
            try:
                got = transform(point)
            except RuntimeError:
                continue
            # The same formula in float64.
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
