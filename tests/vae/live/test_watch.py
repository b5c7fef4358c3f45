"""A second look sees whatever a survey would see, in a few calls of C."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from cosmos3_fast.vae.live.obstacles import survey
from cosmos3_fast.vae.live.watch import Watch

NAMES = ("part", "last")
OF_CLASS: list[Any] = [("a class", "its function")]


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = 2.0
        self.gamma = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gamma


class Vae:
    """What a survey reads of a VAE, small."""

    def __init__(self) -> None:
        block = nn.Sequential(nn.Conv2d(4, 4, 3), Norm(), nn.SiLU(), nn.Dropout(0.1))
        self.part = nn.Sequential(block, nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)).eval()
        self.part[2].num_batches_tracked = torch.zeros(())
        self.last = nn.Conv2d(4, 4, 1).eval()

    @property
    def conv(self) -> Any:
        return self.part[0][0]


def seen_by(vae: Any) -> Any:
    return survey(vae, NAMES, lambda forward: True)


def watching(vae: Any) -> Watch:
    watch = Watch(vae, NAMES, OF_CLASS)
    watch.seen = seen_by(vae)._replace(weights=[])
    return watch


def parametrize(vae: Any) -> None:
    nn.utils.parametrizations.weight_norm(vae.conv)


def another_dictionary(name: str) -> Callable[[Any], None]:
    def change(vae: Any) -> None:
        held = OrderedDict(getattr(vae.conv, name))
        object.__setattr__(vae.conv, name, held)
        if name == "_parameters":
            held["weight"] = nn.Parameter(vae.conv.weight.detach().clone())
        elif name == "_modules":
            held["more"] = nn.SiLU()
        elif name == "_buffers":
            held["more"] = torch.zeros(2)
        else:
            held[0] = print

    return change


@torch.no_grad()
def in_place(vae: Any) -> None:
    vae.conv.bias.add_(1)


def renamed(vae: Any) -> None:
    modules = vae.part[0]._modules
    modules["_orig_mod"] = modules.pop("3")


def same_memory(vae: Any) -> None:
    weight = vae.part[1].weight
    vae.part[1].weight = nn.Parameter(weight.data.view(4, 4, 1, 1))


def other_memory(vae: Any) -> None:
    vae.conv.weight.data = vae.conv.weight.data.clone()


def reinterpreted(vae: Any) -> None:
    weight = vae.part[1].weight
    weight.data = weight.data.view(torch.float16)


def attributes_replaced(vae: Any) -> None:
    vae.conv.__dict__ = {**vars(vae.conv), "stride": (2, 2)}


def one_for_another(vae: Any) -> None:
    """As many attributes as before."""
    del vae.conv.transposed
    vae.conv.forward = print


CHANGES: dict[str, Callable[[Any], object]] = {
    "a hook": lambda v: v.conv.register_forward_hook(print),
    "a hook before": lambda v: v.part.register_forward_pre_hook(print),
    "a forward": lambda v: setattr(v.part[0][2], "forward", print),
    "one for another": one_for_another,
    "compiled": lambda v: v.conv.compile(backend="eager"),
    "in parallel": lambda v: setattr(v.part, "world_size", 2),
    "parametrized": parametrize,
    "renamed": renamed,
    "attributes": attributes_replaced,
    **{
        f"another {name}": another_dictionary(name)
        for name in (
            "_modules",
            "_parameters",
            "_buffers",
            "_forward_hooks",
            "_forward_pre_hooks",
        )
    },
    "a root": lambda v: setattr(v, "last", copy.deepcopy(v.last)),
    "no root": lambda v: setattr(v, "last", None),
    "a module": lambda v: v.part.__setitem__(1, copy.deepcopy(v.part[1])),
    "a module more": lambda v: v.conv.add_module("more", nn.SiLU()),
    "a module less": lambda v: v.part.__delitem__(2),
    "another class": lambda v: setattr(v.conv, "__class__", nn.ConvTranspose2d),
    "stride": lambda v: setattr(v.conv, "stride", (2, 2)),
    "a setting less": lambda v: delattr(v.conv, "padding_mode"),
    "scale": lambda v: setattr(v.part[0][1], "scale", 3.0),
    "dropout": lambda v: v.part[0][3].train(),
    "in place": in_place,
    "a parameter": lambda v: setattr(v.conv, "bias", nn.Parameter(torch.ones(4))),
    "no parameter": lambda v: setattr(v.conv, "bias", None),
    "a parameter more": lambda v: setattr(v.part[1], "bias", nn.Parameter(torch.ones(4))),
    "a buffer": lambda v: setattr(v.part[2], "running_mean", torch.ones(4)),
    "a buffer more": lambda v: v.conv.register_buffer("more", torch.ones(4)),
    "same memory": same_memory,
    "other memory": other_memory,
    "reinterpreted": reinterpreted,
    "trainable": lambda v: v.conv.bias.requires_grad_(False),
    "a gradient": lambda v: setattr(v.conv.bias, "grad", torch.ones(4)),
    "in training": lambda v: v.conv.train(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_sees_what_a_survey_would_see(change: str) -> None:
    vae = Vae()
    watch = watching(vae)
    for _ in range(2):
        again = watch.again(vae, list(OF_CLASS))
        assert again is not None
        now = seen_by(vae)
        assert all(map(torch.equal, again.weights, now.weights))
        assert len(again.weights) == len(now.weights)
        assert again.addresses == [weight.data_ptr() for weight in now.weights]
    CHANGES[change](vae)
    assert watch.again(vae, list(OF_CLASS)) is None


def test_sees_another_forward_of_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    vae = Vae()
    watch = watching(vae)
    assert watch.again(vae, [("a class", "another function")]) is None
    assert watch.again(vae, OF_CLASS) is not None
    monkeypatch.setattr(Norm, "forward", lambda self, x: x)
    assert watch.again(vae, OF_CLASS) is None


def test_a_forward_that_is_there_is_followed() -> None:
    vae = Vae()
    vae.conv.forward = nn.SiLU().forward
    watch = watching(vae)
    assert watch.again(vae, OF_CLASS) is not None
    vae.conv.forward = nn.SiLU().forward
    assert watch.again(vae, OF_CLASS) is None


@pytest.mark.parametrize(
    "state",
    [
        CHANGES["a hook"],
        CHANGES["a gradient"],
        lambda v: setattr(v.conv, "bias", nn.Parameter(torch.ones(4, device="meta"))),
        lambda v: setattr(v, "last", "no module"),
        lambda v: v.part.register_module("none", None),
    ],
)
def test_what_is_not_watched_is_surveyed_each_time(state: Callable[[Any], object]) -> None:
    vae = Vae()
    state(vae)
    watch = Watch(vae, NAMES, OF_CLASS)
    watch.seen = seen_by(Vae())
    assert watch.again(vae, OF_CLASS) is None


def test_what_is_replaced_is_freed() -> None:
    vae = Vae()
    watch = watching(vae)
    gone = [weakref.ref(x) for x in (vae.conv.weight, vae.part[1], vae.last, vae.last.weight)]
    gc.collect()
    gc.disable()
    try:
        vae.conv.weight = nn.Parameter(torch.ones(4, 4, 3, 3))
        del vae.part[1]
        vae.last = None
        assert [each() for each in gone] == [None] * 4
    finally:
        gc.enable()
    assert watch.again(vae, OF_CLASS) is None
