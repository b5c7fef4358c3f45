"""Results that lie where earlier ones lay: only once those are gone, and not beyond a call."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import resource
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cosmos3_fast import ops
from cosmos3_fast.ops import registry

CPU = torch.device("cpu")
MB = 1 << 20


def _torch_lends() -> bool:
    """Whether this torch makes tensors of memory that is given back (2.11 and newer)."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    return library.exists() and hasattr(ctypes.CDLL(str(library)), "torch_from_blob")


pytestmark = [
    pytest.mark.skipif(
        ("winograd_pack", "cpu") not in registry.LIBRARY_KERNELS, reason="needs the library"
    ),
    pytest.mark.skipif(not _torch_lends(), reason="torch before 2.11 cannot lend memory"),
]


def image(megabytes: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 16, 128, megabytes * 128, generator=generator)
    return x.contiguous(memory_format=torch.channels_last)


def frames(x: Tensor) -> list[Tensor]:
    return list(ops.transform_frames([x], 1, to=4, weight=torch.ones(16)))[:2]


CALLS: dict[str, Callable[[Tensor], list[Tensor]]] = {
    "rms_norm_silu": lambda x: [ops.rms_norm_silu(x, None)],
    "add_rms_norm_silu": lambda x: list(ops.add_rms_norm_silu(x, None)),
    "add_pad": lambda x: [ops.add_pad(x)],
    "transform_frames": frames,
    "winograd_pack": lambda x: [ops.winograd_pack(x.flatten()[: 256 * 64 * 9].view(256, 64, 3, 3))],
    "winograd_conv3x3": lambda x: [
        ops.winograd_conv3x3(x, ops.winograd_pack(torch.ones(32, 16, 3, 3)))
    ],
}


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@pytest.mark.parametrize("op", CALLS)
def test_a_result_lies_where_one_lay_that_is_gone(op: str):
    x, y = image(2), image(2, seed=1)
    wanted_x, wanted_y = CALLS[op](x), CALLS[op](y)
    with registry.unobserved(CPU):
        first = CALLS[op](x)
        places = {each.data_ptr() for each in first}
        view = first[0][..., 1:]
        second = CALLS[op](y)
        # One that is there, or of which there is a view, keeps its memory.
        assert places.isdisjoint(each.data_ptr() for each in second)
        assert all(map(torch.equal, first, wanted_x))
        place = first[0].data_ptr()
        del first
        third = CALLS[op](x)
        assert place not in {each.data_ptr() for each in third}
        assert torch.equal(view, wanted_x[0][..., 1:])
        del view, third
        fourth = CALLS[op](y)
        assert places & {each.data_ptr() for each in fourth}
        for got, wanted in zip((*second, *fourth), (*wanted_y, *wanted_y), strict=True):
            assert torch.equal(got, wanted)
            assert got.stride() == wanted.stride()


def test_nothing_is_kept_outside():
    x = image(2)
    with registry.unobserved(CPU), registry.unobserved(CPU):
        pass
    results = [ops.rms_norm_silu(x, None) for _ in range(3)]
    # Torch's own memory can be resized, lent memory cannot.
    assert all(each.untyped_storage().resizable() for each in results)
    with registry.unobserved(CPU):
        assert not ops.rms_norm_silu(x, None).untyped_storage().resizable()
        with registry.unobserved(CPU):
            inner = ops.rms_norm_silu(x, None)
            place = inner.data_ptr()
            del inner
        # The outermost context ends it.
        assert ops.rms_norm_silu(x, None).data_ptr() == place
    with pytest.raises(KeyError), registry.unobserved(CPU):
        raise KeyError
    assert ops.rms_norm_silu(x, None).untyped_storage().resizable()
    with registry.unobserved(torch.device("cuda")):
        assert ops.rms_norm_silu(x, None).untyped_storage().resizable()


def test_a_result_outlives_the_context_and_its_thread():
    x = image(2)
    wanted = ops.rms_norm_silu(x, None)
    kept: list[Tensor] = []

    def run() -> None:
        with registry.unobserved(CPU):
            kept.append(ops.rms_norm_silu(x, None))
            del_here = ops.rms_norm_silu(x, None)
            del del_here

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    with registry.unobserved(CPU):
        mine = [ops.rms_norm_silu(x, None) for _ in range(4)]
    for thread in threads:
        thread.join()
    assert all(torch.equal(each, wanted) for each in (*kept, *mine))
    assert len({each.data_ptr() for each in (*kept, *mine)}) == 8


def test_what_another_thread_drops_comes_back():
    x = image(2)
    with registry.unobserved(CPU):
        held = [ops.rms_norm_silu(x, None)]
        place = held[0].data_ptr()
        thread = threading.Thread(target=held.clear)
        thread.start()
        thread.join()
        assert ops.rms_norm_silu(x, None).data_ptr() == place


def given_back() -> None:
    x = image(96)
    gc.collect()
    before = resident()
    with registry.unobserved(CPU):
        ops.rms_norm_silu(x, None)
        assert resident() > before + 80 * MB  # idle, for the next one
    assert resident() < before + 16 * MB


def bounded() -> None:
    images = [image(size) for size in (40, 56, 80, 110, 40, 150, 60)]
    gc.collect()
    before = resident()
    with registry.unobserved(CPU):
        for x in images:
            ops.rms_norm_silu(x, None)
            # Of results that are there one at a time, no more than the largest and an eighth.
            assert resident() < before + 150 * MB * 9 / 8 + 16 * MB


@pytest.mark.parametrize("check", [given_back, bounded])
def test_what_a_process_holds(check: Callable[[], None]):
    """In one of its own: what earlier tests freed may be what malloc takes first."""
    process = multiprocessing.get_context("spawn").Process(target=check)
    process.start()
    process.join()
    assert process.exitcode == 0
