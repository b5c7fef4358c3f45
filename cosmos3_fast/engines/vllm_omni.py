"""vLLM-Omni's Cosmos3 pipeline, accelerated once this package is installed beside it.

vLLM-Omni loads `register` from the entry-point group `vllm_omni.general_plugins` in every
process. The environment variable COSMOS3_FAST chooses the mode:

- `exact` (default): where image-to-video encodes `num_frames` copies of the image, before 0.24, the
  engine's VAE sees one of them. What is returned equals what it is unpatched; only the sign of a
  zero may differ. Since 0.24 vLLM-Omni encodes only the pixel frames that the conditioned latent
  frames depend on; there is nothing that could be left out, and nothing is changed.
- `fast`: single frames go through networks folded from the VAE; clips stay the engine's, which has
  fused kernels for them.
- `fast,clips`: clips too go through folded networks.
- `fast,graphs`, or `fast,clips,graphs`: on a GPU, calls of one frame are replayed as CUDA graphs.
- `off`: nothing is changed.

How: the VAE of the pipeline is accelerated (`cosmos3_fast.vae.live`) after the engine has
loaded its weights, and before 0.24 it is announced around `_prepare_latents_i2v` that one latent
frame is used. Actions stay whole there: all latents of the clip are returned and read in each step.
Normalising, cropping and casting stay the engine's. The base class is patched, so that pipelines
derived from it are reached too.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from cosmos3_fast.engines import selftest
from cosmos3_fast.engines.common import (
    choice_from_environment,
    tiny_diffusers_vae,
    tiny_vae_config,
)
from cosmos3_fast.engines.releases import Gate, installed
from cosmos3_fast.vae.live import seam
from cosmos3_fast.vae.live.announce import wanted_frames
from cosmos3_fast.vae.live.engine import Engine
from cosmos3_fast.vae.live.patch import hooked, wrap
from cosmos3_fast.vae.live.paths import Choice

logger = logging.getLogger(__name__)

# Where vLLM-Omni fuses operations of its VAE, it binds functions of this package to modules.
_FAST_PATH = "vllm_omni.diffusion.distributed.autoencoders.wan_vae_fastpath"


def _is_fast_path(forward: Any) -> bool:
    return (getattr(forward, "__module__", None) or "").startswith(_FAST_PATH)


ENGINE = Engine(is_equivalent=_is_fast_path, clips=False)
"""What vLLM-Omni does around its VAE."""

_gate = Gate("vllm-omni")


def register() -> None:
    """Patch the pipeline in the mode that COSMOS3_FAST asks for; vLLM-Omni calls this.

    A pipeline that is not found gives a warning. Calling it again changes nothing.

    Raises:
        ValueError: COSMOS3_FAST holds something else.
    """
    choice = choice_from_environment()
    mode = choice.mode
    # Known without importing the pipeline, which not every process does.
    if mode == "off" or (mode == "exact" and _is_since((0, 24))):
        logger.info("cosmos3_fast: %s mode, vLLM-Omni's own Cosmos3 pipeline serves", mode)
        return
    try:
        from vllm_omni.diffusion.models.cosmos3.pipeline_cosmos3 import (
            Cosmos3OmniDiffusersPipeline as Pipeline,
        )

        encodes_all = _encodes_all_frames(Pipeline)
        if encodes_all:
            _patch(Pipeline, "_prepare_latents_i2v", _announcing)
        if encodes_all or mode == "fast":
            _patch(Pipeline, "load_weights", functools.partial(_adopting, choice=choice))
    except Exception as error:  # a plugin must not keep other models from being served
        logger.warning("cosmos3_fast leaves vLLM-Omni as it is: no Cosmos3 pipeline: %r", error)


def _is_since(release: tuple[int, int]) -> bool:
    """Whether the version of the installed vLLM-Omni says that it is `release` or newer."""
    numbers = re.match(r"(\d+)\.(\d+)", installed("vllm-omni") or "")
    return numbers is not None and (int(numbers[1]), int(numbers[2])) >= release


def _encodes_all_frames(cls: type) -> bool:
    """Whether image-to-video encodes `num_frames` copies of the image, of which it uses one."""
    return hasattr(cls, "_encode_conditioning_video")


def _patch(cls: Any, name: str, hook: Callable[..., Any]) -> None:
    if wrap(cls, name, hooked(hook)):
        logger.info("cosmos3_fast patches %s of vLLM-Omni's Cosmos3 pipeline", name)


def _adopting(
    original: Callable[..., set[str]], pipeline: Any, *args: Any, choice: Choice, **kwargs: Any
) -> set[str]:
    loaded = original(pipeline, *args, **kwargs)
    _adopt(pipeline, choice)
    return loaded


def _announcing(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call with one latent frame announced, which only an accelerated VAE hears."""
    with wanted_frames(1):
        return original(*args, **kwargs)


