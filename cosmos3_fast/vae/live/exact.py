"""The engine's own VAE: its results, and exact mode, which calls it on what matters only."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosmos3_fast.frames import is_whole, latent_frames
from cosmos3_fast.ops.checks import FLOAT_DTYPES
from cosmos3_fast.vae.config import read_config, read_factors
from cosmos3_fast.vae.live.patch import ATTRIBUTE
from cosmos3_fast.vae.live.returns import Unwrapped


def computes_in(vae: Any, part: str = "encoder") -> tuple[torch.device, torch.dtype]:
    """Where and in what dtype the VAE's own code takes its input, however its weights are stored.

    Weights may wait elsewhere (accelerate's and diffusers' offloading) or in another dtype
    (diffusers' layerwise casting) for a hook that brings them to where they compute.

    Args:
        vae: see `encode_exact`.
        part: "encoder" or "decoder".

    Raises:
        ValueError: the weights have no values, and there is no hook that fetches them.
    """
    module = getattr(vae, part)
    weight = module.conv_in.weight
    below = module.modules() if isinstance(module, nn.Module) else ()
    hooks = (getattr(each, "_hf_hook", None) for each in (vae, *below))
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    device = next((each for each in devices if each is not None), None)
    if device is None:  # diffusers' own properties know diffusers' own hooks
        device = getattr(vae, "device", None)
        device = device if isinstance(device, torch.device) else weight.device
    if torch.device(device).type == "meta":
        raise ValueError("vae must have weights with values, got some on the meta device")
    dtype = getattr(vae, "dtype", None)
    return torch.device(device), dtype if dtype in FLOAT_DTYPES else weight.dtype


def posterior_mode(vae: Any, pixels: Tensor) -> Tensor:
    """The posterior's mode (its mean) of `vae.encode(pixels)`, without gradients.

    Args:
        vae: a VAE whose `encode` returns diffusers' `AutoencoderKLOutput` or 1-tuple, or a
            distribution with `mode()` as SGLang's does.
        pixels: [B, 3, T, H, W] on the VAE's device and in its dtype.

    Returns:
        [B, z_dim, 1 + (T-1)/4, H/f, W/f] before normalisation.

    Raises:
        TypeError: `encode` returned something else.
    """
    with torch.no_grad():
        out = vae.encode(pixels)
        posterior = Unwrapped.of(out, "latent_dist").value
        mode = getattr(posterior, "mode", None)
        # torch.Tensor has a method of that name which computes a statistic.
        if not callable(mode) or isinstance(posterior, Tensor):
            raise TypeError(
                f"vae.encode must return a distribution with mode(), got {type(out).__name__}"
            )
        return mode()


def decode_sample(vae: Any, latents: Tensor) -> Tensor:
    """The pixels of `vae.decode(latents)`, without gradients.

    Args:
        vae: a VAE whose `decode` returns diffusers' `DecoderOutput` or 1-tuple, or a tensor as
            SGLang's does.
        latents: [B, z_dim, T, h, w] before normalisation, on the VAE's device and in its dtype.

    Returns:
        [B, 3, 1 + 4(T-1), H, W] in [-1, 1].

    Raises:
        TypeError: `decode` returned something else.
    """
    with torch.no_grad():
        out = vae.decode(latents)
    pixels = Unwrapped.of(out, "sample").value
    if not isinstance(pixels, Tensor):
        raise TypeError(f"vae.decode must return pixels, got {type(pixels).__name__}")
    return pixels


def normalize_latents(latents: Tensor, config: Any) -> Tensor:
    """`(latents - latents_mean) / latents_std` per channel, in `latents`' own dtype.

    The same operations in the same order as SGLang's `Cosmos3LatentPreparationStage._vae_encode`:
    the statistics are rounded to the latents' dtype first.

    Args:
        latents: [B, z_dim, T, H, W].
        config: the VAE's configuration, with `latents_mean` and `latents_std`.
    """
    mean, std = _statistics(latents, config)
    return (latents - mean) / std


def denormalize_latents(latents: Tensor, config: Any) -> Tensor:
    """`latents * latents_std + latents_mean`: what `vae.decode` takes, in `latents`' own dtype."""
    mean, std = _statistics(latents, config)
    return latents * std + mean


def _statistics(latents: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    mean, std = (
        torch.as_tensor(read_config(config, name), dtype=torch.float32, device=latents.device)
        .view(1, -1, 1, 1, 1)
        .to(latents.device, latents.dtype)
        for name in ("latents_mean", "latents_std")
    )
    return mean, std


def encode_exact(vae: Any, pixels: Tensor, clip_latent_frames: int | None = None) -> Tensor:
    """Normalised latents through the VAE itself, as an unpatched engine computes them.

    Args:
        vae: see `posterior_mode`; it has `encoder.conv_in` and `config`.
        pixels: [B, 3, T, H, W] in [-1, 1] with T = 1 + 4k; moved to what `computes_in` says.
        clip_latent_frames: latent frames of the clip that `pixels` is the beginning of; the result
            is then, bit for bit, the beginning of that clip's latents. Default: `pixels` is all.

    Returns:
        [B, z_dim, 1 + k, H/f, W/f] in the dtype that the VAE computes in. The VAE's tiling setting
        is respected.

    Raises:
        ValueError: wrong rank or number of frames.
    """
    if pixels.dim() != 5:
        raise ValueError(f"pixels must have shape [B, 3, T, H, W], got {list(pixels.shape)}")
    factor = read_factors(vae.config)[1]
    if not is_whole(pixels.shape[2], factor):
        raise ValueError(f"pixels must have 1 + {factor}k frames, got {pixels.shape[2]}")
    device, dtype = computes_in(vae)
    own = latent_frames(pixels.shape[2], factor)
    with as_in_clip(vae, pixels, clip_latent_frames or own):
        latents = posterior_mode(vae, pixels.to(device, dtype))
    return normalize_latents(latents, vae.config)


@contextmanager
def as_in_clip(
    vae: Any, pixels: Tensor, clip_latent_frames: int, spatial_factor: int | None = None
) -> Iterator[None]:
    """Inside, `vae.encode(pixels)` has the bits of the encode of a clip that `pixels` begins.

    All of the encoder works chunk by chunk, but `quant_conv` runs once over all latent frames, and
    a matrix product may round differently for another number of columns. So it gets its full
    length, zeros where frames are missing; columns do not depend on each other. A tiled VAE
    convolves frame by frame whatever the length of the clip, which is left as it is. Other threads
    that use the VAE meanwhile are not affected.

    Args:
        vae: has `quant_conv` (a module) and `config`.
        pixels: [B, 3, 1 + 4k, H, W].
        clip_latent_frames: at least 1 + k.
        spatial_factor: pixels per latent cell; default: as the configuration says.
    """
    factor, temporal_factor = read_factors(vae.config)
    frames = latent_frames(pixels.shape[2], temporal_factor)
    missing = clip_latent_frames - frames
    if missing <= 0:
        yield
        return
    factor = spatial_factor or factor
    untiled_shape = (frames, pixels.shape[3] // factor, pixels.shape[4] // factor)
    here = threading.get_ident()

    def pad(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if threading.get_ident() != here or args[0].shape[2:] != untiled_shape:
            return None
        return F.pad(args[0], (0, 0, 0, 0, 0, missing)), *args[1:]

    def trim(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        return None if threading.get_ident() != here else output[:, :, :frames]

    for hook in (pad, trim):
        setattr(hook, ATTRIBUTE, True)
    handles = [
        vae.quant_conv.register_forward_pre_hook(pad),
        vae.quant_conv.register_forward_hook(trim),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def untiled(vae: Any) -> Iterator[None]:
    """`vae.use_tiling = False` inside the block, where the VAE has that switch."""
    before = getattr(vae, "use_tiling", None)
    if before:
        vae.use_tiling = False
    try:
        yield
    finally:
        if before:
            vae.use_tiling = before
