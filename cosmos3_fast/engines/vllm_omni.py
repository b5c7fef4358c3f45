"""vLLM-Omni's Cosmos3 pipeline, accelerated once this package is installed beside it.

vLLM-Omni loads `register` from the entry-point group `vllm_omni.general_plugins` in every
process. The environment variable COSMOS3_FAST chooses the mode:

- `exact` (default) and `off`: nothing is changed. Since 0.24 vLLM-Omni encodes only the pixel
  frames that the conditioned latent frames depend on and writes them in place; there is nothing
  that could be left out without changing a bit.
- `fast`: single frames go through networks folded from the VAE; clips stay the engine's.

How: the VAE of the pipeline is accelerated (`cosmos3_fast.vae.accelerated`) after the engine has
loaded its weights. Normalising, cropping and casting stay the engine's. The base class is patched,
so that pipelines derived from it are reached too.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from cosmos3_fast.engines import selftest
from cosmos3_fast.engines.common import mode_from_environment, tiny_diffusers_vae, tiny_vae_config
from cosmos3_fast.engines.releases import Gate
from cosmos3_fast.vae import accelerated

logger = logging.getLogger(__name__)

_MARK = "_cosmos3_fast"
_gate = Gate("vllm-omni")


def register() -> None:
    """Patch the pipeline in the mode that COSMOS3_FAST asks for; vLLM-Omni calls this.

    A pipeline that is not found gives a warning. Calling it again changes nothing.

    Raises:
        ValueError: COSMOS3_FAST holds something else than exact, fast or off.
    """
    mode = mode_from_environment()
    if mode != "fast":
        logger.info("cosmos3_fast: %s mode, vLLM-Omni's own Cosmos3 pipeline serves", mode)
        return
    try:
        from vllm_omni.diffusion.models.cosmos3.pipeline_cosmos3 import (
            Cosmos3OmniDiffusersPipeline,
        )

        original = Cosmos3OmniDiffusersPipeline.load_weights
    except Exception as error:  # a plugin must not keep other models from being served
        logger.warning("cosmos3_fast leaves vLLM-Omni as it is: no Cosmos3 pipeline: %r", error)
        return
    if not hasattr(original, _MARK):
        Cosmos3OmniDiffusersPipeline.load_weights = _adopting(original)
        logger.info("cosmos3_fast: fast mode, Cosmos3's VAE is accelerated where it is loaded")


def _adopting(original: Callable[..., set[str]]) -> Callable[..., set[str]]:
    @functools.wraps(original)
    def load_weights(self: Any, *args: Any, **kwargs: Any) -> set[str]:
        loaded = original(self, *args, **kwargs)
        _adopt(self)
        return loaded

    setattr(load_weights, _MARK, True)
    return load_weights


def _adopt(pipeline: Any) -> None:
    """Accelerate the pipeline's VAE, or, where that is done, fold its new weights."""
    vae = getattr(pipeline, "vae", None)
    try:
        if vae is None or not _gate.opens(lambda: _self_test(pipeline)):
            return
        if accelerated.is_accelerated(vae):
            # Loaders write through `.data`, which leaves no trace.
            accelerated.refresh(vae)
        else:
            accelerated.accelerate(vae, "fast")
    except Exception as error:  # the engine serves without us
        accelerated.restore(vae)
        logger.warning("cosmos3_fast leaves the VAE to vLLM-Omni: %s", error)


def _self_test(pipeline: Any) -> str | None:
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

    cases = [
        selftest.Case("image to video", functools.partial(run, image_to_video), 1),
        selftest.Case("video, first frame", functools.partial(run, video_to_video([0])), 1),
        selftest.Case("video to video", functools.partial(run, video_to_video([0, 1])), 5),
    ]
    return selftest.why_not(make_vae, cases, "fast")
