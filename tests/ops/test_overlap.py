"""`prepare_latents_` where the two latents are views of one buffer: the same on every backend."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cosmos3_fast import ops
from cosmos3_fast.ops import registry

MESSAGE = "prepare_latents_: cond_latent must not overlap noise in memory; clone it"


def buffer(*shape: int, device: str = "cpu") -> Tensor:
    return torch.arange(float(torch.Size(shape).numel()), device=device).view(shape)


@pytest.fixture(params=[None, *registry.BACKENDS])
def backend(request: pytest.FixtureRequest, device: str) -> str | None:
    if request.param and (error := registry.backend_error(request.param, device)) is not None:
        pytest.skip(error)
    return request.param


def overlapping(device: str) -> list[tuple[Tensor, Tensor]]:
    frames, columns = buffer(1, 1, 4, 2, 2, device=device), buffer(13, device=device)
    return [
        (frames[:, :, 1:], frames[:, :, :3]),
        (frames[:, :, :3], frames[:, :, 1:]),
        (columns[1:].view(1, 1, 3, 2, 2), columns[:12].view(1, 1, 3, 2, 2)),
        (columns[1:5].view(1, 1, 1, 2, 2), columns[:12].view(1, 1, 3, 2, 2)),
    ]


def test_a_partial_overlap_is_refused(backend: str | None, device: str):
    for cond, noise in overlapping(device):
        before = noise.clone()
        with pytest.raises(RuntimeError) as raised:
            ops.prepare_latents_(cond, noise, (2, 1, 0), backend=backend)
        assert str(raised.value) == MESSAGE
        assert torch.equal(noise, before)


def test_as_torch_refuses_it(device: str):
    cond, noise = overlapping(device)[0]
    with pytest.raises(RuntimeError, match="refer to a single memory location"):
        noise.copy_(cond)


def test_the_fake_says_the_same():
    with FakeTensorMode() as mode:
        for cond, noise in overlapping("cpu"):
            base = torch.empty(cond.untyped_storage().nbytes() // 4)
            fakes = [
                base.as_strided(x.shape, x.stride(), x.storage_offset()) for x in (cond, noise)
            ]
            with pytest.raises(RuntimeError) as raised:
                ops.prepare_latents_(*fakes, (2, 1, 0))
            assert str(raised.value) == MESSAGE
        ops.prepare_latents_(torch.empty(1, 1, 1, 2, 2), torch.empty(1, 1, 3, 2, 2))
        assert mode is not None
    meta = torch.empty(1, 1, 1, 2, 2, device="meta"), torch.empty(1, 1, 3, 2, 2, device="meta")
    assert ops.prepare_latents_(*meta).shape == (1, 1, 3, 1, 1)


def test_the_same_view_twice_changes_nothing(backend: str | None, device: str):
    noise = buffer(2, 3, 4, 2, 5, device=device)
    before = noise.clone()
    ops.prepare_latents_(noise, noise, (3, 0, 1), backend=backend)
    assert torch.equal(noise, before)


def test_interleaved_views_are_read_before_they_are_written(backend: str | None, device: str):
    whole = buffer(2, 3, 4, 2, 5, device=device)
    for frames in ((2, 1, 0), (0, 1, 2), (1,)):
        for cond_at, noise_at in ((slice(1, None), slice(0, 3)), (slice(0, 3), slice(1, None))):
            work = whole.clone()
            wanted = whole[:, :, noise_at].clone()
            wanted[:, :, list(frames)] = whole[:, :, cond_at][:, :, list(frames)]
            ops.prepare_latents_(work[:, :, cond_at], work[:, :, noise_at], frames, backend=backend)
            assert torch.equal(work[:, :, noise_at], wanted)


def test_neighbors_in_one_buffer_do_not_overlap(backend: str | None, device: str):
    whole = buffer(1, 2, 5, 2, 3, device=device)
    cond, noise = whole[:, :, :1], whole[:, :, 1:]
    wanted = noise.clone()
    wanted[:, :, 2] = cond[:, :, 0]
    ops.prepare_latents_(cond, noise, (2,), backend=backend)
    assert torch.equal(noise, wanted)
