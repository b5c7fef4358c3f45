"""diffusers: encode only the frames that condition the video, in one line and undone in one line.

    accelerate(pipe, mode="fast")
    restore(pipe)

The engine's latent preparation runs as it is, with an encoder that answers with placeholders. What
it returns says which latent frames are conditioned, so the frames to encode are read from the
engine, not worked out again here; they are then encoded and blended with the engine's formula.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from types import MethodType
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from cosmos3_fast.engines.common import FoldedVAE, Mode, check_mode, is_compiled, uncompiled
from cosmos3_fast.frames import latent_frames, pixel_frames
from cosmos3_fast.vae import UnsupportedVAEError
from cosmos3_fast.vae.exact import as_in_clip

__all__ = ["Encoding", "accelerate", "last_encoding", "restore"]

logger = logging.getLogger(__name__)

Pipeline = TypeVar("Pipeline")

_SERIES = "0.42"
_STATE = "_cosmos3_fast"
_MODULAR_STEPS = (
    "Cosmos3ImageVaeEncoderStep",
    "Cosmos3VideoVaeEncoderStep",
    "Cosmos3ActionVisionVaeEncoderStep",
)
# Where `Cosmos3OmniPipeline.prepare_latents` has them in the tuple it returns.
_LATENTS, _CONDITION_MASK, _ACTION_IMAGE_SIZE, _RETURNED = 0, 5, 9, 12

# What `_encode_video` was asked to encode while it answers with placeholders; None: it encodes.
_asked: ContextVar[list[Tensor] | None] = ContextVar("cosmos3_fast_asked", default=None)


@dataclass(frozen=True)
class Encoding:
    """How conditioning was encoded.

    Attributes:
        path: "none" (nothing was conditioned), "fast" (the folded 2-D encoder), "exact" (the
            engine's VAE on a prefix of the clip) or "whole" (the engine's VAE on all of it).
        pixel_frames: frames that were encoded.
        of: frames that the unpatched engine hands to its VAE.
        reason: why the path is not the one that the mode promises; None where it is.
    """

    path: Literal["none", "fast", "exact", "whole"]
    pixel_frames: int
    of: int
    reason: str | None = None


def accelerate(pipe: Pipeline, mode: str = "fast") -> Pipeline:
    """Make a Cosmos3 pipeline encode only the pixel frames that its latents depend on.

    Text conditions encode nothing, images and the actions "policy" and "forward_dynamics" one
    frame, videos 4·max(condition_frame_indexes_vision) + 1 frames. Inverse dynamics and transfer
    controls, which use all frames, are encoded as before.

    Called again it changes the mode. The pipeline keeps its class and can be saved, moved and
    offloaded as before.

    Args:
        pipe: diffusers' `Cosmos3OmniPipeline` or `Cosmos3OmniModularPipeline` (also the distilled
            one). Changed in place.
        mode: "exact": the pipeline's own VAE, results bit-identical to the unpatched pipeline.
            "fast": single frames go through the folded 2-D encoder, which keeps weights of its own
            (107 MB in bfloat16) and follows changes of the VAE's; clips as in "exact". "off": as
            `restore`.

    Returns:
        `pipe` itself.

    Raises:
        TypeError: `pipe` is something else, or a subclass that overrides what is patched.
        RuntimeError: diffusers is not of the 0.42 series, or does not have the structure that
            this adapter relies on.
        ValueError: an unknown mode.
        UnsupportedVAEError: (a ValueError) the VAE has another latent layout or, in fast mode,
            cannot be folded.
    """
    checked = check_mode(mode)
    if checked == "off":
        return restore(pipe)
    modular = _check_pipeline(pipe)
    state = _state(pipe) or _State()
    vae = getattr(pipe, "vae", None)
    if vae is not None:
        _Layout.of(vae)
        if checked == "fast":
            state.folded(vae).encoder(uncompiled(vae).encoder.conv_in.weight.device)
    state.switch(checked)
    if _state(pipe) is None:
        overrides: dict[str, Any] = {"_encode_video": _encode_video}
        attributes = vars(pipe)
        if modular:
            # A copy, because pipelines made from the same blocks share them.
            blocks = attributes["_blocks"] = deepcopy(attributes["_blocks"])
            for block in _leaves(blocks):
                step: Any = type(block)
                if step in _step_classes():
                    block.__class__ = _trimmed(step)
        else:
            overrides["prepare_latents"] = _prepare_latents
        for name, function in overrides.items():
            attributes[name] = MethodType(function, pipe)
        attributes[_STATE] = state
    return pipe


def restore(pipe: Pipeline) -> Pipeline:
    """Undo `accelerate`; a pipeline that is not accelerated is left as it is.

    Returns:
        `pipe` itself.
    """
    attributes = getattr(pipe, "__dict__", {})
    if attributes.pop(_STATE, None) is not None:
        for name in ("_encode_video", "prepare_latents"):
            attributes.pop(name, None)
        for block in _leaves(attributes.get("_blocks")):
            if isinstance(block, _TrimmedStep):
                block.__class__ = type(block).__mro__[2]
    return pipe


def last_encoding(pipe: Any) -> Encoding | None:
    """How an accelerated pipeline encoded its latest conditioning; None before the first."""
    state = _state(pipe)
    return state.last if state else None


class _State:
    """What an accelerated pipeline carries."""

    def __init__(self, mode: Mode = "exact") -> None:
        self.mode = mode
        self.last: Encoding | None = None
        self._folded: tuple[Any, FoldedVAE] | None = None
        self._told: set[str] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the pipeline has its own VAE and folds that.
        return _State, (self.mode,)

    def switch(self, mode: Mode) -> None:
        self.mode = mode
        if mode != "fast":
            self._folded = None

    def folded(self, vae: Any) -> FoldedVAE:
        if self._folded is None or self._folded[0] is not vae:
            self._folded = vae, FoldedVAE(vae)
        return self._folded[1]

    def encode(self, pipe: Any, pixels: Tensor, wanted: int) -> Tensor:
        """Latents whose first `wanted` are those of `pipe._encode_video(pixels)`."""
        layout = _Layout.of(pipe.vae)
        total = layout.shape(pixels)[2]
        if wanted == 1 and self.mode == "fast":
            reason = _normalises_otherwise(pipe)
            if reason is None:
                try:
                    latents = self.folded(pipe.vae)(pixels[:, :, :1])
                except UnsupportedVAEError as error:
                    reason = str(error)
                else:
                    self._report(Encoding("fast", 1, pixels.shape[2]))
                    return latents.to(pixels.dtype)
            self._tell(f"exact instead of fast: {reason}")
        else:
            reason = None

        whole_reason = _cannot_shorten(pipe.vae)
        if wanted < total and whole_reason is None:
            head = pixels[:, :, : pixel_frames(wanted, layout.temporal)]
            with as_in_clip(uncompiled(pipe.vae), head, total):
                latents = type(pipe)._encode_video(pipe, head)
            self._report(Encoding("exact", head.shape[2], pixels.shape[2], reason))
            return latents
        if wanted < total and whole_reason is not None:
            self.fall_back(pixels, whole_reason)
        else:
            self._report(Encoding("whole", pixels.shape[2], pixels.shape[2], reason))
        return type(pipe)._encode_video(pipe, pixels)

    def fall_back(self, pixels: Tensor, reason: str) -> None:
        self._tell(f"all {pixels.shape[2]} frames are encoded: {reason}")
        self._report(Encoding("whole", pixels.shape[2], pixels.shape[2], reason))

    def skip(self, pixels: Tensor) -> None:
        self._report(Encoding("none", 0, pixels.shape[2]))

    def _report(self, encoding: Encoding) -> None:
        self.last = encoding
        logger.info(
            "conditioning: %s, %d of %d frames", encoding.path, encoding.pixel_frames, encoding.of
        )

    def _tell(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            logger.warning("%s", message)


def _state(pipe: Any) -> _State | None:
    return getattr(pipe, "__dict__", {}).get(_STATE)


@dataclass(frozen=True)
class _Layout:
    """Sizes of the latents of an `AutoencoderKLWan`."""

    channels: int
    temporal: int
    spatial: int

    @classmethod
    def of(cls, vae: Any) -> _Layout:
        from diffusers import AutoencoderKLWan

        plain = uncompiled(vae)
        if type(plain) is not AutoencoderKLWan:
            raise UnsupportedVAEError(
                f"the pipeline's vae is {_name(type(plain))}, wanted diffusers' AutoencoderKLWan"
            )
        config = uncompiled(vae).config
        spatial = (config.patch_size or 1) * 2 ** (len(config.dim_mult) - 1)
        temporal = 2 ** sum(map(bool, config.temperal_downsample))
        declared = config.scale_factor_temporal, config.scale_factor_spatial
        # AutoencoderKLWan cuts clips into chunks of 4 whatever the configuration says.
        if declared != (temporal, spatial) or temporal != 4:
            raise UnsupportedVAEError(
                f"the vae's scale factors (temporal, spatial) are {declared} by its configuration "
                f"and {(temporal, spatial)} by its structure, wanted the same, and 4 in time"
            )
        return cls(config.z_dim, temporal, spatial)

    def check(self, pixels: Tensor) -> None:
        if pixels.dim() != 5 or any(size % self.spatial for size in pixels.shape[3:]):
            raise ValueError(
                f"pixels are {list(pixels.shape)}, wanted [B, 3, T, H, W] with H and W multiples "
                f"of {self.spatial}"
            )

    def shape(self, pixels: Tensor) -> tuple[int, ...]:
        batch, _, total, height, width = pixels.shape
        return (
            batch,
            self.channels,
            latent_frames(total, self.temporal),
            height // self.spatial,
            width // self.spatial,
        )


def _encode_video(self: Any, x: Tensor) -> Tensor:
    asked = _asked.get()
    if asked is None:
        return type(self)._encode_video(self, x)
    state = _state(self)
    try:
        layout = _Layout.of(self.vae)
        layout.check(x)
    except ValueError as error:
        if state is not None:
            state.fall_back(x, str(error))
        return type(self)._encode_video(self, x)
    asked.append(x)
    # -0.0 is neutral under addition, 0.0 is not: it turns -0.0 into 0.0.
    return x.new_full(layout.shape(x), -0.0)


def _prepare_latents(self: Any, *args: Any, **kwargs: Any) -> Any:
    original = type(self).prepare_latents
    state = _state(self)
    if state is None:
        return original(self, *args, **kwargs)
    given = inspect.signature(original).bind(self, *args, **kwargs).arguments
    with _placeholders() as asked:
        result = original(self, *args, **kwargs)
    if not asked:
        return result
    (pixels,) = asked
    latents, mask = result[_LATENTS], result[_CONDITION_MASK]
    if len(result) != _RETURNED or mask.shape != (_Layout.of(self.vae).shape(pixels)[2], 1, 1):
        raise RuntimeError(
            "Cosmos3OmniPipeline.prepare_latents returned something else than in diffusers "
            f"{_SERIES}; cosmos3_fast.restore(pipe) makes the pipeline work again"
        )
    conditioned = mask.flatten().nonzero().flatten().tolist()
    if not conditioned or given.get("latents") is not None:
        state.skip(pixels)
        return result
    latent_frames = conditioned[-1] + 1
    encoded = state.encode(self, pixels, latent_frames).contiguous().float()
    if result[_ACTION_IMAGE_SIZE] is not None:
        encoded = self._remove_action_video_padding_from_latent(encoded, result[_ACTION_IMAGE_SIZE])
    encoded = encoded[:, :, :latent_frames].to(latents.device, latents.dtype)
    # The engine's blend: this holds its second term, over which the placeholders were added.
    latents[:, :, :latent_frames] += mask[:latent_frames] * encoded
    return result


class _TrimmedStep:
    """Mixed into a modular encoder step; acts where the pipeline that runs it is accelerated."""

    def __call__(self, components: Any, state: Any) -> Any:
        step: Any = super()
        acceleration = _state(components)
        if acceleration is None:
            return step.__call__(components, state)
        with _placeholders() as asked:
            result = step.__call__(components, state)
        if not asked:
            return result
        (pixels,) = asked
        latents = state.get("x0_tokens_vision")
        frames = state.get("vision_condition_frames")
        conditioned = [frame for frame in frames if 0 <= frame < latents.shape[2]]
        # Noisy latents of the caller leave only the blocks that put clean ones back in each step.
        unread = state.get("latents") is not None and not any(
            "vision_conditioning_latents" in block.input_names
            for block in _leaves(components._blocks)
        )
        if not conditioned or unread:
            acceleration.skip(pixels)
            return result
        latent_frames = max(conditioned) + 1
        encoded = acceleration.encode(components, pixels, latent_frames).float()
        # Actions are padded to a canvas at the right and below; the step has cut that off.
        height, width = latents.shape[3:]
        latents[:, :, :latent_frames] = encoded[:, :, :latent_frames, :height, :width]
        return result


@contextmanager
def _placeholders() -> Iterator[list[Tensor]]:
    asked: list[Tensor] = []
    token = _asked.set(asked)
    try:
        yield asked
    finally:
        _asked.reset(token)


def _cannot_shorten(vae: Any) -> str | None:
    """Why a prefix might not give the same bits, or None."""
    plain = uncompiled(vae)
    for name in ("encode", "_encode", "tiled_encode"):
        if name in vars(plain):
            return f"vae.{name} was replaced"
    if is_compiled(plain.encoder) or is_compiled(plain.quant_conv):
        return "the vae's encoder is compiled, and other lengths may compile to other roundings"
    return None


def _normalises_otherwise(pipe: Any) -> str | None:
    """Why latents normalised by the VAE's configuration are not the pipeline's, or None."""
    config = uncompiled(pipe.vae).config
    mean, inv_std = pipe._vae_latents_mean, pipe._vae_latents_inv_std
    wanted_mean = torch.tensor(config.latents_mean)
    wanted_inv_std = 1.0 / torch.tensor(config.latents_std)
    # The pipeline rounds both to its VAE's dtype, 1/std after rounding std.
    eps = 2 * torch.finfo(mean.dtype).eps
    for name, ours, theirs in (
        ("mean", wanted_mean, mean),
        ("1/std", wanted_inv_std, inv_std),
    ):
        same = ours.shape == theirs.shape and torch.allclose(
            ours, theirs.float().cpu(), rtol=eps, atol=0.0
        )
        if not same:
            return f"the pipeline's latent {name} is not that of its vae's configuration"
    return None


def _check_pipeline(pipe: Any) -> bool:
    """Whether the pipeline is a modular one; refuse what is none of Cosmos3's."""
    try:
        import diffusers
    except ImportError as error:
        raise TypeError(
            f"pipe is {_name(type(pipe))}, wanted a Cosmos3 pipeline of diffusers, "
            f"which cannot be imported ({error})"
        ) from error
    wanted = "diffusers' Cosmos3OmniPipeline or Cosmos3OmniModularPipeline"
    names = {base.__name__ for base in type(pipe).__mro__ if _top_package(base) == "diffusers"}
    if not names & {"Cosmos3OmniPipeline", "Cosmos3OmniModularPipeline"}:
        raise TypeError(f"pipe is {_name(type(pipe))}, wanted {wanted}")
    if ".".join(diffusers.__version__.split(".")[:2]) != _SERIES:
        raise RuntimeError(
            f"diffusers {diffusers.__version__} is installed, but this version of cosmos3_fast "
            f"knows diffusers {_SERIES}.x only; the pipeline was left as it is"
        )
    modular = "Cosmos3OmniModularPipeline" in names
    base = getattr(diffusers, "Cosmos3OmniModularPipeline" if modular else "Cosmos3OmniPipeline")
    for name in ("_encode_video",) if modular else ("_encode_video", "prepare_latents"):
        if getattr(type(pipe), name, None) is not getattr(base, name, None):
            raise TypeError(f"{_name(type(pipe))} overrides {name}, wanted {wanted} as they are")
        if name in vars(pipe) and _state(pipe) is None:
            raise TypeError(f"pipe.{name} was replaced on this object by something else")
    missing = _missing_structure(pipe, base, modular)
    if missing:
        raise RuntimeError(
            f"diffusers {diffusers.__version__}: {missing}; the pipeline was left as it is"
        )
    return modular


