"""`python -m cosmos3_fast decode`, and the decoded frame in previews."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import write_checkpoint
from decoder_cases import WAN22
from PIL import Image
from safetensors.torch import save_file

from cosmos3_fast import FrameDecoder
from cosmos3_fast.cli import main as cli
from cosmos3_fast.cli import prepare as cli_prepare
from cosmos3_fast.images import preview
from cosmos3_fast.vae.synthetic import synthetic_decoder_state_dict, synthetic_state_dict

PHOTOGRAPH = Path(__file__).parents[2] / "examples" / "falcon9_dscovr.jpg"


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    tensors = {**synthetic_state_dict(WAN22), **synthetic_decoder_state_dict(WAN22)}
    write_checkpoint(folder / "vae", WAN22, tensors)
    return folder


def run(*arguments: object) -> int:
    return cli.main([str(each) for each in arguments])


def latents_file(folder: Path) -> tuple[Path, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, WAN22["z_dim"], 3, 4, 6, generator=generator)
    save_file({"latents": latents}, folder / "latents.safetensors")
    return folder / "latents.safetensors", latents


def test_a_frame_becomes_a_picture(vae: Path, tmp_path: Path):
    file, latents = latents_file(tmp_path)
    picture = tmp_path / "picture.png"
    assert run("decode", file, "--vae", vae, "--out", picture, "--frame", 1) == 0
    decoder = FrameDecoder.from_pretrained(vae, dtype=torch.float32)
    wanted = decoder(latents[:, :, 1:2], output="uint8")[0]
    assert np.array_equal(np.asarray(Image.open(picture)), wanted.numpy())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--frame", 3), "--frame must be in [0, 3), got 3"),
        (("--frame", -1), "--frame must be in [0, 3), got -1"),
        (("--out", "picture.jpg"), "--out must end in .png"),
    ],
)
def test_faults_take_one_line_and_write_nothing(
    vae: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[object, ...],
    message: str,
):
    monkeypatch.chdir(tmp_path)
    file, _ = latents_file(tmp_path)
    assert run("decode", file, "--vae", vae, "--out", "picture.png", *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_files_that_hold_no_latents(vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "other.safetensors"
    wanted = {
        "no tensor `latents`": {"x": torch.ones(1)},
        "must have shape [B, z, T, h, w], got [4, 6]": {"latents": torch.ones(4, 6)},
    }
    for message, tensors in wanted.items():
        save_file(tensors, file)
        assert run("decode", file, "--vae", vae, "--out", tmp_path / "picture.png") == 2
        assert message in capsys.readouterr().err
    assert run("decode", tmp_path / "none", "--vae", vae, "--out", tmp_path / "picture.png") == 2
    assert "is no file" in capsys.readouterr().err


def test_previews_show_the_decoded_frame(
    vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shown: list[torch.Tensor | None] = []
    render = preview.render_preview

    def spy(*args: object, decoded: torch.Tensor | None = None, **options: object) -> Image.Image:
        shown.append(decoded)
        return render(*args, decoded=decoded, **options)

    monkeypatch.setattr(cli_prepare, "render_preview", spy)
    size = ("--size", "64x96", "--num-frames", 9)
    files = ("--out", tmp_path / "latents.safetensors", "--preview", tmp_path / "preview.png")
    assert run("prepare", PHOTOGRAPH, "--vae", vae, *size, *files) == 0
    (decoded,) = shown
    assert decoded is not None
    assert decoded.shape == (64, 96, 3)
    assert decoded.dtype == torch.uint8
    assert Image.open(tmp_path / "preview.png").width == preview.WIDTH