def _adopt(pipeline: Any, choice: Choice) -> None:
    """Accelerate the pipeline's VAE, or, where that is done, fold its new weights."""
    vae = getattr(pipeline, "vae", None)
    try:
        if vae is None or not _gate.opens(lambda: _self_test(pipeline, choice)):
            return
        if seam.is_accelerated(vae):
            # Loaders write through `.data`, which leaves no trace.
            seam.refresh(vae)
        else:
            seam.accelerate(vae, choice.mode, ENGINE, clips=choice.clips, graphs=choice.graphs)
    except Exception as error:  # the engine serves without us
        seam.restore(vae)
        logger.warning("cosmos3_fast leaves the VAE to vLLM-Omni: %s", error)


def _self_test(pipeline: Any, choice: Choice) -> str | None:
    """What differs with this package in the pipeline of the vLLM-Omni that is installed."""
    live, config = pipeline.vae, tiny_vae_config()
    height, width, frames = 16, 32, 9
    noise = torch.Generator().manual_seed(0)
    clip = torch.rand(1, 3, frames, height, width, generator=noise, device="cpu") * 2 - 1

    def make_vae(dtype: torch.dtype) -> Any:
        vae = tiny_diffusers_vae(type(live), config, pipeline.device, dtype)
        if hasattr(live, "distributed_executor"):
            vae.distributed_executor = live.distributed_executor
        return vae

    def run(prepare: Callable[[Any, torch.Generator], Iterable[Any]], vae: Any) -> dict[str, Any]:
        cls: Any = type(pipeline)
        shell = cls.__new__(cls)
        nn.Module.__init__(shell)
        shell.device, shell.dtype, shell.vae = pipeline.device, pipeline.dtype, vae
        shell.vae_scale_factor_temporal = config["scale_factor_temporal"]
        shell.vae_scale_factor_spatial = config["scale_factor_spatial"]
        shell.transformer = SimpleNamespace(latent_channel_size=config["z_dim"])
        generator = torch.Generator(pipeline.device).manual_seed(7)
        with torch.inference_mode():
            left = tuple(prepare(shell, generator))
        return {"returned": left, "generator": generator}

    size = height, width, frames

    def image_to_video(shell: Any, generator: torch.Generator) -> Any:
        return shell._prepare_latents_i2v(clip[:, :, 0].clone(), *size, generator)

    def video_to_video(indexes: list[int]) -> Callable[[Any, torch.Generator], Any]:
        return lambda shell, generator: shell._prepare_latents_v2v(
            clip.clone(), *size, generator, indexes
        )

    def inverse_dynamics(shell: Any, generator: torch.Generator) -> Any:
        return shell._prepare_latents_action_video(
            clip.clone(), "inverse_dynamics", *size, generator
        )

    requests: list[tuple[str, Callable[[Any, torch.Generator], Any], int]]
    requests = [("image to video", image_to_video, 1)]
    if _encodes_all_frames(type(pipeline)):
        requests.append(("inverse dynamics", inverse_dynamics, frames))
    else:
        requests.append(("video, first frame", video_to_video([0]), 1))
        requests.append(("video to video", video_to_video([0, 1]), 5))
    cases = [
        selftest.Case(name, functools.partial(run, prepare), encoded)
        for name, prepare, encoded in requests
    ]
    return selftest.why_not(make_vae, cases, choice, ENGINE)
