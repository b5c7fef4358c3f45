"""Latents of every shape, stride and dtype that the op tests share."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cosmos3_fast.ops.checks import FLOAT_DTYPES

DTYPES = FLOAT_DTYPES
LAYOUTS = (
    "contiguous",
    "channels_last_3d",
    "sliced",
    "stepped",
    "offset",
    "permuted",
    "expanded",
    "flipped_channels_frames",
)


def latent(
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    device: str = "cpu",
    seed: int = 0,
) -> Tensor:
    """A random latent [B, C, T, H, W] whose memory is laid out as `layout` says."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype).to(device)

    b, c, t, h, w = shape
    match layout:
        case "contiguous":
            return randn(*shape)
        case "channels_last_3d":
            return randn(*shape).contiguous(memory_format=torch.channels_last_3d)
        case "sliced":  # planes stay dense, every outer stride is odd
            return randn(b + 1, c + 2, t + 1, h, w)[1:, 1 : c + 1, 1:]
        case "stepped":
            return randn(b, c, 2 * t, h, 2 * w + 1)[:, :, ::2, :, 1 : 2 * w + 1 : 2]
        case "offset":  # contiguous, but its first element is not on a 16-byte boundary
            size = b * c * t * h * w
            return randn(size + 1)[1:].view(*shape)
        case "permuted":
            return randn(w, t, b, h, c).permute(2, 4, 1, 3, 0)
        case "expanded":
            return randn(b, c, 1, h, 1).expand(*shape)
        case "flipped_channels_frames":
            return randn(b, t, c, h, w).transpose(1, 2)
    raise ValueError(layout)


def _moved(x: Tensor, device: str) -> Tensor:
    size = x.untyped_storage().nbytes() // x.element_size()
    storage = x.as_strided((size,), (1,), 0).to(device)
    return storage.as_strided(x.shape, x.stride(), x.storage_offset())


@dataclass(frozen=True)
class Sample:
    """Arguments of one call; `frames` is also what the condition mask of `mask()` marks."""

    cond_latent: Tensor
    noise: Tensor
    frames: tuple[int, ...]

    def on(self, device: str) -> tuple[Tensor, Tensor]:
        """The latents on `device` with their strides and offsets, which `Tensor.to` drops."""
        return _moved(self.cond_latent, device), _moved(self.noise, device)

    def mask(self) -> Tensor:
        batch, _, frames, _, _ = self.noise.shape
        generator = torch.Generator().manual_seed(frames)
        mask = torch.rand(batch, 1, frames, 1, 1, generator=generator)
        mask[:, :, list(self.frames)] = 1.0
        return mask.to(self.noise.device)

    def __str__(self) -> str:
        return (
            f"cond {tuple(self.cond_latent.shape)} {self.cond_latent.dtype} "
            f"noise {tuple(self.noise.shape)} {self.noise.dtype} frames {self.frames}"
        )


# (batch of cond, frames of cond, noise shape, condition frames)
SHAPES = (
    (1, 1, (1, 5, 7, 6, 10), (0,)),
    (1, 1, (1, 3, 4, 8, 8), (0,)),  # planes of whole 16-byte vectors
    (2, 1, (2, 3, 4, 5, 7), (0, 2)),
    (1, 3, (2, 4, 5, 3, 1), (2, 0)),
    (2, 5, (2, 2, 5, 1, 9), (0, 1, 2, 3, 4)),
    (1, 7, (3, 1, 4, 2, 2), (1,)),  # more conditioning frames than noise has
    (1, 1, (1, 2, 3, 4, 4), ()),
    (1, 1, (1, 1, 1, 1, 1), (0,)),
    (1, 1, (1, 1, 140, 1, 3), (0, 63, 64, 127, 128, 139)),  # more than one launch in Triton
)


def sample_inputs(device: str = "cpu", layouts: Sequence[str] = LAYOUTS) -> Iterator[Sample]:
    """Every shape in several layouts and dtype pairs; each layout and pair occurs often.

    The many frames of the last shape come in every third layout: they are for the launches, and
    Triton's interpreter is slow.
    """
    pairs = itertools.cycle(itertools.product(DTYPES, DTYPES))
    cases = [*itertools.product(SHAPES[:-1], layouts), *((SHAPES[-1], x) for x in layouts[::3])]
    for seed, ((batch, frames, shape, which), layout) in enumerate(cases):
        cond_dtype, noise_dtype = next(pairs)
        cond_layout = layouts[(seed + shape[1]) % len(layouts)]
        yield Sample(
            latent((batch, shape[1], frames, *shape[3:]), cond_dtype, cond_layout, device, seed),
            latent(shape, noise_dtype, layout, device, seed + 1),
            which,
        )


IMAGE_LAYOUTS = ("contiguous", "channels_last", "sliced", "expanded")


def image(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    device: str = "cpu",
) -> Tensor:
    """A random feature map [B, C, H, W] whose memory is laid out as `layout` says."""
    b, c, h, w = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def randn(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype).to(device)

    match layout:
        case "contiguous":
            return randn(b, c, h, w)
        case "channels_last":
            return randn(b, h, w, c).permute(0, 3, 1, 2)
        case "sliced":
            return randn(b, h + 1, w + 2, c + 3).permute(0, 3, 1, 2)[:, 2 : c + 2, 1:, :w]
        case "expanded":
            return randn(b, c, 1, w).expand(b, c, h, w)
    raise ValueError(layout)
