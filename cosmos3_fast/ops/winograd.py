"""The eager formulas: the specification that every kernel is tested against.

`prepare_latents_formula` is what the engines write today (SGLang's
`Cosmos3LatentPreparationStage`, diffusers' `Cosmos3OmniPipeline.prepare_latents`). The other
functions are the ops' own contract in plain torch, and serve as the `eager` backend.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def prepare_latents_formula(
    cond_latent: Tensor, noise: Tensor, condition_frames: Sequence[int] = (0,)
) -> tuple[Tensor, Tensor]:
    """The engines' expression. A NaN leaks from the operand that is multiplied by zero."""
    cond_latent = cond_latent.to(noise.dtype)
    num_frames = noise.shape[2]
    condition_mask = noise.new_zeros(1, 1, num_frames, 1, 1)
    condition_latents = torch.zeros_like(noise)
    for frame in condition_frames:
        source = frame if cond_latent.shape[2] > 1 else 0
        condition_latents[:, :, frame] = cond_latent[:, :, source]
        condition_mask[:, :, frame] = 1.0
    latents = condition_mask * condition_latents + (1.0 - condition_mask) * noise
    return latents, 1.0 - condition_mask


def prepare_latents_(
    cond_latent: Tensor, noise: Tensor, condition_frames: Sequence[int] = (0,)
) -> Tensor:
    """Writes the conditioned frames into `noise`; returns the velocity mask [1, 1, T, 1, 1]."""
    velocity_mask = noise.new_ones(1, 1, noise.shape[2], 1, 1)
    for frame in condition_frames:
        source = frame if cond_latent.shape[2] > 1 else 0
        noise[:, :, frame] = cond_latent[:, :, source]
        velocity_mask[:, :, frame] = 0.0
    return velocity_mask


def prepare_latents(
    cond_latent: Tensor, noise: Tensor, condition_frames: Sequence[int] = (0,)
) -> tuple[Tensor, Tensor]:
    """Selects per frame: `latents[:, :, t]` is `cond_latent` for t in condition_frames, else noise.

    Equal (==) to `prepare_latents_formula` for finite inputs.
    """
    latents = noise.clone(memory_format=torch.contiguous_format)
    return latents, prepare_latents_(cond_latent, latents, condition_frames)


def prepare_latents_mask(
    cond_latent: Tensor, noise: Tensor, condition_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """`m * cond + (1 - m) * noise` in float32 (float64 for float64 noise), rounded once."""
    compute = torch.float64 if noise.dtype == torch.float64 else torch.float32
    mask = condition_mask.to(compute)
    cond = cond_latent.to(compute)
    if cond.shape[2] > 1:
        cond = cond[:, :, : noise.shape[2]]
    latents = mask * cond + (1.0 - mask) * noise.to(compute)
    return latents.to(noise.dtype).contiguous(), (1.0 - mask).to(noise.dtype).contiguous()


NORM_EPS = 1e-12  # the default of torch.nn.functional.normalize, which the VAEs call


def rms_norm_silu(x: Tensor, weight: Tensor | None, silu: bool = True) -> Tensor:
    """`act(x / max(‖x‖₂, 1e-12) * (√C * weight))`, the norm taken over dim 1 of [B, C, H, W].

    The VAE's RMS norm with `weight` its gamma. Everything is computed in float32 (float64 for
    float64) and rounded once; √C stays out of the stored weight because rounding their product to
    bfloat16 would cost as much accuracy as rounding the result. Without `weight`, no √C either.
    """
    statistics = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=statistics)
    y = x / norm.clamp_min(NORM_EPS)
    if weight is not None:
        y = y * (weight.to(statistics) * x.shape[1] ** 0.5).view(-1, 1, 1)
    y = (torch.nn.functional.silu(y) if silu else y).to(x.dtype)
    return y.contiguous(memory_format=torch.channels_last)


