"""Kernels that one encode and one decode launch on a GPU, and the bytes they move, by counting.

    python -m benchmarks.launches

No GPU is needed: the networks run on tensors without values, on "cuda", and every operation that
torch dispatches is counted. Alone: as if each bias, sum, pad and pool that one of this package's
kernels takes with it were a launch of torch's own. Fused: as the networks are. Writes
`benchmarks/results/launches.md`.

What counts as a launch:

- A view, and an allocation, is none.
- A convolution with a bias is two: torch adds the bias in a kernel of its own, after cuDNN. One
  without is one, whatever cuDNN does inside.
- A pad is two: the fill of the result, and the copy into it.
- `scaled_dot_product_attention` is one, its memory-efficient kernel.
- A product with a bias is one: cuBLASLt adds it.
- Each of this package's ops is one, and one more for each image that is not channels-last.
- Any other operation of `KINDS` is one. An operation that is not listed there is refused.

Bytes: each launch reads its tensors and writes its results once, whatever the caches hold; what is
expanded is read once.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.harness import count_flops
from benchmarks.report import RESULTS, table
from cosmos3_fast.frames import latent_frames
from cosmos3_fast.vae import ClipDecoder, ClipEncoder, FrameDecoder, FrameEncoder
from cosmos3_fast.vae.synthetic import COSMOS3_VAE_CONFIG, synthetic_config

COMMITTED = RESULTS / "launches.md"
HEIGHT, WIDTH = 480, 832

# What users run by default, in pixel frames, and the clips that an engine conditions on.
CLIPS = {
    "decode": ((480, 832, 5), (480, 832, 81), (720, 1280, 189)),
    "encode": ((480, 832, 5), (480, 832, 17)),
}

CONVOLUTIONS, BIASES, NORMS, SUMS = "convolutions", "biases", "norms", "sums"
TRANSFORMS = "transforms"
PADS, POOLS, ATTENTION, OTHERS = "pads", "pools", "attention", "others"
FREE = "free"
KINDS = {
    "prim::device": FREE,
    "aten::promote_types": FREE,
    "aten::convolution": CONVOLUTIONS,
    "aten::add.Tensor": SUMS,
    "aten::add_.Tensor": SUMS,
    "aten::add.out": SUMS,
    "aten::constant_pad_nd": PADS,
    "aten::avg_pool2d": POOLS,
    "aten::addmm": ATTENTION,
    "aten::bmm": ATTENTION,
    "aten::bmm.dtype": ATTENTION,
    "aten::_softmax": ATTENTION,
    "aten::clone": OTHERS,
    "aten::copy_": OTHERS,
    "aten::_to_copy": OTHERS,
    "aten::cat": OTHERS,
    "aten::stack": OTHERS,
    "aten::mul.Tensor": OTHERS,
    "aten::mul.out": OTHERS,
    "aten::zero_": OTHERS,
    "aten::zeros_like": OTHERS,
    "cosmos3::pack_pixels": OTHERS,
    "cosmos3::unpack_pixels": OTHERS,
    "cosmos3::rms_norm_silu": NORMS,
    "cosmos3::add_rms_norm_silu": NORMS,
    "cosmos3::add_pad": SUMS,
    "cosmos3::transform_frames": TRANSFORMS,
}
FUSED = ("cosmos3::rms_norm_silu", "cosmos3::add_rms_norm_silu", "cosmos3::add_pad")


class LaunchCounter(TorchDispatchMode):
    """Counts what runs inside.

    Args:
        alone: count what this package's kernels take with them as launches of torch's own.

    Attributes:
        launches, bytes: by kind.
    """

    def __init__(self, alone: bool = False) -> None:
        super().__init__()
        self._alone = alone
        self.launches: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def add(self, kind: str, *tensors: Any) -> None:
        """One launch that reads or writes each of the tensors once."""
        self.launches[kind] += 1
        self.bytes[kind] += sum(map(_bytes, tensors))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name()
        if func.is_view or name.startswith(("aten::empty", "aten::new_empty", "aten::_unsafe")):
            return result
        if name not in KINDS:
            raise ValueError(f"{name} must be listed in benchmarks.launches.KINDS to be counted")
        kind = KINDS[name]
        read = {name: x for name, x in (kwargs or {}).items() if name != "out"}
        inputs = [x for x in tree_leaves((args, read)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        if name == "aten::convolution":
            self.add(kind, inputs[0], inputs[1], result)
            if args[2] is not None:
                self.add(BIASES, result, args[2], result)
            if _is_channels_last(inputs[0]):
                # As cuDNN writes it; without a GPU, torch takes another kernel's layout.
                result = torch.empty_like(result, memory_format=torch.channels_last)
        elif name == "aten::constant_pad_nd":
            self.add(kind, result)
            self.add(kind, inputs[0], inputs[0])
        elif name == "aten::copy_":
            self.add(kind, inputs[1], result)
        elif kind != FREE:
            if name.startswith("cosmos3::") and name != "cosmos3::unpack_pixels":
                for x in inputs:
                    if not _is_channels_last(x) and x.shape[1] != 3:
                        self.add(OTHERS, x, x)
            if self._alone and name in FUSED:
                named = {each.name: each.default_value for each in func._schema.arguments}
                named.update(zip(named, args, strict=False))
                self._add_alone(kind, outputs[0], **named)
            else:
                self.add(kind, *inputs, *outputs)
        return result

    def _add_alone(
        self,
        kind: str,
        out: Tensor,
        x: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        weight: Tensor | None = None,
        pad: bool = False,
        **_: Any,
    ) -> None:
        """A norm or a sum; those of its arguments that are not None."""
        if kind == NORMS:
            self.add(NORMS, x, weight, x)
        if bias is not None:
            self.add(BIASES, x, bias, x)
        if residual is not None:
            (channels, *sides), (own_channels, *own_sides) = residual.shape[1:], x.shape[1:]
            pooled = _bytes(residual)
            if sides != own_sides:
                pooled = pooled * math.prod(own_sides) // math.prod(sides)
                self.add(POOLS, residual, pooled)
            # Frames of zeros in an average leave some channels as they are.
            added = _bytes(x) * channels // own_channels
            self.add(SUMS, added, pooled, added)
        if pad:
            self.add(PADS, out)
            self.add(PADS, x, x)


class _Calls(TorchFunctionMode):
    """Attention as the one kernel that it is on a GPU; torch on tensors without values takes it
    apart. And as operations what the bindings to Python would ask a device for."""

    def __init__(self, counter: LaunchCounter) -> None:
        super().__init__()
        self._counter = counter

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            query, _, value = args
            result = query.new_empty(*query.shape[:-1], value.shape[-1])
            self._counter.add(ATTENTION, *args, result)
            return result
        if func is Tensor.contiguous:
            layout = (kwargs or {}).get("memory_format", torch.contiguous_format)
            x = args[0]
            done = x.is_contiguous(memory_format=layout)
            return x if done else torch.ops.aten.clone.default(x, memory_format=layout)
        if func is Tensor.copy_:
            return torch.ops.aten.copy_.default(*args)
        if func is Tensor.__getitem__:
            return _indexed(*args)
        if func is Tensor.__setitem__:
            target, source = _indexed(args[0], args[1]), args[2]
            # `x[i] += y` adds in place, and then assigns to itself, for which torch does nothing.
            if not _is_same_memory(target, source):
                torch.ops.aten.copy_.default(target, source)
            return None
        return func(*args, **(kwargs or {}))


def _indexed(x: Tensor, index: Any) -> Tensor:
    """`x[index]` of integers and slices."""
    dim = 0
    for each in index if isinstance(index, tuple) else (index,):
        if isinstance(each, int):
            x = torch.select(x, dim, each)
        else:
            start, stop, step = each.indices(x.shape[dim])
            x = torch.ops.aten.slice(x, dim, start, stop, step)
            dim += 1
    return x


def _is_same_memory(a: Tensor, b: Tensor) -> bool:
    return (
        a.untyped_storage()._cdata == b.untyped_storage()._cdata
        and a.storage_offset() == b.storage_offset()
        and a.stride() == b.stride()
    )


def _bytes(x: Tensor | int | None) -> int:
    if x is None or isinstance(x, int):
        return x or 0
    elements = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        elements *= size if stride else 1
    return elements * x.element_size()


def _is_channels_last(x: Tensor) -> bool:
    return x.dim() != 4 or x.is_contiguous(memory_format=torch.channels_last)


@contextmanager
def counting(alone: bool = False) -> Iterator[LaunchCounter]:
    """Inside, what torch runs is counted; for tensors of `FakeTensorMode`."""
    counter = LaunchCounter(alone)
    with torch.no_grad(), _Calls(counter), counter:
        yield counter


def without_values(network: torch.nn.Module) -> torch.nn.Module:
    """A network on "meta", in place with parameters on "cuda" that have no values.

    To be called inside `FakeTensorMode`, which refuses those on "meta".
    """
    for module in network.modules():
        for name, parameter in [*module.named_parameters(recurse=False)]:
            like = torch.empty_strided(
                parameter.shape, parameter.stride(), dtype=parameter.dtype, device="cuda"
            )
            setattr(module, name, torch.nn.Parameter(like, requires_grad=False))
        for name, buffer in [*module.named_buffers(recurse=False)]:
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda"))
    return network


def of_cosmos3(network_type: Any) -> torch.nn.Module:
    """A network of Cosmos3's VAE on "meta", in bfloat16."""
    topology = network_type.topology_type.from_config(synthetic_config(COSMOS3_VAE_CONFIG))
    network: torch.nn.Module = network_type(topology, torch.bfloat16, device="meta")
    return network


