"""SGLang's Cosmos3 latent preparation, accelerated once this package is installed beside it.

SGLang loads `register` from the entry-point group `sglang.multimodal_gen.plugins` in every
worker. The environment variable COSMOS3_FAST chooses the mode:

- `exact` (default): the engine's VAE sees only the pixel frames that the conditioned latent
  frames depend on. What the stage writes on the batch equals what it writes unpatched; only the
  sign of a zero may differ.
- `fast`: single frames go through the folded 2-D encoder instead; clips stay exact.
- `off`: nothing is hooked.

How: the stage's own `forward` runs, on a view of the batch that looks unconditioned. It draws the
noise and stores it as the batch's latents; that store encodes the conditioning and writes the
conditioned latents instead. Everything else that `forward` does, before and after, is SGLang's.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosmos3_fast.engines.common import Mode, mode_from_environment
from cosmos3_fast.frames import TEMPORAL_FACTOR, frames_wanted, latent_frames, pixel_frames
from cosmos3_fast.ops import prepare_latents, prepare_latents_
from cosmos3_fast.vae import FrameEncoder, UnsupportedVAEError
from cosmos3_fast.vae.exact import as_in_clip

logger = logging.getLogger(__name__)

_STAGE_MODULE = "sglang.multimodal_gen.runtime.pipelines_core.stages.model_specific_stages.cosmos3"
_STAGE = f"{_STAGE_MODULE}.Cosmos3LatentPreparationStage"

# The releases this module was written against and tested with: SHA-256 of each file that holds
# something it relies on. The stage; the causality of the VAE's encode; its conditioning cache.
_KNOWN_RELEASES = {
    "0.5.23": {
        "multimodal_gen/runtime/pipelines_core/stages/model_specific_stages/cosmos3.py": (
            "d2c9befee7be361bb6b0ec9f18bcae7bf8d2f39f3a71638692f8de324f8ffc82"
        ),
        "multimodal_gen/runtime/models/vaes/wanvae.py": (
            "b0e191c639d97fb6ecee5b332c9d97420b3b021e5f4200c1a6b2c82560d65981"
        ),
        "multimodal_gen/runtime/cache/conditioning.py": (
            "6912a7ed0df6413bad7200062f98be46dc82180a0226294debe0dee73181ec75"
        ),
    }
}

_registered = False


def register() -> None:
    """Hook the stage in the mode that COSMOS3_FAST asks for; SGLang calls this in each process.

    Does nothing but log a warning where the installed SGLang is not a known release, byte for
    byte in the files that matter. Calling it again does nothing.

    Raises:
        ValueError: COSMOS3_FAST holds something else than exact, fast or off.
    """
    global _registered  # noqa: PLW0603
    mode = mode_from_environment()
    if mode == "off" or _registered:
        return
    difference = _difference_from_known()
    if difference is not None:
        logger.warning(
            "cosmos3_fast leaves SGLang's Cosmos3 stage as it is: %s; known: sglang %s",
            difference,
            ", ".join(_KNOWN_RELEASES),
        )
        return
    from sglang.multimodal_gen.runtime.platforms.plugins import HookRegistry, HookType

    hooks = _StageHooks(mode)
    HookRegistry.register(f"{_STAGE}.forward", hooks.forward, HookType.AROUND)
    if mode == "fast":
        HookRegistry.register(f"{_STAGE}.component_uses", hooks.component_uses, HookType.AROUND)
    _registered = True
    logger.info("cosmos3_fast prepares Cosmos3 latents in %s mode", mode)


def _difference_from_known() -> str | None:
    """What about the installed SGLang is not as in a known release; None if nothing is."""
    try:
        version = importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return "found sglang without its package metadata"
    files = _KNOWN_RELEASES.get(version)
    if files is None:
        return f"found sglang {version}"
    roots = _source_roots()
    for name, digest in files.items():
        paths = [path for path in (Path(root, name) for root in roots) if path.is_file()]
        if not paths:
            return f"found sglang {version} without the source file {name}"
        if hashlib.sha256(paths[0].read_bytes()).hexdigest() != digest:
            return f"found sglang {version} with a modified {name}"
    return None


def _source_roots() -> list[str]:
    spec = importlib.util.find_spec("sglang")
    return [] if spec is None else list(spec.submodule_search_locations or ())


@dataclass(frozen=True)
class _Conditioning:
    """What one request conditions on.

    Attributes:
        frames: conditioned latent frames, sorted.
        pixel_frames: what reaches the VAE.
        whole_frames: what would reach it unpatched.
        video: whether the pixels are a clip.
    """

    frames: list[int]
    pixel_frames: int
    whole_frames: int
    video: bool


class _StageHooks:
    """The hooks of one process, and the folded encoder of each stage."""

    def __init__(self, mode: Mode) -> None:
        self._mode = mode
        self._lock = threading.RLock()
        self._warned: set[str] = set()
        self._folded: weakref.WeakKeyDictionary[Any, _Folded] = weakref.WeakKeyDictionary()

    def forward(
        self, original: Callable[..., Any], stage: Any, batch: Any, server_args: Any
    ) -> Any:
        """Around `Cosmos3LatentPreparationStage.forward`."""
        if not _has_conditioning(batch):
            result = original(stage, batch, server_args)
            self._release(stage)
            return result
        conditioning = self._conditioning(stage, batch)
        if conditioning is None:
            return original(stage, batch, server_args)
        prepare = functools.partial(self._prepare, stage, batch, conditioning)
        original(stage, _view(batch, prepare), server_args)
        return batch

    def component_uses(
        self, original: Callable[..., Any], stage: Any, *args: Any, **kwargs: Any
    ) -> list[Any]:
        """Around `component_uses`: the VAE is fetched where it is used, not at stage entry."""
        uses = original(stage, *args, **kwargs)
        return [replace(use, start_at_stage_entry=False) for use in uses]

    def _conditioning(self, stage: Any, batch: Any) -> _Conditioning | None:
        """How to encode less than the whole; None where the stage is to be left as it is."""
        from sglang.multimodal_gen.runtime.pipelines_core.stages.model_specific_stages.cosmos3 import (  # noqa: E501
            Cosmos3ImagePreprocessStage,
        )

        factor = getattr(stage.vae.config, "scale_factor_temporal", TEMPORAL_FACTOR)
        if factor != TEMPORAL_FACTOR:
            return None
        if batch.preprocessed_video is None:
            return _Conditioning([0], 1, 1, video=False)
        frames = Cosmos3ImagePreprocessStage._resolve_condition_indexes(batch)
        whole = max(batch.preprocessed_video.shape[2], batch.num_frames)
        needed = pixel_frames(frames_wanted(frames))
        # Counted from the end, or out of range: the engine's to resolve or to refuse.
        if min(frames) < 0 or needed > batch.num_frames:
            return None
        if latent_frames(needed) == latent_frames(whole):
            return None
        obstacle = _obstacle_to_prefix(stage.vae)
        if obstacle is not None:
            self._warn_once(f"clips are encoded whole: {obstacle}")
            return None
        return _Conditioning(frames, needed, whole, video=True)

    def _prepare(
        self, stage: Any, batch: Any, conditioning: _Conditioning, noise: Tensor
    ) -> Tensor:
        """Encode the conditioning and blend it into `noise`; writes on `batch` what goes along."""
        frames = conditioning.frames
        pixels = _take_pixels(batch, conditioning.pixel_frames, noise.device, stage.vae)
        encoded, how = self._encode(stage, pixels, conditioning)
        batch.preprocessed_video = None
        batch.preprocessed_image = None
        encoded = encoded.to(noise.dtype)
        condition_latents = torch.zeros_like(noise)
        prepare_latents_(encoded, condition_latents, frames)
        latents, velocity_mask = prepare_latents(encoded, noise, frames)
        batch.extra["condition_latents"] = condition_latents
        batch.extra["velocity_mask"] = velocity_mask.repeat(noise.shape[0], 1, 1, 1, 1)
        kind = "V2V" if conditioning.video else "I2V"
        stage.log_info(f"Prepared {kind} latents with conditioning at frames {frames}")
        stage.log_info(
            f"cosmos3_fast ({how}) encoded {conditioning.pixel_frames} of "
            f"{conditioning.whole_frames} pixel frames"
        )
        return latents

    def _encode(
        self, stage: Any, pixels: Tensor, conditioning: _Conditioning
    ) -> tuple[Tensor, Mode]:
        """Normalised latents of `pixels` in the VAE's dtype, and the mode that made them."""
        with self._lock, torch.no_grad():
            if self._mode == "fast" and conditioning.pixel_frames == 1:
                encoder = self._encoder(stage, pixels.device)
                if encoder is not None:
                    latents = _encode_folded()(encoder, pixels)
                    self._release(stage)
                    return latents, "fast"
            with (
                stage.use_declared_component(component_name="vae", module=stage.vae),
                _as_in_clip(stage.vae, pixels, conditioning),
            ):
                return stage._vae_encode(pixels), "exact"

    def _encoder(self, stage: Any, device: torch.device) -> FrameEncoder | None:
        """The folded encoder, up to date; None where the engine's own is to be used."""
        obstacle = _obstacle_to_folding(stage.vae)
        if obstacle is not None:
            self._warn_once(f"images are encoded in exact mode: {obstacle}")
            return None
        folded = self._folded.get(stage)
        if folded is None or not folded.current(stage.vae):
            folded = _Folded(stage.vae, device)
            self._folded[stage] = folded
            if folded.error is not None:
                self._warn_once(f"images are encoded in exact mode: {folded.error}")
        return folded.encoder

    def _release(self, stage: Any) -> None:
        """After a request that did not use the VAE: free the device of it, if it is there.

        In exact mode the VAE's use begins at stage entry and its end does so.
        """
        if self._mode == "fast":
            stage.finish_unused_declared_component(component_name="vae", module=stage.vae)

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning("cosmos3_fast: %s", message)


