"""Results that no machine holds: an error that says memory, from every op."""

from __future__ import annotations

import re

import pytest
import torch

from cosmos3_fast import ops
from cosmos3_fast.ops import registry


def huge(*shape: int) -> torch.Tensor:
    return torch.zeros(1).expand(shape)


CALLS = {
    "prepare_latents": lambda backend: ops.prepare_latents(
        huge(1, 1 << 20, 1, 1 << 10, 1 << 6),
        huge(1, 1 << 20, 1 << 10, 1 << 10, 1 << 6),
        backend=backend,
    ),
    "prepare_latents.mask": lambda backend: ops.prepare_latents(
        huge(1, 1 << 20, 1, 1 << 10, 1 << 6),
        huge(1, 1 << 20, 1 << 10, 1 << 10, 1 << 6),
        condition_mask=torch.zeros(1, 1, 1 << 10, 1, 1),
        backend=backend,
    ),
    "rms_norm_silu": lambda backend: ops.rms_norm_silu(
        huge(1 << 20, 16, 1 << 12, 1 << 10), None, backend=backend
    ),
    "add_rms_norm_silu": lambda backend: ops.add_rms_norm_silu(
        huge(1 << 20, 16, 1 << 12, 1 << 10), None, backend=backend
    ),
    "add_pad": lambda backend: ops.add_pad(huge(1 << 20, 16, 1 << 12, 1 << 10), backend=backend),
    "pack_pixels": lambda backend: ops.pack_pixels(
        huge(1 << 20, 3, 1 << 12, 1 << 10), 2, torch.float32, backend=backend
    ),
    "resize_crop": lambda backend: ops.resize_crop(
        torch.zeros(2, 2, 3, dtype=torch.uint8),
        (1 << 30, 1 << 30),
        (0, 0, 1 << 30, 1 << 30),
        backend=backend,
    ),
    "transform_frames": lambda backend: ops.transform_frames(
        [huge(1 << 20, 16, 1 << 12, 1 << 10)], 4, backend=backend
    ),
    "winograd_pack": lambda backend: ops.winograd_pack(
        huge(1 << 20, 1 << 20, 3, 3), backend=backend
    ),
    "winograd_conv3x3": lambda backend: ops.winograd_conv3x3(
        huge(1 << 20, 16, 1 << 12, 1 << 10), torch.zeros(36, 1, 16, 32), backend=backend
    ),
}


@pytest.mark.parametrize("backend", ["cpp", "eager"])
@pytest.mark.parametrize("op", CALLS)
def test_too_large_a_result(op: str, backend: str):
    if (error := registry.backend_error(backend, "cpu", op)) is not None:
        pytest.skip(error)
    with pytest.raises(RuntimeError) as raised:
        CALLS[op](backend)
    assert re.search("memory", str(raised.value))
    if backend == "cpp":
        name = op.partition(".")[0]
        assert str(raised.value).startswith(f"{name}: not enough memory")