def count(network_type: Any, alone: bool = False) -> LaunchCounter:
    """Of one frame of 480x832 through the encoder or decoder of Cosmos3, in bfloat16."""
    network: Any = of_cosmos3(network_type)
    factor = network.spatial_factor
    frame, latents = (3, HEIGHT, WIDTH), (network.z_dim, HEIGHT // factor, WIDTH // factor)
    shape = frame if network_type is FrameEncoder else latents
    with FakeTensorMode():
        without_values(network)
        given = torch.empty((1, *shape), dtype=torch.bfloat16, device="cuda")
        with counting(alone) as counter:
            network(given)
    return counter


def count_clip(what: str, height: int, width: int, frames: int) -> tuple[LaunchCounter, int]:
    """What a clip of pixel frames launches, to "decode" or to "encode", and its operations."""
    network: Any = of_cosmos3(ClipDecoder if what == "decode" else ClipEncoder)
    factor = network.spatial_factor
    latents = (network.z_dim, latent_frames(frames), height // factor, width // factor)
    shape = latents if what == "decode" else (3, frames, height, width)
    with FakeTensorMode():
        without_values(network)
        given = torch.empty((1, *shape), dtype=torch.bfloat16, device="cuda")
        with counting() as counter:
            _, operations = count_flops(lambda: network(given))
    return counter, operations


def count_all() -> dict[str, dict[str, LaunchCounter]]:
    """By network, alone and fused."""
    return {
        name: {"alone": count(network, alone=True), "fused": count(network)}
        for name, network in (("encode", FrameEncoder), ("decode", FrameDecoder))
    }


def clip_rows(counted: dict[str, tuple[LaunchCounter, int]]) -> list[str]:
    """A table of clips: their operations, launches, and bytes between convolutions."""
    header = ["clip", "TFLOP", "launches", "convolutions", "transforms"]
    header += ["GB of convolutions", "GB of transforms", "GB of the rest"]
    rows = []
    for clip, (each, operations) in counted.items():
        of = [each.bytes[kind] for kind in (CONVOLUTIONS, TRANSFORMS)]
        rows.append(
            [
                clip,
                f"{operations / 1e12:.1f}",
                *(f"{n}" for n in (each.launches.total(), each.launches[CONVOLUTIONS])),
                f"{each.launches[TRANSFORMS]}",
                *(f"{b / 1e9:.0f}" for b in (*of, each.bytes.total() - sum(of))),
            ]
        )
    return table(header, rows)


def count_clips() -> dict[str, tuple[LaunchCounter, int]]:
    """By clip; and what 16 pixel frames more add to the first."""
    counted = {
        f"{what} {height}×{width}, {frames} frames": count_clip(what, height, width, frames)
        for what, sizes in CLIPS.items()
        for height, width, frames in sizes
    }
    (short, fewer), (long, more) = (count_clip("decode", HEIGHT, WIDTH, n) for n in (17, 81))
    a_fourth = LaunchCounter()
    for kind in long.launches:
        a_fourth.launches[kind] = (long.launches[kind] - short.launches[kind]) // 4
        a_fourth.bytes[kind] = (long.bytes[kind] - short.bytes[kind]) // 4
    counted[f"decode {HEIGHT}×{WIDTH}, 16 frames more"] = a_fourth, (more - fewer) // 4
    return counted


def report(
    counted: dict[str, dict[str, LaunchCounter]], clips: dict[str, tuple[LaunchCounter, int]]
) -> str:
    """The Markdown of `launches.md`."""
    lines = [
        "# Launches and bytes of one frame",
        "",
        f"One frame of {HEIGHT}×{WIDTH}, Cosmos3's VAE, bfloat16, as dispatched for CUDA. Counted, "
        "not measured, by `python -m benchmarks.launches`, whose docstring says what counts.",
    ]
    for network, states in counted.items():
        header = [network, *(f"{what}, {state}" for state in states for what in ("launches", "MB"))]
        kinds = dict.fromkeys(kind for each in states.values() for kind in each.launches)
        rows = []
        for kind in (*kinds, None):
            row = [kind or "in all"]
            for each in states.values():
                launches = each.launches[kind] if kind else each.launches.total()
                moved = each.bytes[kind] if kind else each.bytes.total()
                row += [f"{launches}", f"{moved / 1e6:.0f}"]
            rows.append(row)
        lines += ["", *table(header, rows)]
    lines += [
        "",
        "Clips; operations are those of torch's own counter. Transforms are "
        "`cosmos3::transform_frames`, all that stands between two convolutions along time.",
        "",
        *clip_rows(clips),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    text = report(count_all(), count_clips())
    COMMITTED.write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
