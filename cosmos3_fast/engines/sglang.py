"""SGLang's Cosmos3 latent preparation, accelerated once this package is installed beside it.

SGLang loads `register` from the entry-point group `sglang.multimodal_gen.plugins` in every
worker. SGLang 0.5.19 and 0.5.20, which have no such group, import
`cosmos3_fast.engines.sglang_package` where SGLANG_EXTERNAL_MODEL_PACKAGE names it. The environment
variable COSMOS3_FAST chooses the mode:

- `exact` (default): the engine's VAE sees only the pixel frames that the conditioned latent
  frames depend on. What the stage writes on the batch equals what it writes unpatched; only the
  sign of a zero may differ.
- `fast`: single frames, here and in the other stages that share the VAE, go through networks
  folded from it instead; clips stay exact, and are decoded by SGLang's own fused kernels.
- `fast,clips`: clips too go through folded networks. Where SGLang writes a video while it is being
  decoded, they hand their frames on as they come, as its own decoder does.
- `fast,graphs`, or `fast,clips,graphs`: on a GPU, calls of one frame are replayed as CUDA graphs.
- `off`: nothing is hooked.

How: the stage's VAE is accelerated (`cosmos3_fast.vae.live`) when the stage is made, and
around its `forward` it is announced how many latent frames the request uses. Everything that
`forward` does is SGLang's.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace
from typing import Any

import torch

from cosmos3_fast.engines import selftest
from cosmos3_fast.engines.common import (
    choice_from_environment,
    guarded,
    load_tiny_weights,
    tiny_vae_config,
)
from cosmos3_fast.engines.releases import Gate
from cosmos3_fast.frames import latent_frames
from cosmos3_fast.vae.live import seam
from cosmos3_fast.vae.live.announce import wanted_at, wanted_frames
from cosmos3_fast.vae.live.engine import Encode, Engine
from cosmos3_fast.vae.live.patch import hooked, wrap
from cosmos3_fast.vae.live.paths import Choice

logger = logging.getLogger(__name__)

_STAGE_MODULE = "sglang.multimodal_gen.runtime.pipelines_core.stages.model_specific_stages.cosmos3"
_STAGE_NAME = "Cosmos3LatentPreparationStage"
_PLUGINS = "sglang.multimodal_gen.runtime.platforms.plugins"
_FRAMES_ARGUMENT = "on_frames"
_UPDATER_MODULE = "sglang.multimodal_gen.runtime.post_training.weights_updater"

_registered = False
# The hooks leave them to the self-test, which accelerates them by itself.
_self_tested: weakref.WeakSet[Any] = weakref.WeakSet()


@dataclass
class _Residency:
    """Where the VAE is in one request.

    Attributes:
        pending: what fetches it to its device; None where it is not to be fetched, or is there.
        fetched: whether it was.
    """

    pending: Callable[[], None] | None = None
    fetched: bool = False


# That of the running request, which the VAE asks for deep inside of what the stage calls; another
# thread or task serves another one.
_residency: ContextVar[_Residency | None] = ContextVar("cosmos3_fast_residency", default=None)


def register() -> None:
    """Hook the stage in the mode that COSMOS3_FAST asks for; SGLang calls this in each process.

    Calling it again does nothing.

    Raises:
        ValueError: COSMOS3_FAST holds something else.
    """
    global _registered  # noqa: PLW0603
    choice = choice_from_environment()
    if choice.mode == "off" or _registered:
        return
    from sglang.multimodal_gen.runtime.platforms.plugins import HookRegistry, HookType

    hooks = _StageHooks(choice)
    for name, hook in hooks.by_name().items():
        HookRegistry.register(f"{_STAGE_MODULE}.{_STAGE_NAME}.{name}", hook, HookType.AROUND)
    _registered = True
    logger.info("cosmos3_fast prepares Cosmos3 latents in %s mode", choice.mode)


def register_without_plugins() -> None:
    """Wrap the stage's methods where SGLang has no plugins to register hooks with.

    Where it has, or where it was done already, nothing is done.

    Raises:
        ValueError: as `register`.
        Exception: what is to be wrapped is not there; then nothing is.
    """
    global _registered  # noqa: PLW0603
    choice = choice_from_environment()
    if choice.mode == "off" or _registered or importlib.util.find_spec(_PLUGINS) is not None:
        return
    stage = getattr(importlib.import_module(_STAGE_MODULE), _STAGE_NAME)
    updater = importlib.import_module(_UPDATER_MODULE)
    hooks = _StageHooks(choice, plugins=False)
    wrapped = [(stage, name, hook) for name, hook in hooks.by_name().items()]
    wrapped.append((updater, "_load_weights_into_module", _load_weights))
    for owner, name, _ in wrapped:
        getattr(owner, name)  # all are there, or nothing is wrapped
    for owner, name, hook in wrapped:
        wrap(owner, name, hooked(hook))
    _registered = True
    logger.info("cosmos3_fast prepares Cosmos3 latents in %s mode", choice.mode)


def _load_weights(original: Callable[..., Any], module: Any, *args: Any, **kwargs: Any) -> Any:
    """The networks of a module whose weights SGLang updates are folded again."""
    try:
        return original(module, *args, **kwargs)
    finally:
        seam.refresh(module)


class _StageHooks:
    """The hooks of one process around methods of the stage; each gets the original first.

    Args:
        plugins: whether SGLang has plugins, and with these a cache of encodings, a count of its
            weight updates and a way to say that a component is not used.
    """

    def __init__(self, choice: Choice, plugins: bool = True) -> None:
        self._choice = choice
        self._plugins = plugins
        self._gate = Gate("sglang")
        # The self-test runs the hooks again.
        self._lock = threading.RLock()
        self._refused: weakref.WeakSet[Any] = weakref.WeakSet()
        self._epochs: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def by_name(self) -> dict[str, Callable[..., Any]]:
        hooks: dict[str, Callable[..., Any]] = {"__init__": self.init, "forward": self.forward}
        if self._choice.mode == "fast" and self._plugins:
            hooks["component_uses"] = self.component_uses
            hooks["use_declared_component"] = self.use_declared_component
        return hooks

    def init(self, original: Callable[..., Any], stage: Any, *args: Any, **kwargs: Any) -> None:
        """The stage's VAE is folded here, not in the first request."""
        original(stage, *args, **kwargs)
        self._adopt(stage)

    def forward(
        self, original: Callable[..., Any], stage: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Announce how many latent frames the request uses."""
        vae = stage.vae
        if not self._adopt(stage):
            return original(stage, batch, *args, **kwargs)
        before = seam.last_encoding(vae)
        residency = _Residency()
        token = _residency.set(residency)
        try:
            with wanted_frames(guarded(_wanted, batch)):
                result = original(stage, batch, *args, **kwargs)
            if self._choice.mode == "fast" and self._plugins and not residency.fetched:
                # Weights that an earlier use left on the device may leave it.
                stage.finish_unused_declared_component(component_name="vae", module=vae)
        finally:
            _residency.reset(token)
        encoding = seam.last_encoding(vae)
        if encoding is not None and encoding is not before:
            stage.log_info(
                f"cosmos3_fast ({encoding.path}) encoded {encoding.pixel_frames} of "
                f"{encoding.of} pixel frames"
            )
        return result

    def component_uses(
        self, original: Callable[..., Any], stage: Any, *args: Any, **kwargs: Any
    ) -> list[Any]:
        """The VAE is fetched where it is used, not at stage entry."""
        uses = original(stage, *args, **kwargs)
        if not self._fetches(stage.vae):
            return uses
        return [replace(use, start_at_stage_entry=False) for use in uses]

    @contextmanager
    def use_declared_component(
        self, original: Callable[..., Any], stage: Any, *args: Any, **kwargs: Any
    ) -> Iterator[Any]:
        """The VAE is fetched when its own code is about to run."""
        vae = kwargs.get("module")
        with ExitStack() as stack:
            if vae is None or not self._fetches(vae):
                yield stack.enter_context(original(stage, *args, **kwargs))
                return
            residency = _residency.get() or _Residency()
            uses: list[bool] = []

            def fetch() -> None:
                if not uses:
                    uses.append(True)
                    stack.enter_context(original(stage, *args, **kwargs))
                    residency.fetched = True

            outer, residency.pending = residency.pending, fetch
            token = _residency.set(residency)
            try:
                yield vae
            finally:
                _residency.reset(token)
                residency.pending = outer

    def _fetches(self, vae: Any) -> bool:
        """Whether the VAE asks for what fetches it, when it needs to be there."""
        engine = seam.engine_of(vae)
        return engine is not None and engine is _engine()

    def _adopt(self, stage: Any) -> bool:
        """Whether the stage's VAE is accelerated; done here where it is not yet."""
        with self._lock:
            return self._adopt_alone(stage)

    def _adopt_alone(self, stage: Any) -> bool:
        vae = stage.vae
        if vae in _self_tested or vae in self._refused:
            return seam.is_accelerated(vae)
        try:
            if not self._gate.opens(lambda: _self_test(stage, self._choice)):
                return False
            if not seam.is_accelerated(vae):
                asked = self._choice
                seam.accelerate(vae, asked.mode, _engine(), clips=asked.clips, graphs=asked.graphs)
            epoch = _weights_epoch() if self._plugins else 0
            if epoch != self._epochs.setdefault(vae, epoch):
                self._epochs[vae] = epoch
                seam.refresh(vae)
        except Exception as error:  # the engine serves without us
            self._refused.add(vae)
            seam.restore(vae)
            logger.warning("cosmos3_fast leaves the VAE to SGLang: %s", error)
            return False
        return True


def _wanted(batch: Any) -> int | None:
    """Latent frames that `forward` uses of what it encodes."""
    # SGLang 0.5.19 encodes transfer controls in the same `forward`, and uses all of them.
    if batch.preprocessed_video is None or "preprocessed_control" in batch.extra:
        return None
    stages = importlib.import_module(_STAGE_MODULE)
    indexes = list(stages.Cosmos3ImagePreprocessStage._resolve_condition_indexes(batch))
    total = latent_frames(max(batch.preprocessed_video.shape[2], batch.num_frames))
    return wanted_at(indexes, total)


def _weights_epoch() -> int:
    """How often SGLang has written new weights, which it does through `.data`, without a trace."""
    from sglang.multimodal_gen.runtime.cache.conditioning import conditioning_weights_epoch

    return conditioning_weights_epoch()


@functools.cache
def _engine() -> Engine:
    """What SGLang does around its VAE: where it has plugins, it caches encodings and moves it."""
    if importlib.util.find_spec(_PLUGINS) is None:
        return Engine(clips=False, frames_argument=_FRAMES_ARGUMENT)
    from sglang.multimodal_gen.runtime.cache.conditioning import cached_vae_encode

    cached = functools.partial(_cached, cached_vae_encode)
    return Engine(
        cached, pending_fetch=_pending_fetch, clips=False, frames_argument=_FRAMES_ARGUMENT
    )


def _pending_fetch() -> Callable[[], None] | None:
    residency = _residency.get()
    return None if residency is None else residency.pending


def _cached(decorate: Callable[[Encode], Encode], name: str, encode: Encode) -> Encode:
    """An encode that uses SGLang's cache of encodings, which tells methods apart by their names."""
    encode.__name__ = name
    return decorate(encode)


def _self_test(stage: Any, choice: Choice) -> str | None:
    """What differs with this package in the stage of the SGLang that is installed."""
    from sglang.multimodal_gen.configs.sample.cosmos3 import Cosmos3SamplingParams
    from sglang.multimodal_gen.runtime.distributed import get_local_torch_device
    from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import Req

    device = get_local_torch_device()
    config = tiny_vae_config()
    generator = torch.Generator().manual_seed(0)
    clip = torch.rand(1, 3, 9, 16, 32, generator=generator, device="cpu") * 2 - 1

    def make_vae(dtype: torch.dtype) -> Any:
        live = stage.vae.config
        names = {field.name for field in fields(live.arch_config)}
        arch = type(live.arch_config)(**{k: v for k, v in config.items() if k in names})
        with torch.device("meta"):
            vae = type(stage.vae)(type(live)(arch_config=arch, use_parallel_encode=False))
        vae = load_tiny_weights(vae, config, device, dtype)
        _self_tested.add(vae)
        return vae

    def run(vae: Any, **request: Any) -> dict[str, Any]:
        pixels = {name: request.pop(name, None) for name in ("image", "video")}
        sampling = {"height": 16, "width": 32, "num_frames": 9, "seed": 7, **request}
        batch = Req(sampling_params=Cosmos3SamplingParams(prompt="", **sampling))
        for name, value in pixels.items():
            setattr(batch, f"preprocessed_{name}", None if value is None else value.clone())
        tiny = type(stage)(vae, SimpleNamespace(latent_channel=config["z_dim"]))
        tiny.log_info = lambda *args: None
        with torch.inference_mode():
            result = tiny.forward(batch, getattr(stage, "server_args", None))
        left = {**vars(batch), "sampling_params": vars(batch.sampling_params)}
        return {**left, "is the batch": result is batch}

    requests: list[tuple[str, dict[str, Any], int]] = [
        ("image to video", {"image": clip[:, :, 0]}, 1),
        ("video to video", {"video": clip}, 5),
        ("video, first frame", {"video": clip, "condition_frame_indexes": [0]}, 1),
        ("short video", {"video": clip[:, :, :3], "condition_frame_indexes": [2]}, 9),
    ]
    cases = [
        selftest.Case(name, functools.partial(run, **request), encoded)
        for name, request, encoded in requests
    ]
    return selftest.why_not(make_vae, cases, choice, _engine())
