"""The op against its specification: every backend, layout, dtype pair and special case."""

from __future__ import annotations

import pytest
import torch
from op_inputs import DTYPES, LAYOUTS, Sample, latent, sample_inputs

from cosmos3_fast import ops
from cosmos3_fast.ops import registry
from cosmos3_fast.ops.prepare_latents import (
    prepare_latents_formula,
    prepare_latents_in_place_reference,
    prepare_latents_mask_reference,
    prepare_latents_reference,
)

SAMPLES = list(sample_inputs())


def available(device: str) -> list[str]:
    return [name for name in registry.BACKENDS if registry.backend_error(name, device) is None]


@pytest.fixture(params=registry.BACKENDS)
def backend(request: pytest.FixtureRequest, device: str) -> str:
    if (error := registry.backend_error(request.param, device)) is not None:
        pytest.skip(error)
    return request.param


def assert_equal(actual: torch.Tensor, wanted: torch.Tensor, inexact_cast: bool = False) -> None:
    """Equality (==, NaN equals NaN); to one unit in the last place for a truncating cast."""
    assert actual.shape == wanted.shape
    assert actual.dtype == wanted.dtype
    assert actual.is_contiguous()
    if inexact_cast:
        tolerance = torch.finfo(wanted.dtype).eps
        torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=0, equal_nan=True)
    else:
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0, equal_nan=True)


def truncates(backend: str, device: str, dtype: torch.dtype) -> bool:
    # Triton's interpreter casts float32 to bfloat16 by truncation; the compiled kernel rounds.
    return backend == "triton" and device == "cpu" and dtype == torch.bfloat16


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_frames_equal_the_reference(sample: Sample, backend: str, device: str, poison: None):
    cond, noise = sample.on(device)
    before = noise.clone()
    latents, velocity = ops.prepare_latents(cond, noise, sample.frames, backend=backend)
    wanted, wanted_velocity = prepare_latents_reference(cond, noise, sample.frames)
    assert_equal(latents, wanted, truncates(backend, device, noise.dtype))
    assert_equal(velocity, wanted_velocity)
    assert torch.equal(noise, before)
    seed_latents, seed_velocity = prepare_latents_formula(cond, noise, sample.frames)
    assert_equal(wanted, seed_latents.contiguous())
    assert_equal(wanted_velocity, seed_velocity)


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_mask_equals_the_reference(sample: Sample, backend: str, device: str, poison: None):
    if 1 < sample.cond_latent.shape[2] < sample.noise.shape[2]:
        pytest.skip("the mask form needs every frame of a clip")
    cond, noise = sample.on(device)
    for mask in (sample.mask().to(device), sample.mask()[:1].to(device, noise.dtype)):
        latents, velocity = ops.prepare_latents(cond, noise, condition_mask=mask, backend=backend)
        wanted, wanted_velocity = prepare_latents_mask_reference(cond, noise, mask)
        inexact = truncates(backend, device, noise.dtype)
        assert_equal(latents, wanted, inexact)
        assert_equal(velocity, wanted_velocity, inexact)


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_in_place_writes_only_the_conditioned_frames(
    sample: Sample, backend: str, device: str, poison: None
):
    if any(
        n > 1 and s == 0 for n, s in zip(sample.noise.shape, sample.noise.stride(), strict=True)
    ):
        pytest.skip("expanded noise is refused: tests/ops/test_errors.py")
    # The latent is a view into a guard zone of the same strides, all around it.
    guard = 64
    storage = sample.noise.untyped_storage().nbytes() // sample.noise.element_size()
    buffer = torch.full((storage + 2 * guard,), 7.0, dtype=sample.noise.dtype, device=device)
    place = (sample.noise.shape, sample.noise.stride(), sample.noise.storage_offset() + guard)
    noise = buffer.as_strided(*place)
    noise.copy_(sample.noise)
    cond, _ = sample.on(device)
    expected = buffer.clone()
    wanted_velocity = prepare_latents_in_place_reference(
        cond, expected.as_strided(*place), sample.frames
    )
    velocity = ops.prepare_latents_(cond, noise, sample.frames, backend=backend)
    if truncates(backend, device, noise.dtype):
        assert_equal(buffer, expected, inexact_cast=True)
    else:
        assert torch.equal(buffer, expected)
    assert_equal(velocity, wanted_velocity)


def test_the_guard_zone_would_show_a_stray_write():
    buffer = torch.full((8,), 7.0)
    expected = buffer.clone()
    buffer[0] = 1.0
    assert not torch.equal(buffer, expected)


def test_the_poison_reaches_the_op_s_own_allocations(poison: None):
    assert torch.ops.aten.new_empty(torch.zeros(1), [64]).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_frames_select_so_nothing_leaks(dtype: torch.dtype, backend: str, device: str):
    noise = latent((1, 2, 3, 4, 4), dtype, device=device)
    cond = latent((1, 2, 1, 4, 4), dtype, device=device, seed=1)
    noise[:, :, 0] = float("nan")
    noise[0, 0, 1, 0, 0] = float("inf")
    latents, _ = ops.prepare_latents(cond, noise, (0,), backend=backend)
    assert torch.equal(latents[:, :, 0], cond[:, :, 0])
    assert latents[0, 0, 1, 0, 0] == float("inf")
    latents, _ = ops.prepare_latents(
        torch.full_like(cond, float("nan")), noise, (), backend=backend
    )
    assert_equal(latents, noise)
    leaked, _ = prepare_latents_formula(cond, noise, (0,))
    assert leaked[:, :, 0].isnan().all(), "the engines' formula is what leaks"


