"""Triton kernels of `cosmos3::prepare_latents`: one program per tile of one H x W plane.

Importing this module imports Triton. The launchers take arguments that the checks of
`ops/prepare_latents.py` have passed, on a CUDA device or, under TRITON_INTERPRET=1, on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from cosmos3_fast.ops.prepare_latents import apart

# A launch carries which frames are conditioned as bits of two integers: no copy to the device,
# and no new specialisation for another list. More frames than this take further launches.
FRAMES_PER_LAUNCH = 128
BLOCK = 1024


@triton.jit
def _is_condition(t, bits_low, bits_high):
    # Words that fit 32 bits arrive as such, sign-extended: shifting those by up to 63 is undefined.
    word = tl.where(t < 64, tl.cast(bits_low, tl.int64), tl.cast(bits_high, tl.int64))
    return (word >> (t % 64)) & 1


@triton.jit
def _cast(value, dtype: tl.constexpr):
    # As torch converts: float64 reaches a 16-bit type through float32.
    if dtype.primitive_bitwidth == 16:
        return value.to(tl.float32).to(dtype)
    else:
        return value.to(dtype)


@triton.jit
def _row(b, c, t, stride_b, stride_c, stride_t, VECTOR: tl.constexpr):
    # Strides come in vectors: a multiple of VECTOR is what Triton then knows the offset to be.
    return (b * stride_b + c * stride_c + t * stride_t) * VECTOR


@triton.jit
def _plane(i, W, stride_h, stride_w, DENSE: tl.constexpr):
    return i if DENSE else i // W * stride_h + i % W * stride_w


@triton.jit
def _tile(tiles, plane, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    # Everything is in the grid's first dimension: the others end at 65535.
    row = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    i = tile.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return row, tile, i, i < tl.cast(plane, tl.int64) * VECTOR


@triton.jit(do_not_specialize=["bits_low", "bits_high", "first_frame"])
def prepare_latents_kernel(
    latents,  # [B, C, T, H, W], contiguous; IN_PLACE: not used
    velocity_mask,  # [T]
    cond,
    noise,
    bits_low,
    bits_high,
    first_frame,
    launch_frames,
    tiles,  # of BLOCK elements in a plane
    C,
    T,
    plane,  # H * W, in vectors
    W,
    cond_b, cond_c, cond_t, cond_h, cond_w,
    noise_b, noise_c, noise_t, noise_h, noise_w,
    IN_PLACE: tl.constexpr,  # conditioned frames are written into the noise, others left alone
    DENSE: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row, tile, i, inside = _tile(tiles, plane, BLOCK, VECTOR)
    local_t = row % launch_frames
    t = first_frame + local_t
    c = row // launch_frames % C
    b = row // launch_frames // C
    is_condition = _is_condition(local_t, bits_low, bits_high)
    dtype = noise.dtype.element_ty
    # Only the operand that is taken is read. The pointers' types differ where the dtypes do, so
    # that one name cannot hold both.
    if is_condition:
        cond_at = cond + _row(b, c, t, cond_b, cond_c, cond_t, VECTOR)
        taken = tl.load(cond_at + _plane(i, W, cond_h, cond_w, DENSE), mask=inside)
        value = _cast(taken, dtype)
        if IN_PLACE:
            to = noise + _row(b, c, t, noise_b, noise_c, noise_t, VECTOR)
            tl.store(to + _plane(i, W, noise_h, noise_w, DENSE), value, mask=inside)
    elif not IN_PLACE:
        noise_at = noise + _row(b, c, t, noise_b, noise_c, noise_t, VECTOR)
        value = tl.load(noise_at + _plane(i, W, noise_h, noise_w, DENSE), mask=inside)
    if not IN_PLACE:
        to = latents + ((b * C + c) * T + t) * plane * VECTOR
        tl.store(to + i, value, mask=inside)
    if (b == 0) & (c == 0) & (tile == 0):
        tl.store(velocity_mask + t, (1 - is_condition).to(tl.float32).to(dtype))


@triton.jit
def blend_kernel(
    latents,  # [B, C, T, H, W], contiguous
    velocity_mask,  # [Bm, T], contiguous
    cond,
    noise,
    mask,
    mask_batch,
    tiles,  # of BLOCK elements in a plane
    C,
    T,
    plane,  # H * W, in vectors
    W,
    cond_b, cond_c, cond_t, cond_h, cond_w,
    noise_b, noise_c, noise_t, noise_h, noise_w,
    mask_b, mask_t,
    COMPUTE: tl.constexpr,
    DENSE: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row, tile, i, inside = _tile(tiles, plane, BLOCK, VECTOR)
    t = row % T
    c = row // T % C
    b = row // T // C
    dtype = latents.dtype.element_ty
    m = tl.load(mask + b * mask_b + t * mask_t).to(COMPUTE)
    cond_at = cond + _row(b, c, t, cond_b, cond_c, cond_t, VECTOR)
    noise_at = noise + _row(b, c, t, noise_b, noise_c, noise_t, VECTOR)
    cond_value = tl.load(cond_at + _plane(i, W, cond_h, cond_w, DENSE), mask=inside).to(COMPUTE)
    noise_value = tl.load(noise_at + _plane(i, W, noise_h, noise_w, DENSE), mask=inside)
    value = m * cond_value + (1.0 - m) * noise_value.to(COMPUTE)
    to = latents + row * plane * VECTOR
    tl.store(to + i, value.to(dtype), mask=inside)
    if (b < mask_batch) & (c == 0) & (tile == 0):
        tl.store(velocity_mask + b * T + t, (1.0 - m).to(dtype))


def _strides(x: Tensor) -> tuple[int, ...]:
    # Stride 0 along a dimension of size 1 lets one batch entry or frame serve them all.
    return tuple(
        0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)
    )


def _access(cond_latent: Tensor, noise: Tensor) -> tuple[int, list[int], dict[str, int]]:
    """How the kernels reach the elements: the plane, the strides, and their constants.

    DENSE: each plane is one run of memory in both latents. VECTOR: the elements of 16 bytes, if
    also every row of both starts on a 16-byte boundary, else 1; the plane's size and the strides
    of batch, channel and frame are in vectors, since Triton by itself sees only multiples of 16.
    """
    _, _, _, height, width = noise.shape
    latents = (cond_latent, noise)
    dense = all(
        (width == 1 or x.stride(4) == 1) and (height == 1 or x.stride(3) == width) for x in latents
    )
    vector = 16 // min(x.element_size() for x in latents)
    steps = [height * width, *(stride for x in latents for stride in _strides(x)[:3])]
    if not dense or any(step % vector for step in steps) or any(x.data_ptr() % 16 for x in latents):
        vector = 1
    strides = []
    for x in latents:
        b, c, t, h, w = _strides(x)
        strides += [b // vector, c // vector, t // vector, h, w]
    return height * width // vector, strides, {"DENSE": dense, "VECTOR": vector}


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def _launches(
    condition_frames: Sequence[int], num_frames: int
) -> Iterator[tuple[int, int, int, int]]:
    """(low bits, high bits, first frame, frames) of each launch."""
    for first in range(0, num_frames, FRAMES_PER_LAUNCH):
        count = min(FRAMES_PER_LAUNCH, num_frames - first)
        bits = sum(1 << (f - first) for f in condition_frames if first <= f < first + count)
        yield _signed(bits & (1 << 64) - 1), _signed(bits >> 64), first, count


def prepare_latents(
    cond_latent: Tensor, noise: Tensor, condition_frames: Sequence[int] = (0,)
) -> tuple[Tensor, Tensor]:
    latents = torch.empty(noise.shape, dtype=noise.dtype, device=noise.device)
    if latents.numel() == 0:
        return latents, prepare_latents_(cond_latent, latents, condition_frames)
    velocity_mask = noise.new_empty(1, 1, noise.shape[2], 1, 1)
    batch, channels, frames, height, width = noise.shape
    tiles = triton.cdiv(height * width, BLOCK)
    plane, strides, constants = _access(cond_latent, noise)
    for low, high, first, count in _launches(condition_frames, frames):
        prepare_latents_kernel[(batch * channels * count * tiles,)](
            latents, velocity_mask, cond_latent, noise, low, high, first, count, tiles,
            channels, frames, plane, width, *strides, **constants, IN_PLACE=False, BLOCK=BLOCK,
        )  # fmt: skip
    return latents, velocity_mask


def prepare_latents_(
    cond_latent: Tensor, noise: Tensor, condition_frames: Sequence[int] = (0,)
) -> Tensor:
    velocity_mask = noise.new_empty(1, 1, noise.shape[2], 1, 1)
    batch, channels, frames, height, width = noise.shape
    planes = batch * channels if height * width else 0
    # A latent without elements still has a velocity mask: one plane of one masked-out tile.
    tiles = max(triton.cdiv(height * width, BLOCK), 1)
    cond_latent = apart(cond_latent, noise)
    plane, strides, constants = _access(cond_latent, noise)
    for low, high, first, count in _launches(condition_frames, frames):
        prepare_latents_kernel[(max(planes, 1) * count * tiles,)](
            noise, velocity_mask, cond_latent, noise, low, high, first, count, tiles,
            max(channels, 1), frames, plane if planes else 0, max(width, 1), *strides, **constants,
            IN_PLACE=True, BLOCK=BLOCK,
        )  # fmt: skip
    return velocity_mask


def prepare_latents_mask(
    cond_latent: Tensor, noise: Tensor, condition_mask: Tensor
) -> tuple[Tensor, Tensor]:
    latents = torch.empty(noise.shape, dtype=noise.dtype, device=noise.device)
    mask_batch = condition_mask.shape[0]
    velocity_mask = noise.new_empty(mask_batch, 1, noise.shape[2], 1, 1)
    batch, channels, frames, height, width = noise.shape
    if latents.numel() == 0:
        # A latent without elements still has a velocity mask: planes of one masked-out tile.
        batch, channels, height, width = mask_batch, 1, 0, 1
    rows, tiles = batch * channels * frames, max(triton.cdiv(height * width, BLOCK), 1)
    if rows:
        mask_b, _, mask_t, _, _ = _strides(condition_mask)
        plane, strides, constants = _access(cond_latent, noise)
        blend_kernel[(rows * tiles,)](
            latents, velocity_mask, cond_latent, noise, condition_mask, mask_batch, tiles,
            channels, frames, plane if height else 0, width, *strides, mask_b, mask_t,
            **constants, BLOCK=BLOCK,
            COMPUTE=tl.float64 if noise.dtype == torch.float64 else tl.float32,
            # As the formula: no fused multiply-add, so that float32 agrees to the bit.
            enable_fp_fusion=False,
        )  # fmt: skip
    return latents, velocity_mask
