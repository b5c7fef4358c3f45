"""Properties of the compiled CUDA and Triton kernels that can be read from the binaries."""

from __future__ import annotations

import re

import cuda_binary
import pytest

from cosmos3_fast.ops import registry

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")

if (error := cuda_binary.tools_error()) is not None:
    pytest.skip(error, allow_module_level=True)


@pytest.fixture(scope="module")
def kernels() -> list[cuda_binary.Kernel]:
    if not registry.build_info().get("cuda"):
        pytest.skip("the installed library was built without CUDA")
    library = cuda_binary.installed_library()
    assert library is not None
    return cuda_binary.kernels(library)


def test_every_architecture_has_every_kernel(kernels: list[cuda_binary.Kernel]):
    built = registry.build_info()["cuda_architectures"].split(";")
    names = {k.name for k in kernels}
    assert len(names) >= 20
    for name in names:
        assert {k.architecture for k in kernels if k.name == name} == {f"sm_{a}" for a in built}


def test_no_kernel_spills(kernels: list[cuda_binary.Kernel]):
    assert [k for k in kernels if k.stack] == []


def test_dense_rows_move_16_bytes_at_a_time(kernels: list[cuda_binary.Kernel]):
    for kernel in kernels:
        if kernel.name.startswith(
            (
                *("prepare_latents_kernel", "blend_kernel", "write_frames_kernel"),
                *("vectors_kernel", "transform_kernel"),
            )
        ):
            where = f"{kernel.name} on {kernel.architecture}"
            assert re.search(r"LDG\.E\.128", kernel.sass), where
            assert re.search(r"STG\.E\.128", kernel.sass), where


def test_pixels_are_stored_16_bytes_at_a_time(kernels: list[cuda_binary.Kernel]):
    for kernel in kernels:
        if kernel.name.startswith(("pack_pixels_kernel", "unpack_pixels_kernel")):
            where = f"{kernel.name} on {kernel.architecture}"
            assert re.search(r"STG\.E\.128", kernel.sass), where
            # All of a thread's loads before its first store.
            accesses = "".join(re.findall(r"(L|S)(?:D|T)G\.E", kernel.sass))
            assert accesses.startswith("LL"), where


def test_copies_have_several_loads_in_flight(kernels: list[cuda_binary.Kernel]):
    for kernel in kernels:
        if kernel.name.startswith(("prepare_latents_kernel", "write_frames_kernel")):
            wide = "".join(re.findall(r"(L|S)(?:D|T)G\.E\.128", kernel.sass))
            assert "LLLS" in wide, f"{kernel.name} on {kernel.architecture}"


def test_sums_have_all_their_loads_in_flight(kernels: list[cuda_binary.Kernel]):
    """Those of the four vectors of x and of the residual that a thread holds in 16 bits."""
    for kernel in kernels:
        if kernel.name.startswith("vectors_kernel"):
            wide = "".join(re.findall(r"(L|S)(?:D|T)G\.E\.128", kernel.sass))
            assert wide.index("S") >= 8, f"{kernel.name} on {kernel.architecture}"


def test_pixels_are_reduced_within_their_warp(kernels: list[cuda_binary.Kernel]):
    for kernel in kernels:
        if kernel.name.startswith(("vectors_kernel", "elements_kernel")):
            where = f"{kernel.name} on {kernel.architecture}"
            assert kernel.shared == 0, where
            assert "SHFL.BFLY" in kernel.sass, where
            assert "BAR.SYNC" not in kernel.sass, where


def test_products_and_residuals_have_all_their_loads_in_flight(kernels: list[cuda_binary.Kernel]):
    """Those of the fewest products of four frames, and of their residuals."""
    for kernel in kernels:
        if kernel.name.startswith("transform_kernel"):
            wide = "".join(re.findall(r"(L|S)(?:D|T)G\.E\.128", kernel.sass))
            where = f"{kernel.name} on {kernel.architecture}"
            assert max(map(len, re.findall("L+", wide))) >= 8, where
            assert kernel.shared <= 256, where  # four norms of eight warps


def test_float32_blends_without_fused_multiply_add(kernels: list[cuda_binary.Kernel]):
    for kernel in kernels:
        if kernel.name == "blend_kernel<float>":
            assert "FMUL" in kernel.sass
            # The remaining FFMA-free arithmetic is what makes it equal to the eager formula.
            assert "FFMA" not in kernel.sass, kernel.architecture
