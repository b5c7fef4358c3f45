"""diffusers' Cosmos3 pipelines: how many latent frames they use is announced to their VAE.

All computing is the VAE's (`cosmos3_fast.vae.live`), and `cosmos3_fast.acceleration` is what users
call. What is added here is how many latent frames a Cosmos3 pipeline will use, read from the
arguments of the method or block that encodes. The engine encodes at its own time and draws its
noise in its own order.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
from collections.abc import Iterator
from typing import Any

import torch

from cosmos3_fast.engines import selftest
from cosmos3_fast.engines.common import guarded, tiny_diffusers_vae, tiny_vae_config
from cosmos3_fast.engines.releases import Gate
from cosmos3_fast.frames import latent_frames
from cosmos3_fast.vae.live import seam
from cosmos3_fast.vae.live.announce import all_frames, wanted_at, wanted_frames
from cosmos3_fast.vae.live.patch import ATTRIBUTE, wrap_where_defined
from cosmos3_fast.vae.live.paths import Choice
from cosmos3_fast.vae.topology import UnsupportedVAEError

logger = logging.getLogger(__name__)

_ENCODER_STEPS = {
    "Cosmos3ImageVaeEncoderStep",
    "Cosmos3VideoVaeEncoderStep",
    "Cosmos3ActionVisionVaeEncoderStep",
}
_LATENTS = "x0_tokens_vision"
_BLOCKS = "diffusers.modular_pipelines.cosmos."

_gates: dict[tuple[bool, Choice], Gate] = {}


def announce(pipe: Any, choice: Choice) -> bool:
    """Have a Cosmos3 pipeline, task or modular, announce to its VAE what it uses.

    The VAE that it has is accelerated already; one that it gets later will be, as is chosen.

    Returns:
        False where the pipeline is to be left as it is: in a release of diffusers that the tests
        have not run on, it has failed the self-test.
    """
    is_modular = any(b.__name__ == "Cosmos3OmniModularPipeline" for b in type(pipe).__mro__)
    if is_modular:
        _install_modular(pipe)
    else:
        wrap_where_defined(type(pipe), "prepare_latents", _announcing_prepare_latents)
    cases = _modular_cases if is_modular else _cases
    gate = _gates.setdefault((is_modular, choice), Gate("diffusers"))
    if not gate.opens(lambda: _self_test(pipe, cases(pipe), choice)):
        return False
    # For a VAE that it gets later.
    vars(pipe)[ATTRIBUTE] = choice
    return True


def _has_accelerated_vae(pipe: Any) -> bool:
    """Whether there is something to announce to; a VAE that is new in the pipeline is caught up."""
    vae = getattr(pipe, "vae", None)
    if vae is None:
        return False
    choice = vars(pipe).get(ATTRIBUTE)
    if choice is not None and not seam.is_accelerated(vae):
        try:
            seam.accelerate(
                vae,
                choice.mode,
                clips=choice.clips,
                products=choice.products,
                frozen=choice.frozen,
                graphs=choice.graphs,
            )
        except UnsupportedVAEError as error:
            logger.warning("cosmos3_fast leaves the pipeline's new VAE as it is: %s", error)
            del vars(pipe)[ATTRIBUTE]
    return seam.is_accelerated(vae)


def _announcing_prepare_latents(original: Any) -> Any:
    signature = inspect.signature(original)

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


def _wanted_by_indexes(indexes: Any, num_frames: int) -> int | None:
    """The engine leaves out indexes that are out of range."""
    total = latent_frames(num_frames)
    return wanted_at((index for index in indexes if 0 <= index < total), total)


def _announcing_step(original: Any) -> Any:
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
    if others or not readers:
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
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if ATTRIBUTE not in vars(self):
            return original(self, *args, **kwargs)
        # As in `ModularPipeline.__call__(state, output)`.
        output = kwargs.get("output", args[1] if len(args) > 1 else None)
        names = {output} if isinstance(output, str) else set(output or ())
        if not names & {_LATENTS, "vision_conditioning_latents"}:
            return original(self, *args, **kwargs)
        with all_frames():
            return original(self, *args, **kwargs)

    return call


def _install_modular(pipe: Any) -> None:
    for block in _leaves(vars(pipe).get("_blocks")):
        for base in type(block).__mro__:
            if base.__name__ in _ENCODER_STEPS and base.__module__.startswith(_BLOCKS):
                wrap_where_defined(base, "__call__", _announcing_step)
    wrap_where_defined(type(pipe), "__call__", _announcing_call)


_SIZE = {"height": 16, "width": 32, "num_frames": 9}


def _self_test(pipe: Any, cases: list[selftest.Case], choice: Choice) -> str | None:
    """What differs with this package in the diffusers that is installed."""
    from diffusers import AutoencoderKLWan

    config, device = tiny_vae_config(), pipe._execution_device
    vae = getattr(pipe, "vae", None)
    if vae is not None:
        # The pipeline may keep what it has read of its VAE's configuration.
        config = tiny_vae_config(vae.config["z_dim"])
        config.update({name: vae.config[name] for name in ("latents_mean", "latents_std")})
    return selftest.why_not(
        lambda dtype: tiny_diffusers_vae(AutoencoderKLWan, config, device, dtype), cases, choice
    )


def _with_vae(pipe: Any, vae: Any) -> Any:
    """A copy of the pipeline; `setattr` would write into the configuration that both share."""
    shell = copy.copy(pipe)
    vars(shell).pop(ATTRIBUTE, None)
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
    """Requests whose conditioned latent frames are compared; to the blocks that read them the
    others are noise."""
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
