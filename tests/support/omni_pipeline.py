"""Real Cosmos3 pipelines of vLLM-Omni around a small VAE, and what they are asked to prepare."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import omni_stubs  # noqa: F401
import torch
from torch import Tensor, nn
from vllm_omni.diffusion.distributed.autoencoders.autoencoder_kl_wan import (
    DistributedAutoencoderKLWan,
)
from vllm_omni.diffusion.models.cosmos3.pipeline_cosmos3 import Cosmos3OmniDiffusersPipeline

from cosmos3_fast.engines import releases, selftest
from cosmos3_fast.engines import vllm_omni as adapter
from cosmos3_fast.vae.live.patch import hooked
from cosmos3_fast.vae.live.paths import Choice
from cosmos3_fast.vae.synthetic import COSMOS3_VAE_CONFIG, synthetic_config, synthetic_vae

EnginePipeline = Cosmos3OmniDiffusersPipeline
# Before 0.24: `num_frames` copies of an image, and the whole clip of an action.
ENCODES_ALL_FRAMES = hasattr(EnginePipeline, "_encode_conditioning_video")
HEIGHT, WIDTH, FRAMES = 48, 64, 9
VAE_CONFIG = synthetic_config({**COSMOS3_VAE_CONFIG, "base_dim": 16})


def make_vae(
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    config: Mapping[str, Any] = VAE_CONFIG,
    decoder_base_dim: int | None = 4,
) -> DistributedAutoencoderKLWan:
    """The engine's VAE class in Cosmos3's topology, narrow by default, with seeded weights; the
    decoder is as wide as `config` has it where no other width is given."""
    source = synthetic_vae(config, seed, decoder_base_dim)
    with torch.device("meta"):
        vae = DistributedAutoencoderKLWan.from_config(source.config)
    vae.load_state_dict(source.state_dict(), assign=True)
    # What from_pretrained adds where torch.distributed runs; here one rank.
    vae.distributed_executor = SimpleNamespace(parallel_size=1)
    return vae.to(dtype).eval().requires_grad_(False)


def make_pipeline(cls: type, vae: Any, dtype: torch.dtype | None = None) -> Any:
    """A pipeline of `cls` with what latent preparation reads, and no checkpoint behind it."""
    pipeline = cls.__new__(cls)
    nn.Module.__init__(pipeline)
    pipeline.device = torch.device("cpu")
    pipeline.dtype = vae.dtype if dtype is None else dtype
    pipeline.vae = vae
    pipeline.vae_scale_factor_temporal = vae.config.scale_factor_temporal
    pipeline.vae_scale_factor_spatial = vae.config.scale_factor_spatial
    pipeline.transformer = SimpleNamespace(latent_channel_size=vae.config.z_dim)
    return pipeline


def clip(frames: int, seed: int = 0, height: int = HEIGHT, width: int = WIDTH) -> Tensor:
    """Pixels [1, 3, frames, H, W] uniform in [-1, 1], fp32 as the engine's preprocessing gives."""
    generator = torch.Generator().manual_seed(100 + seed)
    return torch.rand(1, 3, frames, height, width, generator=generator) * 2 - 1


Prepared = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """One kind of request.

    Attributes:
        prepare: pipeline, pixels [1, 3, T, H, W], generator → latents, velocity mask, condition.
        pixel_frames: T of the pixels.
        encoded: leading pixel frames that the engine's VAE encodes.
        folded: the fast pipeline encodes them without the VAE.
    """

    prepare: Callable[[Any, Tensor, torch.Generator], Prepared]
    pixel_frames: int
    encoded: int
    folded: bool


def _image_to_video(pipeline: Any, pixels: Tensor, generator: torch.Generator) -> Prepared:
    return pipeline._prepare_latents_i2v(pixels[:, :, 0], HEIGHT, WIDTH, FRAMES, generator)


def _video_to_video(indexes: list[int]) -> Callable[..., Prepared]:
    def prepare(pipeline: Any, pixels: Tensor, generator: torch.Generator) -> Prepared:
        return pipeline._prepare_latents_v2v(pixels, HEIGHT, WIDTH, FRAMES, generator, indexes)

    return prepare


def _action(mode: str, image_size: list[int] | None = None) -> Callable[..., Prepared]:
    def prepare(pipeline: Any, pixels: Tensor, generator: torch.Generator) -> Prepared:
        cropped = () if image_size is None else (image_size,)
        return pipeline._prepare_latents_action_video(
            pixels, mode, HEIGHT, WIDTH, FRAMES, generator, *cropped
        )

    return prepare


def _transfer(pipeline: Any, pixels: Tensor, generator: torch.Generator) -> Prepared:
    return pipeline._prepare_transfer_latents(pixels, pixels.shape[2], generator)


CASES = {
    "image to video": Case(_image_to_video, 1, FRAMES if ENCODES_ALL_FRAMES else 1, folded=True),
    "inverse dynamics": Case(_action("inverse_dynamics"), FRAMES, FRAMES, folded=False),
}
_SINCE_0_24 = {
    "video, latent frame 0": Case(_video_to_video([0]), FRAMES, 1, folded=True),
    "video, latent frames 0 and 1": Case(_video_to_video([0, 1]), FRAMES, 5, folded=False),
    "video, latent frame 1": Case(_video_to_video([1]), FRAMES, 5, folded=False),
    "video, shorter than its prefix": Case(_video_to_video([0, 1]), 3, 5, folded=False),
    "policy": Case(_action("policy"), FRAMES, 1, folded=True),
    "policy, one image": Case(_action("policy"), 1, 1, folded=True),
    "forward dynamics, cropped": Case(
        _action("forward_dynamics", [HEIGHT, WIDTH, 40, 48]), FRAMES, 1, folded=True
    ),
    "transfer, one frame": Case(_transfer, 1, 1, folded=True),
    "transfer, a chunk": Case(_transfer, 5, 5, folded=False),
}
if not ENCODES_ALL_FRAMES:
    CASES |= _SINCE_0_24


def prepared(case: Case, pipeline: Any, pixels: Tensor, seed: int = 7) -> Prepared:
    with torch.no_grad():
        return case.prepare(pipeline, pixels, torch.Generator().manual_seed(seed))


def frames_through(vae: Any) -> AbstractContextManager[list[int]]:
    """The number of pixel frames of each call of the encoder's first convolution, in order."""
    return selftest.frames_through(vae.encoder.conv_in)


@contextmanager
def registered(mode: str) -> Iterator[None]:
    """vLLM-Omni with this package's plugin registered."""
    names = "load_weights", "_prepare_latents_i2v"
    before = {name: getattr(EnginePipeline, name) for name in names}
    os.environ["COSMOS3_FAST"] = mode
    try:
        adapter.register()
        yield
    finally:
        del os.environ["COSMOS3_FAST"]
        for name, method in before.items():
            setattr(EnginePipeline, name, method)
        adapter._gate = releases.Gate("vllm-omni")


class _Announcing(EnginePipeline):
    """As the pipeline is once the plugin is registered."""

    if ENCODES_ALL_FRAMES:
        _prepare_latents_i2v = hooked(adapter._announcing)(EnginePipeline._prepare_latents_i2v)


def make_fast(
    vae: Any, dtype: torch.dtype | None = None, clips: bool = False, graphs: bool = False
) -> Any:
    """A pipeline whose VAE was accelerated where the engine loaded it."""
    pipeline = make_pipeline(_Announcing, vae, dtype)
    adapter._adopt(pipeline, Choice("fast", clips, graphs=graphs))
    return pipeline