@pytest.mark.parametrize("value", [1.0 + 2**-8, 1.0 + 3 * 2**-8, 65504.0, 1e-30, -0.0, 3.4e38])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_latent_is_rounded_to_nearest_even(
    value: float, dtype: torch.dtype, backend: str, device: str
):
    if truncates(backend, device, dtype):
        pytest.skip("Triton's interpreter truncates")
    cond = torch.full((1, 1, 1, 2, 2), value, device=device)
    noise = latent((1, 1, 2, 2, 2), dtype, device=device)
    latents, _ = ops.prepare_latents(cond, noise, backend=backend)
    assert torch.equal(latents[:, :, 0], cond[:, :, 0].to(dtype))


@pytest.mark.parametrize(
    "shape", [(0, 3, 4, 5, 6), (2, 0, 4, 5, 6), (2, 3, 0, 5, 6), (2, 3, 4, 0, 6), (2, 3, 4, 5, 0)]
)
def test_latents_without_elements(shape: tuple[int, ...], backend: str, device: str, poison: None):
    noise = latent(shape, device=device)
    cond = latent((1, shape[1], 1, *shape[3:]), device=device)
    frames = (1,) if shape[2] else ()
    wanted, wanted_velocity = prepare_latents_reference(cond, noise, frames)
    latents, velocity = ops.prepare_latents(cond, noise, frames, backend=backend)
    assert_equal(latents, wanted)
    assert_equal(velocity, wanted_velocity)
    assert_equal(ops.prepare_latents_(cond, noise, frames, backend=backend), wanted_velocity)
    mask = torch.rand(1, 1, shape[2], 1, 1, device=device)
    latents, velocity = ops.prepare_latents(cond, noise, condition_mask=mask, backend=backend)
    assert latents.shape == shape
    assert_equal(velocity, 1 - mask)


def test_default_frames_are_the_first(device: str):
    cond, noise = latent((1, 2, 1, 2, 2), device=device), latent((1, 2, 3, 2, 2), device=device)
    explicit = ops.prepare_latents(cond, noise, (0,))
    for implicit in (
        ops.prepare_latents(cond, noise),
        torch.ops.cosmos3.prepare_latents(cond, noise),
    ):
        assert all(torch.equal(a, b) for a, b in zip(explicit, implicit, strict=True))


def test_the_output_never_aliases_the_noise(backend: str, device: str):
    cond, noise = latent((1, 2, 1, 2, 2), device=device), latent((1, 2, 3, 2, 2), device=device)
    latents, _ = ops.prepare_latents(cond, noise, (), backend=backend)
    assert latents.data_ptr() != noise.data_ptr()


def _free_bytes() -> int:
    with open("/proc/meminfo") as meminfo:
        return next(int(x.split()[1]) for x in meminfo if x.startswith("MemAvailable")) * 1024


@pytest.mark.skipif(_free_bytes() < 5 << 30, reason="needs 5 GiB of free memory")
def test_more_than_2_to_the_31_elements():
    shape = (1, 1, 3, 1 << 15, 22_000)
    assert shape[2] * shape[3] * shape[4] > 1 << 31
    cond = torch.full((1, 1, 1, 1, 1), 2.0, dtype=torch.bfloat16).expand(1, 1, 1, *shape[3:])
    noise = torch.full((1, 1, 1, 1, 1), 3.0, dtype=torch.bfloat16).expand(*shape)
    latents, _ = ops.prepare_latents(cond, noise, (2,))
    corners = latents[0, 0, :, :: shape[3] - 1, :: shape[4] - 1].flatten(1)
    assert corners.tolist() == [[3.0] * 4, [3.0] * 4, [2.0] * 4]
    ops.prepare_latents_(2 * cond, latents, (0,))
    assert latents[0, 0, :, -1, -1].tolist() == [4.0, 3.0, 2.0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("backend_name", ["cpp", "triton"])
def test_graph_capture_replays_under_changed_inputs(backend_name: str):
    if (error := registry.backend_error(backend_name, "cuda")) is not None:
        pytest.skip(error)
    cond, noise = latent((1, 48, 1, 8, 8), device="cuda"), latent((1, 48, 5, 8, 8), device="cuda")
    ops.prepare_latents(cond, noise, (0,), backend=backend_name)  # Triton compiles outside
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        latents, _ = ops.prepare_latents(cond, noise, (0,), backend=backend_name)
    for seed in range(3):
        noise.copy_(latent(noise.shape, device="cuda", seed=seed))
        cond.copy_(latent(cond.shape, device="cuda", seed=seed + 10))
        graph.replay()
        assert torch.equal(latents, prepare_latents_reference(cond, noise, (0,))[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_the_kernel_runs_on_the_current_stream(backend: str):
    stream = torch.cuda.Stream()
    noise = latent((1, 48, 21, 30, 52), device="cuda")
    cond = latent((1, 48, 1, 30, 52), device="cuda", seed=1)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        moved = noise * 2
        latents, _ = ops.prepare_latents(cond, moved, (0,))
    stream.synchronize()
    assert torch.equal(latents, prepare_latents_reference(cond, noise * 2, (0,))[0])


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_kernel_runs_on_the_device_of_its_arguments():
    cond, noise = latent((1, 2, 1, 2, 2), device="cuda:1"), latent((1, 2, 3, 2, 2), device="cuda:1")
    with torch.cuda.device(0):
        latents, _ = ops.prepare_latents(cond, noise, (0,))
    assert latents.device == noise.device
    assert torch.equal(latents, prepare_latents_reference(cond, noise, (0,))[0])


def test_every_layout_and_dtype_is_sampled():
    assert {s.noise.dtype for s in SAMPLES} == {s.cond_latent.dtype for s in SAMPLES} == set(DTYPES)
    assert len({s.noise.stride() for s in SAMPLES}) > len(LAYOUTS)
    assert "cpp" in available("cpu") or registry.LIBRARY_ERROR
