"""Random arguments of `transform_frames`, and what is right of it, for its tests."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cosmos3_fast.ops.cook_toom import CookToom, cook_toom
from cosmos3_fast.ops.transform_frames import BLOCKS

# (products, to): every pair of what comes in and what goes out.
FORMS = [(count, to) for count in BLOCKS for to in (0, 1, 2, 4)]

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
# Of products, sum and frames: all alike, a bfloat16 network with float16 products, its plain frames
# going in and coming out, a float32 network with float16 products.
DTYPES = (
    *((x,) * 3 for x in (F32, BF16, F16, F64)),
    (F16, BF16, F16),
    (BF16, BF16, F16),
    (F16, BF16, BF16),
    (F16, F32, F16),
)

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

    def __str__(self) -> str:
        def text(x: Any) -> str:
            return f"{x.dtype} {list(x.shape)} strides {x.stride()}" if hasattr(x, "stride") else x

        named = {name: text(x) for name, x in self.named.items()}
        return f"{len(self.products)} products {text(self.products[0])}, {self.frames}, {named}"

    def all(self) -> tuple[Any, ...]:
        """As the op itself and its reference take them."""
        names = ("to", "bias", "residual", "weight", "silu", "past", "scales", "keep_sum")
        defaults = {"to": 0, "silu": True, "keep_sum": True, "point": 1.0}
        names = (*names, "sum_dtype", "frames_dtype", "point")
        return (*self.positional, *(self.named.get(n, defaults.get(n)) for n in names))


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
        "point": (1.0, 0.75, 1.3)[seed % 3],
        **named,
    }
    products = [
        images(blocks * batch, *rest, dtype=dtypes[0], seed=seed + i, **kind) for i in range(count)
    ]
    return Call(products, frames, {k: v for k, v in made.items() if k not in absent})


def matrices(m: int, p: float) -> CookToom:
    """Of F(m, 3), where m is 2 on the points 0, ±p and infinity."""
    if m != 2:
        return cook_toom(m)
    inputs = (
        (-p * p, 0.0, 1.0, 0.0),
        (0.0, p, 1.0, 0.0),
        (0.0, -p, 1.0, 0.0),
        (0.0, -p, 0.0, 1 / p),
    )
    kernel = (
        (-1 / p**2, 0.0, 0.0),
        *((0.5 / p**2, s / p, 0.5) for s in (0.5, -0.5)),
        (0.0, 0.0, 1.0),
    )
    return CookToom(((1.0, 1.0, 1.0, 0.0), (0.0, p, -p, p)), kernel, inputs)


def exact(call: Call) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The results in float64 and, for each, the size of what was added up to it: rounding errors
    are parts of that, not of the result."""
    point = call.named.get("point", 1.0)

    def run(of: str) -> tuple[Tensor, ...]:
        absolute = of == "sizes"
        products = [p.double() for p in call.products]
        scales = call.named.get("scales") or [1.0] * len(products)
        products = [p * s for p, s in zip(products, scales, strict=True)]
        m = BLOCKS[len(products)]
        inverse = matrices(m, point).inverse if m > 1 else ((1.0,) * len(products),)
        frames, batch = call.frames, products[0].shape[0] // -(-call.frames // m)
        rows = torch.tensor(inverse, dtype=torch.float64, device=products[0].device)
        stacked = torch.stack(products)
        if absolute:
            rows, stacked = rows.abs(), stacked.abs()
        y = torch.einsum("ip,p...->i...", rows, stacked)
        y = y.unflatten(1, (-1, batch) if y.shape[1] else (-(-frames // m), 0)).transpose(0, 1)
        y = y.flatten(0, 1)[:frames]
        for name in ("bias", "residual"):
            if (added := call.named.get(name)) is not None:
                added = added.double().view(-1, 1, 1) if name == "bias" else added.double()
                y = y + (added.abs() if absolute else added)
        return y

    y, size = run("values"), run("sizes")
    total = (y, size) if call.named.get("keep_sum", True) else (y.new_empty(0), y.new_empty(0))
    to = call.named.get("to", 0)
    if to == 0:
        return (total[0], y.new_empty(0), y.new_empty(0)), (total[1], *[y.new_empty(0)] * 2)
    a, a_size = y, size
    if (weight := call.named.get("weight")) is not None:
        weight = weight.double().view(-1, 1, 1)
        root = y.shape[2] ** 0.5
        divisor = torch.linalg.vector_norm(y, dim=2, keepdim=True).clamp_min(1e-12)
        a = y / divisor * root * weight
        # An error e of y turns a by no more than (e + a/|weight| * |e| / divisor) * root * weight.
        spread = torch.linalg.vector_norm(size, dim=2, keepdim=True) / divisor
        a_size = size / divisor * root * weight.abs() + a.abs() * spread
        if call.named.get("silu", True):
            a, a_size = F.silu(a), 1.1 * a_size  # the steepest SiLU is
    past = call.named.get("past")
    past = y.new_zeros(2, *y.shape[1:]) if past is None else past.double()
    window, sizes = torch.cat([past, a]), torch.cat([past.abs(), a_size])
    if to == 1:
        return (total[0], window, window[-2:]), (total[1], sizes, sizes[-2:])
    blocks = -(-call.frames // to)
    rows = torch.tensor(matrices(to, point).inputs, dtype=torch.float64, device=y.device)

    def transformed(x: Tensor, rows: Tensor) -> Tensor:
        x = torch.cat([x, x.new_zeros(blocks * to - call.frames, *x.shape[1:])])
        terms = torch.stack([x[i::to][:blocks] for i in range(to + 2)])
        return torch.einsum("ji,i...->j...", rows, terms)

    return (
        (total[0], transformed(window, rows), window[-2:]),
        (total[1], transformed(sizes, rows.abs()), sizes[-2:]),
    )


def fault(call: Call, got: tuple[Tensor, ...]) -> str | None:
    """What is wrong with results that are to be within one rounding to their dtype, and a few units
    of what they are computed in, of those in float64."""
    wanted, sizes = exact(call)
    own = call.products[0].dtype
    dtypes = (call.named.get("sum_dtype") or own, *[call.named.get("frames_dtype") or own] * 2)
    # Eight sums and products to a row, the norm's sum and root, the exponential's two.
    compute = 24 * torch.finfo(torch.promote_types(own, torch.float32)).eps
    names = ("sum", "transformed", "last")
    for name, ours, theirs, size, dtype in zip(names, got, wanted, sizes, dtypes, strict=True):
        if ours.dtype != dtype or ours.shape != theirs.shape:
            return f"{name} is {ours.dtype} {list(ours.shape)}"
        if ours.dim() > 1 and not ours.movedim(-3, -1).is_contiguous():
            return f"the channels of {name} are not last in memory"
        rounding, least = torch.finfo(dtype).eps / 2, torch.finfo(dtype).smallest_normal
        bound = rounding * theirs.abs() + compute * size * (1 + rounding)
        bound += rounding * least + compute * torch.finfo(torch.float32).smallest_normal
        if not bool(((ours.double() - theirs).abs() <= bound).all()):
            return f"{name} is not right to rounding"
    return None