def pack_pixels(pixels: Tensor, patch_size: int, dtype: torch.dtype) -> Tensor:
    """Normalised pixels in the patch order of `pixel_unshuffle`: [B, 3·p², H/p, W/p].

    Bytes [B, H, W, 3] are normalised as SGLang's `preprocess_image` does: `2 (x / 255) - 1` in
    float32. Floats [B, 3, H, W] are taken to be normalised already.
    """
    if pixels.dtype == torch.uint8:
        pixels = 2.0 * (pixels.permute(0, 3, 1, 2).to(torch.float32) / 255.0) - 1.0
    # As pixel_unshuffle, which leaves tensors without elements as they are.
    batch, _, height, width = pixels.shape
    p, rows, columns = patch_size, height // patch_size, width // patch_size
    cells = pixels.to(dtype).reshape(batch, 3, rows, p, columns, p).permute(0, 1, 3, 5, 2, 4)
    packed = cells.reshape(batch, 3 * p * p, rows, columns)
    return packed.contiguous(memory_format=torch.channels_last)


def _winograd_matrices(like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A^T [4, 6], G [6, 3] and B^T [6, 6] of F(4, 3) on the points 0, ±a, ±b, ∞, in float64."""
    a, b = 0.75, 1.5
    points = [0.0, a, -a, b, -b]
    inverse = [[p**i for p in points] + [float(i == 3)] for i in range(4)]
    kernel = []
    for p in points:
        scale = 1.0
        for other in points:
            scale *= p - other if other != p else 1.0
        kernel.append([1 / scale, p / scale, p * p / scale])
    kernel.append([0.0, 0.0, 1.0])
    aa, bb = a * a, b * b
    inputs = [
        [aa * bb, 0, -aa - bb, 0, 1, 0],
        [0, -a * bb, -bb, a, 1, 0],
        [0, a * bb, -bb, -a, 1, 0],
        [0, -b * aa, -aa, b, 1, 0],
        [0, b * aa, -aa, -b, 1, 0],
        [0, aa * bb, 0, -aa - bb, 0, 1],
    ]

    def make(rows: list[list[float]]) -> Tensor:
        return torch.tensor(rows, dtype=torch.float64, device=like.device)

    return make(inverse), make(kernel), make(inputs)


def winograd_pack(weight: Tensor) -> Tensor:
    """`G g G^T` of every 3x3 kernel g of [Cout, Cin, 3, 3], as [36, Cout/32, Cin, 32]."""
    in_channels = weight.shape[1]
    _, kernel, _ = _winograd_matrices(weight)
    points = (kernel @ weight.double() @ kernel.T).to(weight.dtype).flatten(2)
    return points.permute(2, 1, 0).reshape(36, in_channels, -1, 32).transpose(1, 2).contiguous()


def winograd_conv3x3(
    x: Tensor, packed_weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """Winograd's F(4x4, 3x3), whose own specification is `conv2d(x, weight, bias, padding=1)`.

    Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks" (2015): with 6x6 input tiles
    d, the 4x4 outputs are `A^T [(G g G^T) ⊙ (B^T d B)] A`.
    """
    batch, channels, height, width = x.shape
    inverse, _, inputs = (m.to(x.dtype) for m in _winograd_matrices(x))
    tall, wide = -(-height // 4), -(-width // 4)
    padded = torch.nn.functional.pad(x, (1, 4 * wide - width + 1, 1, 4 * tall - height + 1))
    tiles = padded.unfold(2, 6, 4).unfold(3, 6, 4)  # [B, C, tall, wide, 6, 6]
    points = (inputs @ tiles @ inputs.T).permute(4, 5, 0, 2, 3, 1).reshape(36, -1, channels)
    kernels = packed_weight.transpose(1, 2).reshape(36, channels, -1)
    products = (points @ kernels).reshape(6, 6, batch, tall, wide, -1).permute(2, 5, 3, 4, 0, 1)
    y = (inverse @ products @ inverse.T).transpose(3, 4).reshape(batch, -1, 4 * tall, 4 * wide)
    y = y[:, :, :height, :width]
    if bias is not None:
        y = y + bias.view(-1, 1, 1)
    if residual is not None:
        y = y + residual
    return y.contiguous(memory_format=torch.channels_last)
