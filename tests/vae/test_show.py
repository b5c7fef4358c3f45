"""Latents to files: each form of decoder gives the decoder's bytes; what makes none is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import write_checkpoint
from encoder_cases import TINY_CLIP
from PIL import Image

import cosmos3_fast
from cosmos3_fast import ClipDecoder, FrameDecoder, accelerate, restore, save_video
from cosmos3_fast.vae import show, synthetic
from cosmos3_fast.vae.show import decoded_frames, decoded_picture

CONFIG = {**TINY_CLIP, "decoder_base_dim": 8}
Z = CONFIG["z_dim"]


@pytest.fixture(scope="module")
def decoder() -> ClipDecoder:
    tensors = synthetic.synthetic_decoder_state_dict(CONFIG)
    return ClipDecoder.from_state_dict(tensors, CONFIG, torch.float32)


@pytest.fixture(scope="module")
def first() -> FrameDecoder:
    tensors = synthetic.synthetic_decoder_state_dict(CONFIG)
    return FrameDecoder.from_state_dict(tensors, CONFIG, torch.float32)


def latents(frames: int) -> torch.Tensor:
    return torch.randn(1, Z, frames, 2, 3, generator=torch.Generator().manual_seed(frames))


def pictures(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())])


def test_every_form_of_decoder(decoder: ClipDecoder, first: FrameDecoder, tmp_path: Path):
    pytest.importorskip("diffusers")
    live = synthetic.synthetic_vae(CONFIG, decoder_base_dim=None)
    tensors = synthetic.synthetic_state_dict(CONFIG) | synthetic.synthetic_decoder_state_dict(
        CONFIG
    )
    write_checkpoint(tmp_path / "checkpoint" / "vae", CONFIG, tensors)
    for count, forms in (
        (3, [decoder, live, tmp_path / "checkpoint"]),
        (1, [decoder, first, live, str(tmp_path / "checkpoint" / "vae")]),
    ):
        z = latents(count)
        wanted = decoder(z, "uint8")[0].numpy()
        for i, form in enumerate(forms):
            for given in (z, z[0]):
                out = tmp_path / f"{count} {i} {given.dim()}"
                assert save_video(form, given, out) == out
                assert np.array_equal(pictures(out), wanted), i
    picture = save_video(first, latents(1), tmp_path / "one.png")
    assert np.array_equal(np.asarray(Image.open(picture)), first(latents(1), "uint8")[0])


def test_latents_on_the_vae_s_own_scale(decoder: ClipDecoder, first: FrameDecoder, tmp_path: Path):
    z = latents(3)
    whole = decoder.decode_unnormalized(z, "uint8")
    assert torch.equal(torch.cat(list(decoder.frames(z, "uint8", normalized=False)), 1), whole)
    save_video(decoder, z, tmp_path / "clip", normalized=False)
    assert np.array_equal(pictures(tmp_path / "clip"), whole[0])
    save_video(first, z[:, :, :1], tmp_path / "frame", normalized=False)
    wanted = first.decode_unnormalized(z[:, :, :1], "uint8")
    assert np.array_equal(pictures(tmp_path / "frame"), wanted)
    assert torch.equal(decoded_picture(first, z[:, :, :1], "z", normalized=False), wanted[0])
    assert not np.array_equal(whole[0], decoder(z, "uint8")[0])


def test_an_accelerated_vae_keeps_its_decoders(
    decoder: ClipDecoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("diffusers")
    live = accelerate(synthetic.synthetic_vae(CONFIG, decoder_base_dim=None))
    folded: list[type] = []
    for kind in (ClipDecoder, FrameDecoder):
        from_vae = kind.from_vae

        def counting(*args: Any, from_vae: Any = from_vae, kind: type = kind, **kw: Any) -> Any:
            folded.append(kind)
            return from_vae(*args, **kw)

        monkeypatch.setattr(kind, "from_vae", counting)

    def saved(name: str) -> list[np.ndarray]:
        found = []
        for count in (3, 1):
            out = save_video(live, latents(count), tmp_path / f"{name} {count}")
            found.append(pictures(out))
        return found

    for name in ("first", "second"):
        for count, frames in zip((3, 1), saved(name), strict=True):
            assert np.array_equal(frames, decoder(latents(count), "uint8")[0].numpy())
    # That for single frames was folded by `accelerate`.
    assert folded == [ClipDecoder]
    with torch.no_grad():
        live.decoder.conv_out.bias += 0.5
    brighter, _ = saved("changed")
    assert brighter.mean() > pictures(tmp_path / "second 3").mean() + 10
    assert folded == [ClipDecoder, ClipDecoder, FrameDecoder]
    # What the VAE decodes by itself is folded for this call.
    changes = [
        lambda: accelerate(live, clips=False),
        lambda: accelerate(live, "exact"),
        lambda: restore(live),
    ]
    for i, change in enumerate(changes):
        change()
        folded.clear()
        save_video(live, latents(3), tmp_path / f"own {i}")
        assert folded == [ClipDecoder]


def test_a_video(decoder: ClipDecoder, tmp_path: Path):
    av = pytest.importorskip("av", reason="PyAV is not installed (the extra [video])")
    done: list[int] = []
    path = save_video(decoder, latents(6), tmp_path / "a.mp4", 12, 10, progress=done.append)
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate == 12
        assert sum(1 for _ in container.decode(video=0)) == 21
    assert done[0] == 1
    assert done[-1] == 21


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_latents_that_are_not_finite(decoder: ClipDecoder, tmp_path: Path, value: float):
    z = latents(3)
    z[0, 1, 2, 1, 1] = value
    with pytest.raises(ValueError, match="latents must hold finite values, got NaN or infinity"):
        save_video(decoder, z, tmp_path / "a")
    # Before the weights are looked for.
    with pytest.raises(ValueError, match="latents must hold finite values"):
        save_video(tmp_path / "no checkpoint", z, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_pixels_that_are_not_finite(
    decoder: ClipDecoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    frames = ClipDecoder.frames

    def spoiled(*args: Any, **options: Any) -> Any:
        for i, part in enumerate(frames(*args, **options)):
            yield part if i == 0 else part * float("nan")

    monkeypatch.setattr(ClipDecoder, "frames", spoiled)
    with pytest.raises(ValueError, match=r"must decode to finite pixels, .* dtype float32"):
        save_video(decoder, latents(3), tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_latents_too_large_for_the_machine(
    decoder: ClipDecoder, first: FrameDecoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(decoder, "frames", lambda *_, **__: pytest.fail("decoded"))
    monkeypatch.setattr("os.sysconf", lambda name: 1024)  # a machine of a megabyte
    z = torch.zeros(1, Z, 2, 200, 200)
    for network, given in ((decoder, z), (first, z[:, :, :1])):
        with pytest.raises(MemoryError, match=r"latents of 200x200 cells, .* need at least"):
            save_video(network, given, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_refusals(decoder: ClipDecoder, first: FrameDecoder, tmp_path: Path):
    z, out = latents(2), tmp_path / "a"
    for given in (z.expand(2, -1, -1, -1, -1), z[0, 0], z[:, :, :0]):
        with pytest.raises(ValueError, match=r"latents must have shape \[1, z, T, h, w\] or"):
            save_video(decoder, given, out)
    with pytest.raises(ValueError, match=f"latents must have {Z} channels"):
        save_video(decoder, z[:, 1:], out)
    with pytest.raises(ValueError, match="latents must have 1 frame, got 2"):
        save_video(first, z, out)
    with pytest.raises(ValueError, match=r"latents must be floating point, got torch.int64"):
        save_video(decoder, z.long(), out)
    with pytest.raises(TypeError, match="latents must be a tensor, got list"):
        save_video(decoder, [z], out)
    for wrong in (None, 3, torch.nn.Linear(1, 1)):
        with pytest.raises(TypeError, match=r"must be a .* got (NoneType|int|Linear)"):
            save_video(wrong, z, out)
    with pytest.raises(ValueError, match="path must end in"):
        save_video(decoder, z, tmp_path / "a.avi")
    with pytest.raises(ValueError, match=r"\.png must be of 1 frame, got 5"):
        save_video(decoder, z, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_parts_need_no_gradient(decoder: ClipDecoder):
    z = latents(2).requires_grad_()
    parts = decoded_frames(decoder, z, "z")
    assert torch.equal(torch.cat(list(parts)), decoder(z, "uint8")[0])
    assert torch.is_grad_enabled()


def test_the_root_has_it():
    assert cosmos3_fast.save_video is show.save_video
