"""diffusers: a pipeline's VAE accelerated, and the frames that Cosmos3 conditions on announced.

    accelerate(pipe, mode="fast")
    restore(pipe)

All computing is the VAE's (`cosmos3_fast.vae.live`). What is added here is how many latent
frames a Cosmos3 pipeline will use, read from the arguments of the method or block that encodes.
The engine encodes at its own time and draws its noise in its own order.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import nn

from cosmos3_fast.engines import selftest
from cosmos3_fast.engines.common import guarded, tiny_diffusers_vae, tiny_vae_config
from cosmos3_fast.engines.releases import Gate
from cosmos3_fast.frames import conditioned_span, latent_frames
from cosmos3_fast.vae.live import accelerated
from cosmos3_fast.vae.live.accelerated import (
    Encoding,
    Mode,
    check_mode,
    is_accelerated,
    uncompiled,
    wanted_frames,
)
from cosmos3_fast.vae.topology import UnsupportedVAEError

__all__ = ["Encoding", "accelerate", "last_encoding", "refresh", "restore"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

# On a pipeline: the mode for a VAE that it gets later.
_MODE = "_cosmos3_fast"
_MARK = "_cosmos3_fast"
_ENCODER_STEPS = {
    "Cosmos3ImageVaeEncoderStep",
    "Cosmos3VideoVaeEncoderStep",
    "Cosmos3ActionVisionVaeEncoderStep",
}
_LATENTS = "x0_tokens_vision"
_BLOCKS = "diffusers.modular_pipelines.cosmos."

# The user of a modular pipeline has asked for the encoder's latents themselves.
_latents_asked: ContextVar[bool] = ContextVar("cosmos3_fast_latents_asked", default=False)
_install_lock = threading.Lock()
_gates: dict[tuple[bool, str], Gate] = {}


def accelerate(target: T, mode: str = "fast") -> T:
    """Accelerate a VAE of the Wan family, or the pipeline that has one.

    Any pipeline of diffusers whose `vae` is `AutoencoderKLWan` or `AutoencoderKLQwenImage`: single
    frames are encoded and decoded as 2-D networks. Cosmos3's, task and modular, encode only the
    frames that the video depends on: none for text, one for an image and the actions "policy" and
    "forward_dynamics", 4·max(condition_frame_indexes_vision) + 1 for a video. Inverse dynamics,
    transfer controls, and modular pipelines in which something else reads the encoder's latents,
    are encoded whole.

    In a release of diffusers that the tests have not run on, a Cosmos3 pipeline has to pass a
    self-test, or is left as it is with a warning.

    Called again it changes the mode. The state is the VAE's: pipelines that share it share the
    acceleration.

    Args:
        target: a VAE or a pipeline. Changed in place.
        mode: see `cosmos3_fast.vae.live.accelerated.accelerate`. In "exact" a Cosmos3 pipeline's
            results equal the unpatched pipeline's, the sign of zeros apart.

    Returns:
        `target` itself.

    Raises:
        TypeError: `target` is neither.
        ValueError: an unknown mode.
        UnsupportedVAEError: (a ValueError) the VAE is none of this family.
    """
    checked = check_mode(mode)
    if checked == "off":
        return restore(target)
    if _is_vae(target):
        return accelerated.accelerate(target, checked)
    names = {base.__name__ for base in type(target).__mro__}
    is_modular = "Cosmos3OmniModularPipeline" in names
    if not hasattr(target, "vae") and not is_modular:
        raise TypeError(f"target must be a VAE or a pipeline with one, got {_name(type(target))}")
    vae = getattr(target, "vae", None)
    is_task = "Cosmos3OmniPipeline" in names
    if vae is None and not (is_task or is_modular):
        raise UnsupportedVAEError(f"{_name(type(target))} has no vae yet")
    if vae is not None:
        accelerated.accelerate(vae, checked)
    if is_modular:
        _install_modular(target)
    elif is_task:
        _install(type(target), "prepare_latents", _announcing_prepare_latents)
    else:
        return target
    cases = _modular_cases if is_modular else _cases
    gate = _gates.setdefault((is_modular, checked), Gate("diffusers"))
    if not gate.opens(lambda: _self_test(target, cases(target), checked)):
        return restore(target)
    vars(target)[_MODE] = checked
    return target


def restore(target: T) -> T:
    """Undo `accelerate`; what is not accelerated is left as it is.

    Returns:
        `target` itself.
    """
    if _is_vae(target):
        return accelerated.restore(target)
    getattr(target, "__dict__", {}).pop(_MODE, None)
    accelerated.restore(getattr(target, "vae", None))
    return target


def refresh(target: T) -> T:
    """See `cosmos3_fast.vae.live.accelerated.refresh`; `target` is a VAE or a pipeline.

    Returns:
        `target` itself.
    """
    accelerated.refresh(target if _is_vae(target) else getattr(target, "vae", None))
    return target


def last_encoding(target: Any) -> Encoding | None:
    """How an accelerated VAE, or that of a pipeline, encoded latest; None before the first time."""
    return accelerated.last_encoding(target if _is_vae(target) else getattr(target, "vae", None))


def _is_vae(target: Any) -> bool:
    return isinstance(uncompiled(target), nn.Module) and hasattr(target, "encode")


def _has_accelerated_vae(pipe: Any) -> bool:
    """Whether there is something to announce to; a VAE that is new in the pipeline is caught up."""
    vae = getattr(pipe, "vae", None)
    if vae is None:
        return False
    mode = vars(pipe).get(_MODE)
    if mode is not None and not is_accelerated(vae):
        try:
            accelerated.accelerate(vae, mode)
        except UnsupportedVAEError as error:
            logger.warning("cosmos3_fast leaves the pipeline's new VAE as it is: %s", error)
            del vars(pipe)[_MODE]
    return is_accelerated(vae)


def _announcing_prepare_latents(original: Any) -> Any:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def prepare_latents(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _has_accelerated_vae(self):
            return original(self, *args, **kwargs)
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        indexes = given.get("condition_frame_indexes_vision")
        if indexes is not None:
            # It may be an iterator, good for one reading.
            given["condition_frame_indexes_vision"] = tuple(indexes)
        with wanted_frames(guarded(_wanted_by_arguments, given)):
            return original(*bound.args, **bound.kwargs)

    return prepare_latents


def _wanted_by_arguments(given: dict[str, Any]) -> int | None:
    """Latent frames that `prepare_latents` uses of what it encodes."""
    if given["latents"] is not None:
        return 0
    if given["action"] is not None:
        return _wanted_by_action(given["action"])
    if given["num_frames"] == 1:
        return 0
    if given["video"] is not None:
        return _wanted_by_indexes(given["condition_frame_indexes_vision"], given["num_frames"])
    return 0 if given["image"] is None else 1


def _wanted_by_action(action: Any) -> int | None:
    return 1 if action.mode in ("policy", "forward_dynamics") else None


def _wanted_by_indexes(indexes: Any, num_frames: int) -> int:
    """The engine leaves out indexes that are out of range."""
    total = latent_frames(num_frames)
    return conditioned_span(index for index in indexes if 0 <= index < total)


def _announcing_step(original: Any) -> Any:
    @functools.wraps(original)
    def call(self: Any, components: Any, state: Any) -> Any:
        if not _has_accelerated_vae(components):
            return original(self, components, state)
        with wanted_frames(guarded(_wanted_by_step, self, components, state)):
            return original(self, components, state)

    return call


def _wanted_by_step(step: Any, components: Any, state: Any) -> int | None:
    """Latent frames that the blocks after an encoder step use of what it encodes."""
    readers = [b for b in _leaves(vars(components).get("_blocks")) if _LATENTS in b.input_names]
    others = [b for b in readers if not type(b).__module__.startswith(_BLOCKS)]
    if _latents_asked.get() or others or not readers:
        return None
    # Noisy latents of the caller leave only the blocks that put clean ones back in each step.
    if state.get("latents") is not None and not any(
        "vision_conditioning_latents" in block.input_names
        for block in _leaves(vars(components)["_blocks"])
    ):
        return 0
    given = step.get_block_state(state)
    if getattr(given, "action", None) is not None:
        return _wanted_by_action(given.action)
    if getattr(given, "video", None) is not None:
        indexes = given.condition_frame_indexes_vision
        if not isinstance(indexes, list | tuple):
            return None
        return _wanted_by_indexes(indexes, given.num_frames)
    return None if getattr(given, "image", None) is None else 1


def _announcing_call(original: Any) -> Any:
    @functools.wraps(original)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _MODE not in vars(self):
            return original(self, *args, **kwargs)
        # As in `ModularPipeline.__call__(state, output)`.
        output = kwargs.get("output", args[1] if len(args) > 1 else None)
        names = {output} if isinstance(output, str) else set(output or ())
        token = _latents_asked.set(bool(names & {_LATENTS, "vision_conditioning_latents"}))
        try:
            return original(self, *args, **kwargs)
        finally:
            _latents_asked.reset(token)

    return call


def _install_modular(pipe: Any) -> None:
    for block in _leaves(vars(pipe).get("_blocks")):
        for base in type(block).__mro__:
            if base.__name__ in _ENCODER_STEPS and base.__module__.startswith(_BLOCKS):
                _install(base, "__call__", _announcing_step)
    _install(type(pipe), "__call__", _announcing_call)


def _install(cls: type[Any], name: str, announcing: Callable[[Any], Any]) -> None:
    """Wrap a method where it is defined, once per process."""
    with _install_lock:
        owner = next((base for base in cls.__mro__ if name in vars(base)), None)
        method = None if owner is None else vars(owner)[name]
        if inspect.isfunction(method) and not hasattr(method, _MARK):
            wrapper = announcing(method)
            setattr(wrapper, _MARK, True)
            setattr(owner, name, wrapper)


_SIZE = {"height": 16, "width": 32, "num_frames": 9}


def _self_test(pipe: Any, cases: list[selftest.Case], mode: Mode) -> str | None:
    """What differs with this package in the diffusers that is installed."""
    from diffusers import AutoencoderKLWan

    config, device = tiny_vae_config(), pipe._execution_device
    vae = getattr(pipe, "vae", None)
    if vae is not None:
        # The pipeline may keep what it has read of its VAE's configuration.
        config = tiny_vae_config(vae.config["z_dim"])
        config.update({name: vae.config[name] for name in ("latents_mean", "latents_std")})
    return selftest.why_not(
        lambda dtype: tiny_diffusers_vae(AutoencoderKLWan, config, device, dtype), cases, mode
    )


def _with_vae(pipe: Any, vae: Any) -> Any:
    """A copy of the pipeline; `setattr` would write into the configuration that both share."""
    shell = copy.copy(pipe)
    vars(shell).pop(_MODE, None)
    vars(shell)["vae"] = vae
    return shell


def _conditions() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    clip = torch.rand(_SIZE["num_frames"], 3, 16, 32, generator=generator, device="cpu")
    return {"image": clip[:1] * 2 - 1, "video": clip}


def _cases(pipe: Any) -> list[selftest.Case]:
    def run(given: dict[str, Any], vae: Any) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            returned = _with_vae(pipe, vae).prepare_latents(
                **given,
                **_SIZE,
                generator=generator,
                device=pipe._execution_device,
                dtype=vae.dtype,
            )
        return {"returned": returned, "generator": generator}

    image, video = _conditions().values()
    requests: list[tuple[str, dict[str, Any], int]] = [
        ("text to video", {}, 0),
        ("image to video", {"image": image}, 1),
        ("video to video", {"video": video}, 5),
    ]
    return [
        selftest.Case(name, functools.partial(run, given), encoded)
        for name, given, encoded in requests
    ]


def _modular_cases(pipe: Any) -> list[selftest.Case]:
    """Of the conditioned latent frames; the others are noise to the blocks that read them."""
    from diffusers.modular_pipelines.modular_pipeline import PipelineState

    def run(step: Any, vae: Any) -> dict[str, Any]:
        state = PipelineState()
        for name, value in {**_conditions(), **_SIZE}.items():
            state.set(name, value)
        state.set("condition_frame_indexes_vision", [0, 1])
        state.set("condition_video_keep", "first")
        step(_with_vae(pipe, vae), state)
        left = dict(state.values)
        left[_LATENTS] = left[_LATENTS][:, :, left["vision_condition_frames"]]
        return left

    encoded = {"Cosmos3ImageVaeEncoderStep": 1, "Cosmos3VideoVaeEncoderStep": 5}
    return [
        selftest.Case(name, functools.partial(run, step), encoded[name])
        for step in _leaves(vars(pipe).get("_blocks"))
        if (name := type(step).__name__) in encoded
    ]


def _leaves(blocks: Any) -> Iterator[Any]:
    """The modular blocks that have no blocks below them."""
    below = getattr(blocks, "sub_blocks", None)
    if below:
        for block in below.values():
            yield from _leaves(block)
    elif blocks is not None:
        yield blocks


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
