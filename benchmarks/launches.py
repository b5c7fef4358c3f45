"""Kernels that one encode and one decode launch on a GPU, and the bytes they move, by counting.

    python -m benchmarks.launches

No GPU is needed: the networks run on tensors without values, on "cuda", and every operation that
torch dispatches is counted. Before: with the norm's kernel alone, and torch's own biases, sums,
pads and pools. After: as the networks are. Writes `benchmarks/results/launches.md`.

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

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.formatting import table
from benchmarks.harness import ROOT
from benchmarks.paths import unfused
from cosmos3_fast.ops import rms_norm_silu
from cosmos3_fast.vae import FrameDecoder, FrameEncoder
from cosmos3_fast.vae.networks.layers import attend
from cosmos3_fast.vae.synthetic import COSMOS3_VAE_CONFIG, synthetic_config
from cosmos3_fast.vae.topology import DecoderTopology, EncoderTopology

RESULTS = ROOT / "benchmarks" / "results" / "launches.md"
HEIGHT, WIDTH = 480, 832

CONVOLUTIONS, BIASES, NORMS, SUMS = "convolutions", "biases", "norms", "sums"
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
    "cosmos3::pack_pixels": OTHERS,
    "cosmos3::unpack_pixels": OTHERS,
    "cosmos3::rms_norm_silu": NORMS,
    "cosmos3::add_rms_norm_silu": NORMS,
    "cosmos3::add_pad": SUMS,
}


class LaunchCounter(TorchDispatchMode):
    """Counts what runs inside.

    Attributes:
        launches, bytes: by kind.
    """

    def __init__(self) -> None:
        super().__init__()
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
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
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
            self.add(kind, *inputs, *outputs)
        return result


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


def _bytes(x: Tensor) -> int:
    elements = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        elements *= size if stride else 1
    return elements * x.element_size()


def _is_channels_last(x: Tensor) -> bool:
    return x.dim() != 4 or x.is_contiguous(memory_format=torch.channels_last)


@contextmanager
def counting() -> Iterator[LaunchCounter]:
    """Inside, what torch runs is counted; for tensors of `FakeTensorMode`."""
    counter = LaunchCounter()
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
    return network


def count(network_type: type, dtype: torch.dtype = torch.bfloat16) -> LaunchCounter:
    """Of one frame of 480x832 through the encoder or decoder of Cosmos3."""
    config = synthetic_config(COSMOS3_VAE_CONFIG)
    encodes = network_type is FrameEncoder
    topology = (EncoderTopology if encodes else DecoderTopology).from_config(config)
    network = network_type(topology, dtype, device="meta")
    factor = topology.spatial_factor if encodes else network.spatial_factor
    shape = (
        (1, 3, HEIGHT, WIDTH) if encodes else (1, network.z_dim, HEIGHT // factor, WIDTH // factor)
    )
    with FakeTensorMode():
        without_values(network)
        frame = torch.empty(shape, dtype=dtype, device="cuda")
        with counting() as counter:
            network(frame)
    return counter


def count_all() -> dict[str, dict[str, LaunchCounter]]:
    """By network, before and after."""
    states: dict[str, Callable[[], Any]] = {
        "before": lambda: unfused(rms_norm_silu),
        "after": nullcontext,
    }
    counted: dict[str, dict[str, LaunchCounter]] = {"encode": {}, "decode": {}}
    for state, switch in states.items():
        with switch():
            counted["encode"][state] = count(FrameEncoder)
            counted["decode"][state] = count(FrameDecoder)
    return counted


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


# Of one frame: Cosmos3, and Wan 2.1 and Qwen-Image, whose latents have a quarter of the pixels.
ATTENTIONS = {"Cosmos3": (1560, 640), "Wan 2.1": (6240, 384)}


def count_attention() -> list[list[str]]:
    """Rows: the attention, launches and MB of `sdpa`, and of `layers.attend`."""
    rows = []
    for name, (tokens, width) in ATTENTIONS.items():
        row = [f"{name}, {tokens} tokens of {width}"]
        for run in (sdpa, attend):
            with FakeTensorMode():
                q, k, v = (
                    torch.empty(1, 1, tokens, width, dtype=torch.bfloat16, device="cuda")
                    for _ in range(3)
                )
                with counting() as counter:
                    run(q, k, v)
            row += [f"{counter.launches.total()}", f"{counter.bytes.total() / 1e6:.0f}"]
        rows.append(row)
    return rows


def report(counted: Mapping[str, Mapping[str, LaunchCounter]]) -> str:
    """The Markdown of `launches.md`."""
    lines = [
        "# Launches and bytes of one frame",
        "",
        f"One frame of {HEIGHT}×{WIDTH}, Cosmos3's VAE, bfloat16, as dispatched for CUDA. Counted, "
        "not measured, by `python -m benchmarks.launches`, whose docstring says what counts.",
    ]
    for network, states in counted.items():
        header = [network, *(f"{what}, {state}" for state in states for what in ("launches", "MB"))]
        rows = []
        for kind in dict.fromkeys(k for each in states.values() for k in each.launches):
            row = [kind]
            for each in states.values():
                row += [f"{each.launches[kind]}", f"{each.bytes[kind] / 1e6:.0f}"]
            rows.append(row)
        total = ["in all"]
        for each in states.values():
            total += [f"{each.launches.total()}", f"{each.bytes.total() / 1e6:.0f}"]
        lines += ["", *table(header, [*rows, total])]
    header = ["attention, one head", "launches, SDPA", "MB, SDPA", "launches, bmm", "MB, bmm"]
    lines += [
        "",
        *table(header, count_attention()),
        "",
        "No flash kernel takes heads of more than 256, so `scaled_dot_product_attention` runs its "
        "memory-efficient one. Against it, two products with the scores in float32 between them: "
        "more launches and bytes, and less time (`benchmarks/results/gpu`).",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    text = report(count_all())
    RESULTS.write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
