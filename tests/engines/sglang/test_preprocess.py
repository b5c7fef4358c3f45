"""From files on disk, through the stage that loads them and the one that is hooked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sglang_engine import (
    SERVER_ARGS,
    Cosmos3ImagePreprocessStage,
    make_batch,
    make_stage,
    make_vae,
    outputs,
    patched,
    run,
)

av = pytest.importorskip("av")


@pytest.fixture(scope="module")
def stage():
    return make_stage(make_vae(base_dim=8))


def frames(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 40, 56, 3), dtype=np.uint8)


def write_clip(path: Path, pictures: np.ndarray) -> str:
    """A lossless file of these pictures."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.height, stream.width = pictures.shape[1:3]
        stream.pix_fmt = "bgr0"
        for picture in pictures:
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return str(path)


def prepared(stage, mode: str | None, **request):
    batch = make_batch(**request)
    Cosmos3ImagePreprocessStage()(batch, SERVER_ARGS)
    if mode is None:
        return outputs(run(stage, batch))
    with patched(mode):
        return outputs(run(stage, batch))


def assert_conditioned_alike(ours, theirs) -> None:
    assert torch.equal(ours["latents"], theirs["latents"])
    assert ours["extra"].keys() == theirs["extra"].keys()
    for name in ("condition_latents", "velocity_mask"):
        assert torch.equal(ours["extra"][name], theirs["extra"][name])


@pytest.mark.parametrize("source_frames", [2, 5, 12, 30])
@pytest.mark.parametrize("keep", ["first", "last"])
def test_a_clip(stage, tmp_path, source_frames, keep):
    path = write_clip(tmp_path / "clip.mkv", frames(source_frames))
    request = {"video_path": path, "condition_video_keep": keep}
    theirs = prepared(stage, None, **request)
    assert_conditioned_alike(prepared(stage, "exact", **request), theirs)


def test_first_and_last_are_different_conditioning(stage, tmp_path):
    path = write_clip(tmp_path / "clip.mkv", frames(12))
    first, last = (
        prepared(stage, "exact", video_path=path, condition_video_keep=keep)["latents"]
        for keep in ("first", "last")
    )
    assert not torch.equal(first, last)


def test_an_image(stage, tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(frames(1)[0]).save(path)
    theirs = prepared(stage, None, image_path=str(path))
    assert_conditioned_alike(prepared(stage, "exact", image_path=str(path)), theirs)
    assert theirs["extra"]["velocity_mask"].flatten().tolist() == [0, 1, 1, 1, 1]
