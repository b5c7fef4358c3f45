"""What happens to a VAE between two calls: to an accelerated one and its twin alike."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import torch
from soak_pair import PARTS, Call, Pair
from torch import Tensor, nn
from torch.nn.utils import parametrize

from cosmos3_fast import UnsupportedVAEError, accelerate, refresh, restore

Event = Callable[[Pair], str]
"""Does something to both VAEs, by the pair's random numbers, and says what."""
SECONDS = 60.0


def some_calls(pair: Pair) -> str:
    calls = [Call.drawn(pair.rng) for _ in range(pair.rng.randint(1, 3))]
    for call in calls:
        pair.call(call)
    return "; ".join(map(str, calls))


def calls_in_threads(pair: Pair) -> str:
    calls = [Call.drawn(pair.rng)._replace(mode="no_grad") for _ in range(3)]
    if any(isinstance(m, nn.Dropout) and m.p and m.training for m in pair.twin.modules()):
        return "left out: one random state for all threads"
    if "restored" in pair.undo:
        return "left out: a VAE by itself takes one call at a time"
    wanted = [call.run(pair.twin)[0] for call in calls]
    found: dict[int, Any] = {}

    def run(i: int) -> None:
        try:
            found[i] = calls[i].run(pair.ours)
        except Exception as error:
            found[i] = error

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for i, thread in enumerate(threads):
        thread.join(SECONDS)
        assert i in found, "a thread does not come to an end"
    for i, call in enumerate(calls):
        if isinstance(found[i], Exception):
            raise found[i]
        ours, _, fast = found[i]
        pair.judge(call, ours, wanted[i], fast)
    return "; ".join(map(str, calls))


def _other(pair: Pair, weight: Tensor) -> Tensor:
    """Other values for a weight, none of them the same."""
    generator = torch.Generator().manual_seed(pair.rng.randrange(2**31))
    noise = torch.rand(weight.shape, generator=generator, dtype=torch.float64)
    added = (0.01 + 0.1 * noise).to(weight.dtype) * weight.detach().abs().max().clamp_min(0.01)
    return (weight.detach() * 0.9 + added).to(weight.dtype)


def _some(pair: Pair) -> tuple[str, list[tuple[Tensor, ...]]]:
    method = pair.rng.choice(list(PARTS))
    weights = pair.weights(method)
    count = pair.rng.choice((1, 1, 3, len(weights)))
    return method, pair.rng.sample(weights, count)


def write_in_place(pair: Pair) -> str:
    method, chosen = _some(pair)
    for weights in chosen:
        values = _other(pair, weights[1])
        with torch.no_grad():
            for weight in weights:
                weight.copy_(values)
    return f"{len(chosen)} weights of {method}"


def write_through_data(pair: Pair) -> str:
    method, chosen = _some(pair)
    for weights in chosen:
        values = _other(pair, weights[1])
        for weight in weights:
            weight.data.copy_(values)
    if len(chosen) < len(pair.weights(method)):
        pair.changed_without_a_trace(method)
    return f"{len(chosen)} weights of {method}"


def write_by_pointer(pair: Pair) -> str:
    method, chosen = _some(pair)
    for weights in chosen:
        same_size = {8: torch.int64, 4: torch.int32, 2: torch.int16}[weights[1].element_size()]
        values = _other(pair, weights[1]).view(same_size)
        for weight in weights:
            weight.detach().view(same_size).numpy()[...] = values.numpy()
    if len(chosen) < len(pair.weights(method)):
        pair.changed_without_a_trace(method)
    return f"{len(chosen)} weights of {method}"


def give_other_memory(pair: Pair) -> str:
    method, chosen = _some(pair)
    for weights in chosen:
        values = _other(pair, weights[1])
        for weight in weights:
            weight.data = values.clone()
    return f"{len(chosen)} weights of {method}"


def replace_a_parameter(pair: Pair) -> str:
    name = pair.rng.choice(("quant_conv", "post_quant_conv"))
    if "parametrized" in pair.undo:
        return "left out"
    values = _other(pair, getattr(pair.twin, name).weight)
    for vae in pair.both:
        module = getattr(vae, name)
        module.weight = nn.Parameter(values.clone(), module.weight.requires_grad)
    return name


