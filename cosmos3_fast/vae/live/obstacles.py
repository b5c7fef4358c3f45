"""What keeps a live VAE on its own path for now, and what shows that its weights have changed.

Only attributes are read, never values: nothing here waits for a device.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _modules

from cosmos3_fast.ops.checks import FLOAT_DTYPES
from cosmos3_fast.vae.live.patch import ATTRIBUTE

# Weights in another dtype are stored for a hook to convert.
_PLAIN_DTYPES = frozenset(FLOAT_DTYPES)


# What modules rarely have, and then need more than a glance.
RARE = ("forward", "world_size", "_compiled_call_impl")
# Of modules without modules below them: what the checks before folding read of them.
SETTINGS = (
    "padding_mode",
    "padding",
    "_padding",
    "stride",
    "dilation",
    "groups",
    "mode",
    "scale_factor",
    "scale",
    "channel_first",
    "factor_t",
    "factor_s",
)


class Survey(NamedTuple):
    """One walk over a part of a VAE.

    Attributes:
        obstacle: why the folded network may not stand in for the part; None if nothing speaks
            against it.
        trainable: whether a parameter requires a gradient.
        traces: every module with its class's `forward` and its settings, and every tensor with its
            version and dtype; weak references to the modules and tensors.
        weights: the tensors.
        training: why weights are likely to change without a trace; None if they are not.
        addresses: of the weights, where they are known.
    """

    obstacle: str | None
    trainable: bool
    traces: list[tuple[Any, Any, Any]]
    weights: list[Tensor] = []  # noqa: RUF012
    training: str | None = None
    addresses: list[int] | None = None


def survey(vae: Any, names: tuple[str, ...], is_equivalent: Callable[[Any], bool]) -> Survey:
    """Look at the modules `names` of the VAE and at all below them.

    Args:
        vae: the live VAE.
        names: of its modules.
        is_equivalent: see `Engine`.
    """
    traces: list[tuple[Any, Any, Any]] = []
    weights: list[Tensor] = []
    trainable = False
    training: str | None = None
    plain: torch.dtype | None = None
    # By class: its forward, and what reads the settings that its modules have.
    known: dict[type, tuple[Any, Any]] = {}
    stack: list[tuple[Any, str, Any]] = [(None, name, getattr(vae, name, None)) for name in names]
    while stack:
        entry = stack.pop()
        module = entry[2]
        if module is None:
            continue
        if not isinstance(module, nn.Module):
            name = _full_name(entry)
            return Survey(f"vae.{name} is no module but a {type(module).__name__}", False, [])
        attributes = module.__dict__
        modules = attributes["_modules"]
        if (
            attributes["_forward_hooks"]
            or attributes["_forward_pre_hooks"]
            or "forward" in attributes
            or "world_size" in attributes
            or "parametrizations" in modules
            or "_orig_mod" in modules
            or attributes.get("_compiled_call_impl") is not None
        ):
            obstacle = _obstacle(_full_name(entry), attributes, is_equivalent)
            if obstacle is not None:
                return Survey(obstacle, False, [])
        cls = type(module)
        look = known.get(cls)
        if look is None:
            settings = [] if modules else [name for name in SETTINGS if name in attributes]
            look = known[cls] = (
                _forward_of(cls),
                operator.itemgetter(*settings) if settings else None,
            )
        forward, read = look
        try:
            values = None if read is None else read(attributes)
        except KeyError:  # one was taken away
            values = None
        traces.append((weakref.ref(module), forward, values))
        is_training = attributes["training"]
        if is_training and "p" in attributes and module.p and "Dropout" in cls.__name__:
            return Survey(f"vae.{_full_name(entry)} is dropout in training mode", False, [])
        for tensors in (attributes["_parameters"], attributes["_buffers"]):
            for tensor in tensors.values():
                if tensor is None:
                    continue
                if tensor.is_meta:
                    name = _full_name(entry)
                    reason = f"vae.{name} has weights on the meta device: they are offloaded"
                    return Survey(reason, False, [])
                dtype = tensor.dtype
                if dtype is not plain:
                    if dtype not in _PLAIN_DTYPES:
                        name = _full_name(entry)
                        return Survey(f"vae.{name} has weights stored as {dtype}", False, [])
                    plain = dtype
                if tensor.requires_grad:
                    trainable = True
                    if training is None and (is_training or tensor.grad is not None):
                        training = f"the weights of vae.{_full_name(entry)} are being trained"
                # A tensor made in inference mode has no version.
                mark = tensor.data_ptr() if tensor.is_inference() else tensor._version
                traces.append((weakref.ref(tensor), mark, dtype))
                weights.append(tensor)
        if modules:
            stack.extend([(entry, key, below) for key, below in modules.items()])
    return Survey(None, trainable, traces, weights, training)


def _full_name(entry: tuple[Any, str, Any]) -> str:
    above, name, _ = entry
    return name if above is None else f"{_full_name(above)}.{name}"


def _forward_of(cls: Any) -> Any:
    """What the class computes, also where it is looked on from a wrapper of ours."""
    forward = cls.forward
    return forward.__wrapped__ if hasattr(forward, ATTRIBUTE) else forward


def _obstacle(
    name: str, attributes: dict[str, Any], is_equivalent: Callable[[Any], bool]
) -> str | None:
    modules = attributes["_modules"]
    hooks, before = attributes["_forward_hooks"], attributes["_forward_pre_hooks"]
    if (hooks or before) and not _are_ours(hooks, before):
        return f"vae.{name} has forward hooks"
    if "parametrizations" in modules:
        return f"vae.{name} is parametrized"
    if "_orig_mod" in modules or attributes.get("_compiled_call_impl") is not None:
        return f"vae.{name} is compiled"
    forward = attributes.get("forward")
    if forward is not None and not is_equivalent(forward):
        return f"vae.{name} has a forward of its own (offloading, casting or compilation)"
    return _why_parallel(name, attributes) if "world_size" in attributes else None


def _are_ours(*hooks: dict[int, Any]) -> bool:
    """Whether all of a module's hooks are exact mode's, which act in the thread that set them."""
    return all(hasattr(hook, ATTRIBUTE) for kind in hooks for hook in tuple(kind.values()))


def _why_parallel(name: str, attributes: dict[str, Any]) -> str | None:
    """Ranks that share one frame have to take the same path; some VAEs say so in this way."""
    parallel = attributes.get("use_parallel_encode") or attributes.get("use_parallel_decode")
    if parallel and attributes.get("world_size", 1) > 1:
        return f"vae.{name} works in parallel over ranks"
    return None


def same_traces(seen: list[tuple[Any, Any, Any]], now: list[tuple[Any, Any, Any]]) -> bool:
    """Whether two surveys saw the same objects with the same contents, as far as attributes show.

    Args:
        seen: the earlier one.
        now: the later one, whose objects live.
    """
    return seen is now or (
        len(seen) == len(now)
        and all(
            before() is after() and mark == mark_now and dtype == dtype_now
            for (before, mark, dtype), (after, mark_now, dtype_now) in zip(seen, now, strict=True)
        )
    )


def why_not_at_all(vae: Any, x: Tensor, names: tuple[str, ...]) -> str | None:
    """What about the VAE's settings or the surroundings calls for its own code; None if nothing."""
    if torch.is_autocast_enabled(x.device.type):
        return "autocast is on"
    if _modules._global_forward_hooks or _modules._global_forward_pre_hooks:
        return "forward hooks of all modules are registered"
    if any(name in vars(vae) for name in names):
        return f"one of {', '.join(names)} is replaced on this VAE"
    return None


