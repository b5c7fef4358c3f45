"""What several benchmarks measure: the VAE, the last taps alone, the engine's stage written out."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import ROOT, gate_equal, gate_error
from cosmos3_fast.frames import latent_frames
from cosmos3_fast.images.load import ImageLike, load_pixels
from cosmos3_fast.ops.prepare_latents import prepare_latents_formula
from cosmos3_fast.vae import FrameEncoder
from cosmos3_fast.vae.live.exact import encode_exact
from cosmos3_fast.vae.synthetic import COSMOS3_VAE_CONFIG, synthetic_vae

PHOTOGRAPH = ROOT / "examples" / "falcon9_dscovr.jpg"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SEED = 42
TINY_DIM = 16  # a tenth of the VAE's width: for trying a suite, not for figures

OURS, ONE_FRAME, LAST_TAPS = "ours", "vae.encode of 1 frame", "last taps, plain"
USUAL = (("480x832", 81), ("720x1280", 189))  # what users of Cosmos3 run by default
USUAL_CASES = tuple(f"{size}, {frames} frames" for size, frames in USUAL)


def all_frames(frames: int) -> str:
    """The name of the path through `vae.encode` of a whole clip."""
    return ONE_FRAME if frames == 1 else f"vae.encode of {frames} frames"


def sides(size: str) -> tuple[int, int]:
    """Of a "HEIGHTxWIDTH"."""
    height, width = size.split("x")
    return int(height), int(width)


def seeded_clip(
    channels: int, frames: int, size: str, factor: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Noise [1, C, frames, H/factor, W/factor] for videos of a "HEIGHTxWIDTH"."""
    height, width = (side // factor for side in sides(size))
    generator = torch.Generator().manual_seed(SEED)
    return torch.randn(1, channels, frames, height, width, generator=generator).to(dtype)


def vae_config(base_dim: int | None) -> dict[str, Any]:
    """Cosmos3's VAE, in another width where one is given."""
    widths = {} if base_dim is None else {"base_dim": base_dim, "decoder_base_dim": base_dim}
    return {**COSMOS3_VAE_CONFIG, **widths}


def vae_and_encoder(dtype: str, base_dim: int | None = None) -> tuple[Any, FrameEncoder]:
    """diffusers' VAE with seeded random weights, and the encoder folded from it."""
    vae = torch.nn.Module.to(synthetic_vae(vae_config(base_dim), 0), DTYPES[dtype])
    return vae, FrameEncoder.from_vae(vae)


def last_taps(vae: Any) -> Any:
    """A copy of diffusers' VAE as others make it for single frames; it shares all but the taps.

    Each 3-D convolution is a 2-D one with its last temporal tap; all else is the VAE's own code.
    """
    shared = (*vae.parameters(), *vae.buffers())
    vae = copy.deepcopy(vae, {id(tensor): tensor for tensor in shared})
    for module in vae.modules():
        if isinstance(module, nn.Conv3d):
            weight = module.weight[:, :, -1].contiguous(memory_format=torch.channels_last)

            def forward(
                x: Tensor, cache: Tensor | None = None, w: Tensor = weight, b: Any = module.bias
            ) -> Tensor:
                return F.conv2d(x[:, :, 0], w, b, padding=w.shape[-1] // 2).unsqueeze(2)

            module.forward = forward
    return vae


def channels_last(vae: Any) -> Any:
    """A copy of diffusers' VAE whose kernels have their channels last, in three dimensions or two.

    `.to(memory_format=...)` takes no module that has both.
    """
    vae = copy.deepcopy(vae)
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in vae.parameters():
        if layout := layouts.get(parameter.dim()):
            parameter.data = parameter.data.contiguous(memory_format=layout)
    return vae


def seeded_frame(z_dim: int, size: str, dtype: torch.dtype) -> Tensor:
    """Noise [1, z, 1, h, w] on the VAE's own scale, for a picture of a "HEIGHTxWIDTH"."""
    height, width = (side // 16 for side in sides(size))
    generator = torch.Generator().manual_seed(SEED)
    return torch.randn(1, z_dim, 1, height, width, generator=generator).to(dtype)


@torch.no_grad()
def engine_stage(
    vae: Any,
    image: ImageLike,
    num_frames: int,
    height: int,
    width: int,
    *,
    encoded_frames: int = 1,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Latent preparation as the engines write it: an image to latents and their velocity mask.

    Args:
        vae: whose device the results are on.
        image: see `load_pixels`.
        encoded_frames: how often the image is repeated for `vae.encode`: SGLang and vLLM-Omni
            encode 1 frame, diffusers all of them.
        dtype: of the results.
    """
    pixels = load_pixels(image, height, width)
    clip = pixels[:, :, None].expand(-1, -1, encoded_frames, -1, -1)
    condition = encode_exact(vae, clip)[:, :, :1]
    device = condition.device
    shape = (1, condition.shape[1], latent_frames(num_frames), *condition.shape[3:])
    generator = torch.Generator(device).manual_seed(SEED)
    noise = torch.randn(shape, generator=generator, device=device, dtype=dtype)
    return prepare_latents_formula(condition, noise)


def gate_stage(name: str, ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> float:
    """Latents and mask against the engine's: the error of frame 0; all else must be equal."""
    (latents, mask), (wanted, wanted_mask) = ours, theirs
    error = gate_error(f"{name}: latent frame 0", latents[:, :, :1], wanted[:, :, :1])
    gate_equal(f"{name}: noise frames", latents[:, :, 1:], wanted[:, :, 1:])
    gate_equal(f"{name}: velocity mask", mask, wanted_mask)
    return error
