"""Random arguments of `transform_frames`, for its tests."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cosmos3_fast.ops.transform_frames import BLOCKS

# (products, to): every pair of what comes in and what goes out.
FORMS = [(count, to) for count in BLOCKS for to in (0, 1, 2, 4)]

LAYOUTS = ("channels_last", "contiguous", "sliced", "expanded")


def images(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    layout: str = "channels_last",
    device: str = "cpu",
    seed: int = 0,
) -> Tensor:
    """Random images [..., C, H, W] whose memory is laid out as `layout` says."""
    *leading, c, h, w = shape
    generator = torch.Generator().manual_seed(seed)

    def randn(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype).to(device)

    match layout:
        case "channels_last":
            return randn(*leading, h, w, c).movedim(-1, -3)
        case "contiguous":
            return randn(*shape)
        case "sliced":
            more = randn(*leading, h + 1, w + 2, c + 3).movedim(-1, -3)
            return more[..., 2 : c + 2, 1:, :w]
        case "expanded":
            return randn(*leading, c, 1, w).expand(shape)
    raise ValueError(layout)


@dataclass
class Call:
    """One call's arguments: `ops.transform_frames(*call.positional, **call.named)`."""

    products: list[Tensor]
    frames: int
    named: dict[str, Any] = field(default_factory=dict)

    @property
    def positional(self) -> tuple[list[Tensor], int]:
        return self.products, self.frames

    def all(self) -> tuple[Any, ...]:
        """As the op itself and its reference take them."""
        names = ("to", "bias", "residual", "weight", "silu", "past", "scales", "keep_sum")
        defaults = {"to": 0, "silu": True, "keep_sum": True}
        rest = (self.named.get(n, defaults.get(n)) for n in (*names, "sum_dtype", "frames_dtype"))
        return (*self.positional, *rest)


def make_call(
    count: int,
    to: int,
    frames: int,
    image: tuple[int, int, int, int],
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype] = (torch.float32,) * 3,
    layout: str = "channels_last",
    device: str = "cpu",
    seed: int = 0,
    absent: tuple[str, ...] = (),
    **named: Any,
) -> Call:
    """`image` is (B, C, H, W), `dtypes` those of the products, the sum and the frames; `absent`
    names the arguments that are left out."""
    batch, *rest = image
    blocks = -(-frames // BLOCKS[count])
    kind = {"layout": layout, "device": device}
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(2, image[1], generator=generator).to(device)
    made: dict[str, Any] = {
        "to": to,
        "bias": vectors[0],
        "weight": 1 + 0.3 * vectors[1],
        "residual": images(frames, *image, dtype=dtypes[1], seed=seed + 50, **kind),
        "past": images(2, *image, dtype=dtypes[2], seed=seed + 60, **kind),
        "scales": [2.0 ** (i - 2) for i in range(count)],
        "sum_dtype": dtypes[1],
        "frames_dtype": dtypes[2],
        **named,
    }
    products = [
        images(blocks * batch, *rest, dtype=dtypes[0], seed=seed + i, **kind) for i in range(count)
    ]
    return Call(products, frames, {k: v for k, v in made.items() if k not in absent})