class _Folded:
    """The 2-D encoder of a VAE at one time.

    The engine counts its weight updates; its own conditioning cache relies on that count. The
    parameters' values are not compared: they may be offloaded, and reading them would wait for
    the device in every request.
    """

    def __init__(self, vae: Any, device: torch.device) -> None:
        self._seen = self._state(vae)
        self.encoder: FrameEncoder | None = None
        self.error: str | None = None
        if device.type != "cpu":
            # An offload's copy to the host may still be under way.
            torch.get_device_module(device).synchronize(device)
        try:
            self.encoder = FrameEncoder.from_vae(vae, device=device).eval()
            self.encoder.checks_values = False  # the engine's own encode takes any
        except UnsupportedVAEError as error:
            self.error = str(error)

    def current(self, vae: Any) -> bool:
        """Whether `vae` is the one that was folded, with the weights that were."""
        return self._state(vae) == self._seen

    @staticmethod
    def _state(vae: Any) -> tuple[Any, ...]:
        from sglang.multimodal_gen.runtime.cache.conditioning import conditioning_weights_epoch

        return (
            conditioning_weights_epoch(),
            weakref.ref(vae),
            [
                (id(parameter), parameter.dtype)
                for part in (vae.encoder, vae.quant_conv)
                for parameter in part.parameters()
            ],
        )