def _missing_structure(pipe: Any, base: type, modular: bool) -> str | None:
    """What this adapter relies on and does not find, or None."""
    encode = getattr(base, "_encode_video", None)
    if encode is None or list(inspect.signature(encode).parameters) != ["self", "x"]:
        return f"{base.__name__}._encode_video(self, x) was expected"
    if not modular:
        prepare: Any = getattr(base, "prepare_latents", None)
        if prepare is None or "latents" not in inspect.signature(prepare).parameters:
            return f"{base.__name__}.prepare_latents(..., latents, ...) was expected"
        if "_encode_video" not in prepare.__code__.co_names:
            return f"{base.__name__}.prepare_latents does not call _encode_video"
        return None
    for step in _step_classes():
        call = inspect.unwrap(step.__call__)
        if "_encode_video" not in call.__code__.co_names:
            return f"{step.__name__} does not call _encode_video"
    accelerated = _state(pipe) is not None
    steps = (*_step_classes(), _TrimmedStep) if accelerated else _step_classes()
    if not any(isinstance(block, steps) for block in _leaves(vars(pipe).get("_blocks"))):
        return f"the pipeline has none of the blocks {', '.join(_MODULAR_STEPS)}"
    return None


@cache
def _step_classes() -> tuple[type, ...]:
    from diffusers.modular_pipelines.cosmos import encoders

    return tuple(getattr(encoders, name) for name in _MODULAR_STEPS)


@cache
def _trimmed(step: Any) -> Any:
    """The same step, by the same name, that leaves frames out."""
    return type(step.__name__, (_TrimmedStep, step), {"__module__": step.__module__})


def _leaves(blocks: Any) -> Iterator[Any]:
    """The modular blocks that have no blocks below them."""
    below = getattr(blocks, "sub_blocks", None)
    if below:
        for block in below.values():
            yield from _leaves(block)
    elif blocks is not None:
        yield blocks


def _top_package(cls: type) -> str:
    return cls.__module__.partition(".")[0]


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
