"""Kernels that one encode and one decode launch on a GPU, and the bytes they move, by counting.

    python -m benchmarks.launches [--as NAME]

No GPU is needed: the networks run on tensors without values, on "cuda", and every operation that
torch dispatches is counted. The counts are kept under NAME in `benchmarks/results/launches.json`;
`launches.md` beside it shows them all.

What counts as a launch:

- A view, and an allocation, is none.
- A convolution with a bias is two: torch adds the bias in a kernel of its own, after cuDNN. One
  without is one, whatever cuDNN does inside.
- A pad is two: the fill of the result, and the copy into it.
- Attention is one, that of `scaled_dot_product_attention`'s memory-efficient kernel.
- A product with a bias is one: cuBLASLt adds it.
- Each of this package's ops is one, and one more for each image that is not channels-last.
- Any other operation of `KINDS` is one. An operation that is not listed there is refused.

Bytes: each launch reads its tensors and writes its results once, whatever the caches hold; what is
expanded is read once.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.formatting import table
from benchmarks.harness import ROOT
from cosmos3_fast.vae import FrameDecoder, FrameEncoder
from cosmos3_fast.vae.decoder_topology import DecoderTopology
from cosmos3_fast.vae.synthetic import COSMOS3_VAE_CONFIG, synthetic_config
from cosmos3_fast.vae.topology import EncoderTopology

RESULTS = ROOT / "benchmarks" / "results" / "launches.json"
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
    "aten::constant_pad_nd": PADS,
    "aten::avg_pool2d": POOLS,
    "aten::addmm": ATTENTION,
    "aten::bmm": ATTENTION,
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


def report(results: Mapping[str, Any]) -> str:
    """The Markdown of `launches.md`."""
    lines = [
        "# Launches and bytes of one frame",
        "",
        f"One frame of {HEIGHT}×{WIDTH}, Cosmos3's VAE, bfloat16, as dispatched for CUDA. Counted, "
        "not measured, by `python -m benchmarks.launches`, whose docstring says what counts.",
    ]
    for network in next(iter(results.values())):
        header = [network]
        for name in results:
            header += [f"launches, {name}", "MB"]
        kinds = dict.fromkeys(k for each in results.values() for k in each[network]["launches"])
        rows = []
        for kind in (*kinds, "in all"):
            row = [kind]
            for each in results.values():
                launches, moved = each[network]["launches"], each[network]["bytes"]
                whole = kind == "in all"
                row.append(str(sum(launches.values()) if whole else launches.get(kind, 0)))
                size = sum(moved.values()) if whole else moved.get(kind, 0)
                row.append(f"{size / 1e6:.0f}")
            rows.append(row)
        lines += ["", *table(header, rows)]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--as", dest="name", default="now", help="what to call these counts")
    given = parser.parse_args(arguments)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[given.name] = {
        name: {"launches": counter.launches, "bytes": counter.bytes}
        for name, counter in (("encode", count(FrameEncoder)), ("decode", count(FrameDecoder)))
    }
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    RESULTS.with_suffix(".md").write_text(report(results))
    print(report({given.name: results[given.name]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