@functools.cache
def _encode_folded() -> Callable[[FrameEncoder, Tensor], Tensor]:
    """The folded encoder behind SGLang's conditioning cache, as `vae.encode` is."""
    from sglang.multimodal_gen.runtime.cache.conditioning import cached_vae_encode

    @cached_vae_encode
    def encode(encoder: FrameEncoder, pixels: Tensor) -> Tensor:
        return encoder(pixels)

    return encode


@functools.cache
def _view_class(batch_class: Any) -> Any:
    class View(batch_class):
        """A batch without conditioning, whose latents are prepared where they are stored."""

        __slots__ = ("prepare",)

        @property
        def data_type(self) -> None:
            return None

        @property
        def latents(self) -> Any:
            return self.__dict__["latents"]

        @latents.setter
        def latents(self, noise: Tensor) -> None:
            self.__dict__["latents"] = self.prepare(noise)

    return View


def _view(batch: Any, prepare: Callable[[Tensor], Tensor]) -> Any:
    """`batch` itself, in that it shares all attributes, but see `_view_class`."""
    batch_class: Any = type(batch)
    view = object.__new__(_view_class(batch_class))
    # The batch's own __setattr__ looks for names in its sampling parameters first.
    object.__setattr__(view, "__dict__", vars(batch))
    object.__setattr__(view, "prepare", prepare)
    return view


