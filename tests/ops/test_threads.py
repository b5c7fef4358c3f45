"""The compiled CPU kernels with one thread and with several: the same bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from op_inputs import image, latent
from torch import Tensor

from cosmos3_fast.ops import registry

OPS = torch.ops.cosmos3


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def latents() -> tuple[Tensor, Tensor]:
    return latent((1, 12, 1, 60, 64)), latent((2, 12, 5, 60, 64), torch.bfloat16, "sliced", seed=1)


def in_place() -> Tensor:
    cond, noise = latents()
    OPS.prepare_latents_(cond, noise, [0, 1, 3])
    return noise


def winograd() -> Tensor:
    weight, x = image(64, 32, 3, 3), image(1, 32, 61, 67, layout="channels_last")
    return OPS.winograd_conv3x3(x, OPS.winograd_pack(weight), weight[:, 0, 0, 0].contiguous())


def transformed() -> Tensor:
    products = [image(4, 24, 31, 33, layout="channels_last") for _ in range(6)]
    results = OPS.transform_frames(products, 7, 2, torch.ones(24), None, torch.ones(24))
    return torch.cat([x.flatten() for x in results])


# Sizes that are several of the parts in which a kernel hands out its work, not evenly many.
CALLS: dict[str, Callable[[], Tensor]] = {
    "prepare_latents": lambda: OPS.prepare_latents(*latents(), [0, 1, 3])[0],
    "prepare_latents.mask": lambda: OPS.prepare_latents(
        *latents(), torch.linspace(0, 1, 10).view(2, 1, 5, 1, 1)
    )[0],
    "prepare_latents_": in_place,
    "rms_norm_silu": lambda: OPS.rms_norm_silu(
        image(2, 160, 31, 33, layout="channels_last"), torch.ones(160)
    ),
    "add_rms_norm_silu": lambda: torch.cat(
        OPS.add_rms_norm_silu(
            image(2, 160, 31, 33), None, True, torch.ones(160), image(2, 80, 62, 66)
        )
    ),
    "add_pad": lambda: OPS.add_pad(image(2, 160, 31, 33), None, image(2, 160, 31, 33)),
    "pack_pixels": lambda: OPS.pack_pixels(image(2, 3, 142, 66), 2, torch.bfloat16),
    "unpack_pixels": lambda: OPS.unpack_pixels(image(2, 12, 71, 33), 2, True),
    "resize_crop": lambda: OPS.resize_crop(
        (image(2, 171, 133, 3) * 100).byte(), [153, 240], [5, 3, 143, 229], "lanczos"
    ),
    "transform_frames": transformed,
    "winograd_pack": lambda: OPS.winograd_pack(image(96, 32, 3, 3)),
    "winograd_conv3x3": winograd,
}


@pytest.mark.parametrize("op", CALLS)
def test_the_number_of_threads_changes_nothing(
    op: str, threads: Callable[[int], None], poison: None
):
    if (error := registry.backend_error("cpp", "cpu", op)) is not None:
        pytest.skip(error)
    threads(1)
    wanted = CALLS[op]()
    assert not wanted.isnan().any()
    for count in (2, 3):
        threads(count)
        assert torch.equal(CALLS[op](), wanted)


def test_every_compiled_kernel_is_called():
    assert {op for op, device in registry.LIBRARY_KERNELS if device == "cpu"} <= set(CALLS)
