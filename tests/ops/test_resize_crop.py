"""`cosmos3::resize_crop`: Pillow's resize and crop, to the bit."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from resize_crop_cases import LAYOUTS, Case, in_layout, limit_cases, random_case
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cosmos3_fast import ops
from cosmos3_fast.ops import registry
from cosmos3_fast.ops.resize_crop import FILTERS

OP = torch.ops.cosmos3.resize_crop
# The module, whose name the package gives to the op.
resize_crop = importlib.import_module("cosmos3_fast.ops.resize_crop")
# There is no Triton kernel.
BACKENDS = ("cpp", "eager")


def picture(*shape: int, seed: int = 0) -> Tensor:
    values = np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)
    return torch.from_numpy(values)


def on(x: Tensor, device: str) -> Tensor:
    """`x` on a device with its strides and offset, which `Tensor.to` may drop."""
    storage = x.as_strided((x.untyped_storage().nbytes(),), (1,), 0).to(device)
    return storage.as_strided(x.shape, x.stride(), x.storage_offset())


def skip_unless_served(backend: str, device: str) -> None:
    if (error := registry.backend_error(backend, device, "resize_crop")) is not None:
        pytest.skip(error)


def check(case: Case, device: str, backend: str | None = None) -> None:
    image = on(case.image, device)
    got = ops.resize_crop(image, case.size, case.crop, case.filter, backend=backend)
    assert got.device == image.device
    assert got.is_contiguous()
    assert torch.equal(got.cpu(), case.pillow()), str(case)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_pillow(backend: str, device: str):
    skip_unless_served(backend, device)
    for seed in range(150):
        check(random_case(seed, largest=600), device, backend)


def test_equals_pillow_at_the_limits(device: str):
    for case in limit_cases():
        check(case, device)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout: str, device: str):
    image = in_layout(picture(37, 53), layout)
    for size, crop in (((20, 70), (3, 5, 11, 40)), ((80, 30), (0, 0, 80, 30))):
        check(Case(image, size, crop, "lanczos"), device)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize("size", [(20, 30), (20, 90), (90, 20), (90, 110)])
def test_each_order_of_the_passes(size: tuple[int, int], filter: str, backend: str, device: str):
    """Against two of Pillow's resizes, each of which changes one side and so makes one pass."""
    skip_unless_served(backend, device)
    image = picture(60, 70)
    (height, width), resampling = size, Image.Resampling[filter.upper()]
    whole = Image.fromarray(image.numpy())
    results = []
    for vertical_first, between in ((False, (width, 60)), (True, (70, height))):
        wanted = np.array(whole.resize(between, resampling).resize((width, height), resampling))
        for crop in ((0, 0, height, width), (height // 3, width // 2, 7, 9)):
            got = ops.resize_crop(
                image.to(device), size, crop, filter, vertical_first=vertical_first,
                backend=backend,
            )  # fmt: skip
            top, left, rows, columns = crop
            part = wanted[top : top + rows, left : left + columns]
            assert torch.equal(got.cpu(), torch.from_numpy(part.copy()))
        results.append(wanted)
    assert not np.array_equal(*results), "the order must show, or this tests nothing"


@pytest.mark.parametrize(
    ("release", "expected"),
    [((9, 3), "0000"), ((12, 1), "0000"), ((12, 2), "1000"), ((13, 0), "1011"), ((14, 1), "1011")],
)
def test_the_order_of_each_release_of_pillow(
    release: tuple[int, int], expected: str, monkeypatch: pytest.MonkeyPatch
):
    """Read from their sources; that of the one installed shows in the tests against it."""
    monkeypatch.setattr(resize_crop, "_pillow_release", lambda: release)
    sizes = [((505, 5), (90, 40)), ((505, 5), (600, 40)), ((100, 90), (60, 90)), ((99, 9), (60, 8))]
    assert "".join(str(int(resize_crop.vertical_first_in_pillow(*s))) for s in sizes) == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_is_its_pictures(backend: str, device: str):
    skip_unless_served(backend, device)
    # An odd number of rows, so that strips of several pictures begin within one.
    batch = picture(3, 61, 43)
    for x in (batch, batch.flip(0)[:, 1:, ::2], batch[:1].expand(3, -1, -1, -1)):
        arguments = (37, 50), (4, 3, 29, 31), "bicubic"
        got = ops.resize_crop(on(x, device), *arguments, backend=backend)
        assert got.shape == (3, 29, 31, 3)
        for each, image in zip(got, x, strict=True):
            assert torch.equal(each.cpu(), Case(image, *arguments).pillow())
    empty = ops.resize_crop(batch[:0].to(device), (37, 50), (4, 3, 29, 31), backend=backend)
    assert empty.shape == (0, 29, 31, 3)


def test_only_the_crop_is_made(device: str):
    """The whole result would take 3 TB."""
    image = picture(1, 30)
    got = ops.resize_crop(image.to(device), (1 << 20, 1 << 20), (1 << 19, 1 << 19, 4, 5))
    assert got.shape == (4, 5, 3)
    column = ops.resize_crop(image.to(device), (1, 1 << 20), (0, 1 << 19, 1, 5))
    assert torch.equal(got, column.expand(4, -1, -1))


def test_opcheck(device: str):
    for layout in ("interleaved", "stepped"):
        image = on(in_layout(picture(9, 14), layout), device)
        for x in (image, image.expand(2, -1, -1, -1)):
            torch.library.opcheck(OP.default, (x, [7, 20], [1, 2, 5, 10], "bicubic", True))


def test_compiled_in_one_graph_for_every_size(device: str):
    def crop(image: Tensor) -> Tensor:
        return OP(image, [20, 30], [2, 3, 16, 24], "lanczos").float() / 255

    compiled = torch.compile(crop, fullgraph=True, dynamic=True, backend="aot_eager")
    for height, width in ((40, 60), (31, 33), (20, 30)):
        image = picture(height, width).to(device)
        assert torch.equal(compiled(image), crop(image))


def test_exported(device: str):
    class Crop(torch.nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            return ops.resize_crop(image, (20, 30), (2, 3, 16, 24), vertical_first=False)

    image = picture(40, 60).to(device)
    exported = torch.export.export(Crop(), (image,))
    assert torch.equal(exported.module()(image), Crop()(image))


def call(
    shape: tuple[int, ...] = (8, 9, 3),
    dtype: torch.dtype = torch.uint8,
    size: tuple[int, ...] = (6, 7),
    crop: tuple[int, ...] = (0, 0, 6, 7),
    filter: str = "lanczos",
) -> Callable[[], tuple[Any, ...]]:
    return lambda: (torch.zeros(1, dtype=dtype).expand(shape), size, crop, filter)


SHAPE = "image must have shape [H, W, 3] or [B, H, W, 3], got"
SIDES = "image must have height and width in 1 … 16777216, got"
SIZE = "size must be [height, width] in 1 … 2147483647, got"
CROP = "crop must be [top, left, height, width] inside size [6, 7], got"
FAULTS = {
    "dtype": (call(dtype=torch.float32), "image must be uint8, got torch.float32"),
    "rank": (call((8, 3)), f"{SHAPE} [8, 3]"),
    "high rank": (call((1, 1, 8, 9, 3)), f"{SHAPE} [1, 1, 8, 9, 3]"),
    "alpha": (call((8, 9, 4)), f"{SHAPE} [8, 9, 4]"),
    "no rows": (call((0, 9, 3)), f"{SIDES} [0, 9, 3]"),
    "no columns": (call((2, 8, 0, 3)), f"{SIDES} [2, 8, 0, 3]"),
    "long": (call((1, (1 << 24) + 1, 3)), f"{SIDES} [1, 16777217, 3]"),
    "size 0": (call(size=(0, 7)), f"{SIZE} [0, 7]"),
    "large size": (call(size=(6, 1 << 31)), f"{SIZE} [6, 2147483648]"),
    "three sizes": (call(size=(6, 7, 8)), f"{SIZE} [6, 7, 8]"),
    "three of a crop": (call(crop=(0, 0, 6)), f"{CROP} [0, 0, 6]"),
    "crop to the left": (call(crop=(0, -1, 6, 7)), f"{CROP} [0, -1, 6, 7]"),
    "crop below": (call(crop=(1, 0, 6, 7)), f"{CROP} [1, 0, 6, 7]"),
    "crop of nothing": (call(crop=(1, 1, 2, 0)), f"{CROP} [1, 1, 2, 0]"),
    "crop of 2**62": (
        call(crop=(1 << 62, 0, 1 << 62, 7)),
        f"{CROP} [{1 << 62}, 0, {1 << 62}, 7]",
    ),
    "filter": (
        call(filter="box"),
        "filter must be 'lanczos', 'bicubic' or 'bilinear', got 'box'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_each_backend_says_the_same(fault: str, backend: str | None, device: str):
    if backend is not None:
        skip_unless_served(backend, device)
    arguments, message = FAULTS[fault]
    image, *rest = arguments()
    with pytest.raises(RuntimeError) as raised:
        ops.resize_crop(image.to(device), *rest, backend=backend)
    assert str(raised.value) == f"resize_crop: {message}"


@pytest.mark.parametrize("fault", FAULTS)
def test_the_fake_says_the_same(fault: str, device: str):
    arguments, message = FAULTS[fault]
    image, *rest = arguments()
    with FakeTensorMode(), pytest.raises(RuntimeError) as raised:
        OP(torch.empty(image.shape, dtype=image.dtype, device=device), *rest)
    assert str(raised.value) == f"resize_crop: {message}"