def _has_conditioning(batch: Any) -> bool:
    """Whether the stage, unpatched, would encode something."""
    from sglang.multimodal_gen.configs.sample.sampling_params import DataType

    if batch.extra.get("transfer_plan") is not None:
        return False
    if batch.data_type not in (DataType.VIDEO, DataType.ACTION):
        return False
    return batch.preprocessed_video is not None or batch.preprocessed_image is not None


def _take_pixels(batch: Any, frames: int, device: torch.device, vae: Any) -> Tensor:
    """The first `frames` pixel frames, [B, 3, frames, H, W], on `device` in the VAE's dtype."""
    dtype = next(vae.parameters()).dtype
    if batch.preprocessed_video is None:
        return batch.preprocessed_image.unsqueeze(2).to(device=device, dtype=dtype)
    pixels = batch.preprocessed_video[:, :, :frames].to(device=device, dtype=dtype)
    batch.preprocessed_video = None
    missing = frames - pixels.shape[2]
    if missing > 0:
        return torch.cat([pixels, pixels[:, :, -1:].expand(-1, -1, missing, -1, -1)], dim=2)
    return pixels.contiguous()


def _obstacle_to_prefix(vae: Any) -> str | None:
    """Why the latents of a clip's beginning may not be the beginning of the clip's latents."""
    from sglang.multimodal_gen.runtime.models.vaes.wanvae import AutoencoderKLWan

    if type(vae) is not AutoencoderKLWan:
        return f"the VAE is a {type(vae).__name__}, not an AutoencoderKLWan"
    if "encode" in vars(vae):
        return "the VAE's encode is replaced"
    if not vae.use_feature_cache:
        return "the VAE's feature cache is off"
    if _is_parallel(vae):
        return "the VAE encodes in parallel over ranks"
    return None


def _obstacle_to_folding(vae: Any) -> str | None:
    """Why the VAE's own encode is to be preferred, or the weights cannot be read."""
    from sglang.multimodal_gen.runtime.managers.memory_managers.layerwise_offload import (
        is_layerwise_offloaded_module,
    )

    if _is_parallel(vae):
        return "the VAE encodes in parallel over ranks"
    if is_layerwise_offloaded_module(vae):
        return "the VAE is offloaded layer by layer"
    return None


def _is_parallel(vae: Any) -> bool:
    encoder = getattr(vae, "encoder", None)
    parallel = getattr(encoder, "use_parallel_encode", False)
    return bool(parallel) and getattr(encoder, "world_size", 1) > 1


@contextmanager
def _as_in_clip(vae: Any, pixels: Tensor, conditioning: _Conditioning) -> Iterator[None]:
    """Inside, `vae.encode` of a clip's beginning has the bits of the whole clip's encode."""
    whole = latent_frames(conditioning.whole_frames)
    if latent_frames(conditioning.pixel_frames) == whole:
        yield
        return
    # The conditioning cache's key holds the VAE's integer attributes named use_*: posteriors
    # that may differ in rounding are not taken for one another.
    vae.use_latent_frames_of_clip = whole
    try:
        with as_in_clip(vae, pixels, whole):
            yield
    finally:
        del vae.use_latent_frames_of_clip
