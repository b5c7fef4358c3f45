"""The sizes, inputs and networks that the GPU campaign checks and measures."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.device import Context, Skipped
from benchmarks.harness import GateError
from cosmos3_fast.frames import latent_frames
from cosmos3_fast.vae import ClipDecoder, ClipEncoder, FrameDecoder, FrameEncoder
from cosmos3_fast.vae.synthetic import (
    COSMOS3_VAE_CONFIG,
    synthetic_config,
    synthetic_decoder_state_dict,
    synthetic_state_dict,
)
from cosmos3_fast.vae.verify import rms

BF16 = torch.bfloat16
DECODER_BASE_DIM = 256  # that of Cosmos3's VAE


@dataclass(frozen=True)
class Size:
    """A video's pixel size and frames. In a dry run all sizes become one tiny one."""

    height: int
    width: int
    num_frames: int

    @property
    def name(self) -> str:
        return f"{self.height}x{self.width}"

    def on(self, context: Context) -> Size:
        return Size(32, 48, 9) if context.dry_run else self

    def latents(self, context: Context, seed: int) -> tuple[Tensor, Tensor]:
        """A condition latent [1, 48, 1, H/16, W/16] and noise [1, 48, T, H/16, W/16] in bf16."""
        size = self.on(context)
        generator = torch.Generator(context.device).manual_seed(seed)
        frames = latent_frames(size.num_frames)
        cond, noise = (
            torch.randn(
                (1, 48, t, size.height // 16, size.width // 16),
                generator=generator,
                device=context.device,
                dtype=torch.bfloat16,
            )
            for t in (1, frames)
        )
        return cond, noise


SIZES = (Size(480, 832, 81), Size(720, 1280, 189))


def frame(
    context: Context,
    size: Size,
    seed: int,
    frames: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Random pixels [1, 3, H, W], or [1, 3, frames, H, W], in [-1, 1]."""
    size = size.on(context)
    generator = torch.Generator(context.device).manual_seed(seed)
    shape = (1, 3, *(() if frames is None else (frames,)), size.height, size.width)
    return (torch.rand(shape, generator=generator, device=context.device) * 2 - 1).to(dtype)


def config(context: Context) -> dict[str, Any]:
    """Cosmos3's VAE; in a dry run, a tenth of its width."""
    return synthetic_config({**COSMOS3_VAE_CONFIG, **({"base_dim": 16} if context.dry_run else {})})


def cached(context: Context, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors that are made once, and then read by every step that asks for them."""
    path = context.cache / f"{name}.pt"
    if not path.exists():
        context.cache.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        torch.save(make(), temporary)
        os.replace(temporary, path)
    return torch.load(path, weights_only=True, mmap=True)


def weights(context: Context, cfg: dict[str, Any], part: str) -> dict[str, Tensor]:
    """The VAE's encoder or decoder in bfloat16, as a checkpoint has it."""
    make = synthetic_state_dict if part == "encoder" else synthetic_decoder_state_dict
    width = cfg["base_dim" if part == "encoder" else "decoder_base_dim"]
    return cached(
        context,
        f"{part}_{width}",
        lambda: {name: tensor.bfloat16() for name, tensor in make(cfg).items()},
    )


def make_encoder(
    context: Context, device: str | None = None, dtype: torch.dtype = torch.bfloat16
) -> FrameEncoder:
    """The folded encoder; float64 is of the same bfloat16 weights, as is `reference_vae`."""
    cfg = config(context)
    state = weights(context, cfg, "encoder")
    return FrameEncoder.from_state_dict(state, cfg, dtype, device or context.device)


def make_clip_encoder(context: Context, dtype: torch.dtype = torch.bfloat16) -> ClipEncoder:
    cfg = config(context)
    return ClipEncoder.from_state_dict(weights(context, cfg, "encoder"), cfg, dtype, context.device)


def decoder_config(context: Context) -> dict[str, Any]:
    """As `config`, with the decoder of Cosmos3's VAE; a dry run's is as narrow as its encoder."""
    return {**config(context), "decoder_base_dim": 16 if context.dry_run else DECODER_BASE_DIM}


def make_clip_decoder(
    context: Context, dtype: torch.dtype = torch.bfloat16, **options: Any
) -> ClipDecoder:
    """Of the weights of `make_decoder`, folded once: that takes the host longer than a clip.

    Args:
        options: those of `ClipDecoder`.
    """
    cfg = decoder_config(context)

    def make() -> dict[str, Tensor]:
        state = weights(context, cfg, "decoder")
        return ClipDecoder.from_state_dict(state, cfg, dtype, "cpu", **options).state_dict()

    topology = ClipDecoder.topology_type.from_config(cfg)
    network = ClipDecoder(topology, dtype, "meta", **options)
    form = "_".join(str(each) for each in (dtype, *options.values()))
    name = f"clip_decoder_{cfg['decoder_base_dim']}_{form}"
    network.load_state_dict(cached(context, name, make), assign=True)
    return network.requires_grad_(False).to(context.device)


def make_decoder(context: Context, dtype: torch.dtype = torch.bfloat16) -> FrameDecoder:
    """The folded decoder, of the bfloat16 weights of `reference_vae(full_decoder=True)`."""
    cfg = decoder_config(context)
    state = weights(context, cfg, "decoder")
    return FrameDecoder.from_state_dict(state, cfg, dtype, context.device)


def reference_vae(
    context: Context, device: str | None = None, *, full_decoder: bool = False
) -> Any:
    """diffusers' VAE in bf16 with the weights of `make_encoder`.

    Raises:
        Skipped: diffusers cannot be imported.
    """
    try:
        import diffusers
    except ImportError as error:
        raise Skipped(
            f"the reference VAE needs diffusers ({error}): give its wheels with --wheels"
        ) from error
    cfg = decoder_config(context) if full_decoder else {**config(context), "decoder_base_dim": 16}
    with torch.device("meta"):
        vae = diffusers.AutoencoderKLWan.from_config(cfg)
    state = weights(context, cfg, "encoder") | weights(context, cfg, "decoder")
    vae.load_state_dict(state, assign=True)
    return vae.eval().requires_grad_(False).to(device or context.device)


def tolerance(dtype: torch.dtype) -> float:
    """Of an encode in `dtype` against float64: rms, relative to the latents' deviation.

    As in `cosmos3_fast.vae.compatibility`: about sixty stored activations, each rounded.
    """
    return 8 * torch.finfo(dtype).eps + 1e-5


def rms_error(ours: Tensor, exact: Tensor) -> float:
    """Root mean square of the difference over the standard deviation of `exact`."""
    return rms(ours.double() - exact.double()) / exact.double().std().item()


def check_error(name: str, ours: Tensor, exact: Tensor) -> None:
    """Refuse what in bfloat16 is further from `exact` than `tolerance`."""
    if not (error := rms_error(ours, exact)) <= tolerance(BF16):
        raise GateError(f"{name}: rms error must be at most {tolerance(BF16):.2e}, got {error:.2e}")