def load(pair: Pair) -> str:
    assign = pair.rng.random() < 0.5
    state = {name: _other(pair, value) for name, value in pair.twin.state_dict().items()}
    for vae in pair.both:
        vae.load_state_dict({name: value.clone() for name, value in state.items()}, assign=assign)
        vae.requires_grad_(False)
    pair.undo.pop("requires_grad", None)
    return f"assign={assign}"


def optimizer_step(pair: Pair) -> str:
    kind = pair.rng.choice(("sgd", "foreach", "fused"))
    call = Call.drawn(pair.rng)._replace(mode="grad", wanted=None, batch=1)
    for vae in pair.both:
        flags = [(p, p.requires_grad) for p in vae.parameters()]
        vae.requires_grad_(True)
        call.run(vae)
        trained = [p for p in vae.parameters() if p.grad is not None]
        optimizer: Any = (
            torch.optim.SGD(trained, lr=0.01)
            if kind == "sgd"
            else torch.optim.AdamW(trained, lr=0.001, **{kind: True})
        )
        optimizer.step()
        vae.zero_grad(set_to_none=True)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    if kind == "fused":  # weights that have no part in this call are as before
        pair.changed_without_a_trace(call.method)
    return f"{kind} after {call}"


def there_and_back(pair: Pair) -> str:
    dtype = pair.rng.choice((torch.float16, torch.bfloat16, torch.float64))
    for vae in pair.both:
        own = vae.dtype
        vae.to(dtype).to(own)
    return str(dtype)


def other_dtype(pair: Pair) -> str:
    dtype = pair.rng.choice((torch.float64, torch.bfloat16))
    for vae in pair.both:
        vae.to(dtype)

    def undo() -> None:
        for vae in pair.both:
            vae.to(torch.float32)

    pair.undo["dtype"] = undo
    return str(dtype)


def other_layout(pair: Pair) -> str:
    layout = pair.rng.choice((torch.channels_last_3d, torch.contiguous_format))
    for vae in pair.both:
        for module in vae.modules():
            if isinstance(module, nn.Conv3d):
                module.to(memory_format=layout)
    return str(layout)


def train(pair: Pair) -> str:
    for vae in pair.both:
        vae.train()

    def undo() -> None:
        for vae in pair.both:
            vae.eval()

    pair.undo["train"] = undo
    return ""


def with_dropout(pair: Pair) -> str:
    for vae in pair.both:
        for module in vae.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.5

    def undo() -> None:
        for vae in pair.both:
            for module in vae.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0

    pair.undo["dropout"] = undo
    return ""


def requires_grad(pair: Pair) -> str:
    for vae in pair.both:
        vae.requires_grad_(True)

    def undo() -> None:
        for vae in pair.both:
            vae.requires_grad_(False)

    pair.undo["requires_grad"] = undo
    return ""


def other_padding(pair: Pair) -> str:
    # The 3-D convolutions pad by themselves: the VAE's own code fails where they do it once more.
    names = [name for name, module in pair.twin.named_modules() if type(module) is nn.Conv2d]
    name = pair.rng.choice([*names, "quant_conv", "post_quant_conv"])
    modules = [vae.get_submodule(name) for vae in pair.both]
    for module in modules:
        module.padding_mode = "circular"

    def undo() -> None:
        for module in modules:
            module.padding_mode = "zeros"

    if "padding" not in pair.undo:
        pair.undo["padding"] = undo
        return name
    undo()
    return f"{name}, and at once undone"


def other_class_forward(pair: Pair) -> str:
    if "forward" in pair.undo:
        return "left out"
    cls = type(pair.twin.encoder.norm_out)
    own = cls.forward
    cls.forward = lambda self, x: own(self, x) * 1.5

    def undo() -> None:
        cls.forward = own

    pair.undo["forward"] = undo
    return cls.__name__