def why_tiled(vae: Any, height: int, width: int) -> str | None:
    """Why tiling may change the result at this size in pixels; None where it cannot."""
    if not getattr(vae, "use_tiling", False):
        return None
    tile = [getattr(vae, f"tile_sample_min_{side}", 0) or 0 for side in ("height", "width")]
    if height <= tile[0] and width <= tile[1]:
        return None
    # Without the size, which would be told anew for each.
    return f"tiling is on, and the frame exceeds a tile of {tile[0]}x{tile[1]} pixels"


def why_not_shortened(vae: Any) -> str | None:
    """Why the encode of a clip's beginning might not have the bits of the whole; None if it has."""
    for name in ("_encode", "tiled_encode"):
        if name in vars(vae):
            return f"vae.{name} was replaced"
    if getattr(vae, "use_feature_cache", True) is False:
        return "the VAE's feature cache is off"
    parallel = _why_parallel("encoder", vars(vae.encoder))
    if parallel is not None:
        return parallel
    quant_conv = getattr(vae, "quant_conv", None)
    if not isinstance(quant_conv, nn.Module):
        return "the VAE has no quant_conv"
    if not _are_ours(quant_conv._forward_hooks, quant_conv._forward_pre_hooks):
        return "vae.quant_conv has forward hooks"
    for part in (vae.encoder, quant_conv):
        for module in part.modules():
            forward = vars(module).get("forward")
            if (
                "_orig_mod" in module._modules
                or getattr(module, "_compiled_call_impl", None) is not None
                or hasattr(forward, "_torchdynamo_orig_callable")
            ):
                return (
                    "the VAE's encoder is compiled, and other lengths may compile to other "
                    "roundings"
                )
    return None
