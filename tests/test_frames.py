"""The arithmetic of latent and pixel frames, against counting."""

from __future__ import annotations

import pytest

from cosmos3_fast.frames import conditioned_span, is_whole, latent_frames, pixel_frames

FACTORS = [1, 2, 4, 8]


def counted(clip_length: int, factor: int) -> tuple[int, bool]:
    """Latent frames of a clip read as the VAE does, and whether no pixel frame is left over."""
    latents, read = 1, 1
    while read + factor <= clip_length:
        latents, read = latents + 1, read + factor
    return latents, read == clip_length


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("clip_length", range(1, 34))
def test_a_clip_is_one_frame_and_then_groups(clip_length: int, factor: int):
    assert (latent_frames(clip_length, factor), is_whole(clip_length, factor)) == counted(
        clip_length, factor
    )


def test_the_cosmos3_lengths():
    lengths = [1, 5, 81, 93, 189]
    assert [latent_frames(n) for n in lengths] == [1, 2, 21, 24, 48]
    assert [pixel_frames(latent_frames(n)) for n in lengths] == lengths


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("count", range(1, 9))
def test_pixel_frames_are_the_fewest_that_give_so_many_latents(count: int, factor: int):
    needed = pixel_frames(count, factor)
    assert is_whole(needed, factor)
    assert latent_frames(needed, factor) == count
    assert needed == 1 or latent_frames(needed - 1, factor) == count - 1


def test_no_clip_is_whole_without_frames():
    assert not any(is_whole(n, factor) for n in (0, -1, -3, -4) for factor in FACTORS)


def test_the_conditioned_span_reaches_through_the_last_conditioned_one():
    assert [conditioned_span(each) for each in ((), (0,), (2, 0), iter([1]))] == [0, 1, 3, 2]