def hook(pair: Pair) -> str:
    name = pair.rng.choice([n for n, _ in pair.twin.named_modules() if n.count(".") < 3])
    kind = pair.rng.choice(("register_forward_hook", "register_forward_pre_hook"))
    if "hook" in pair.undo:
        return "left out"

    def after(module: Any, args: Any, out: Any) -> Any:
        return out * 1.5 if isinstance(out, Tensor) else None

    def before(module: Any, args: Any) -> Any:
        return (args[0] * 1.5, *args[1:]) if args and isinstance(args[0], Tensor) else None

    function = after if kind == "register_forward_hook" else before
    handles = [getattr(vae.get_submodule(name), kind)(function) for vae in pair.both]

    def undo() -> None:
        for handle in handles:
            handle.remove()

    pair.undo["hook"] = undo
    return f"{kind} on {name!r}"


def global_hook(pair: Pair) -> str:
    if "global hook" in pair.undo:
        return "left out"
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: None)
    pair.undo["global hook"] = handle.remove
    return ""


class Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def parametrized(pair: Pair) -> str:
    if "parametrized" in pair.undo:
        return "left out"
    name = pair.rng.choice(("quant_conv", "post_quant_conv"))
    for vae in pair.both:
        parametrize.register_parametrization(getattr(vae, name), "weight", Half())

    def undo() -> None:
        for vae in pair.both:
            parametrize.remove_parametrizations(getattr(vae, name), "weight")

    pair.undo["parametrized"] = undo
    return name


def tile(pair: Pair) -> str:
    small = pair.rng.random() < 0.5
    for vae in pair.both:
        if small:
            vae.enable_tiling(16, 16, 16, 16)
        else:
            vae.enable_tiling(512, 512, 384, 384)

    def undo() -> None:
        for vae in pair.both:
            vae.disable_tiling()

    pair.undo["tiling"] = undo
    return "16 pixels" if small else "512 pixels"


def slice_batches(pair: Pair) -> str:
    for vae in pair.both:
        vae.enable_slicing()

    def undo() -> None:
        for vae in pair.both:
            vae.disable_slicing()

    pair.undo["slicing"] = undo
    return ""


def copy_both(pair: Pair) -> str:
    how = pair.rng.choice(("deepcopy", "pickle"))
    if pair.undo:  # which would not reach the copies
        return "left out"
    copied = copy.deepcopy if how == "deepcopy" else lambda vae: pickle.loads(pickle.dumps(vae))
    pair.ours, pair.twin = map(copied, pair.both)
    return how


def fold_again(pair: Pair) -> str:
    refresh(pair.ours)
    return ""


def leave(pair: Pair) -> str:
    restore(pair.ours)
    pair.undo["restored"] = lambda: _accelerate(pair, "restored")
    return ""


def other_mode(pair: Pair) -> str:
    options: dict[str, Any] = pair.rng.choice(
        ({"mode": "exact"}, {"clips": False}, {"frozen": True}, {"mode": "fast"})
    )
    pair.undo["mode"] = lambda: _accelerate(pair, "mode", clips=True, frozen=False)
    _accelerate(pair, "mode", **options)
    return str(options)


def _accelerate(pair: Pair, name: str, **options: Any) -> None:
    """What is said to be refused is tried again when `name` is undone once more."""
    try:
        accelerate(pair.ours, **options)
    except UnsupportedVAEError:
        if not {"padding", "forward"} & set(pair.undo):
            raise
        pair.undo[name] = lambda: _accelerate(pair, name, clips=True, frozen=False)


def undo_one(pair: Pair) -> str:
    if not pair.undo:
        return "nothing is on"
    name = pair.rng.choice(sorted(pair.undo))
    pair.undo.pop(name)()
    return name


EVENTS: dict[Event, int] = {
    some_calls: 30,
    calls_in_threads: 2,
    undo_one: 24,
    write_in_place: 3,
    write_through_data: 3,
    write_by_pointer: 3,
    give_other_memory: 2,
    replace_a_parameter: 1,
    load: 2,
    optimizer_step: 3,
    there_and_back: 2,
    other_dtype: 1,
    other_layout: 1,
    train: 1,
    with_dropout: 1,
    requires_grad: 1,
    other_padding: 1,
    other_class_forward: 1,
    hook: 1,
    global_hook: 1,
    parametrized: 1,
    tile: 2,
    slice_batches: 2,
    copy_both: 2,
    fold_again: 1,
    leave: 1,
    other_mode: 2,
}
"""How often each is drawn, relative to the others."""
