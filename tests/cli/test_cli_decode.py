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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_latents_that_are_not_finite_make_no_picture(
    vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], value: float
):
    file, latents = latents_file(tmp_path)
    latents[0, 3, 1, 2, 2] = value
    save_file({"latents": latents}, file)
    out = tmp_path / "picture.png"
    assert run("decode", file, "--vae", vae, "--out", out, "--frame", 1) == 2
    message = f"latent frame 1 of '{file}' must hold finite values, got NaN or infinity"
    assert message in capsys.readouterr().err
    assert not out.exists()
    # The other frames are whole.
    assert run("decode", file, "--vae", vae, "--out", out, "--frame", 0) == 0


def test_a_picture_that_is_not_finite_is_not_written(
    vae: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    forward = FrameDecoder.forward
    monkeypatch.setattr(
        FrameDecoder, "forward", lambda *args, **options: forward(*args, **options) * float("nan")
    )
    file, _ = latents_file(tmp_path)
    out = tmp_path / "picture.png"
    assert run("decode", file, "--vae", vae, "--out", out) == 2
    assert "must decode to finite pixels, got NaN or infinity" in capsys.readouterr().err
    assert not out.exists()


def test_latents_too_large_for_the_machine_are_refused_before_the_work(
    vae: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(FrameDecoder, "forward", lambda *_: pytest.fail("decoded"))
    monkeypatch.setattr("os.sysconf", lambda name: 1024)  # a machine of a megabyte
    file = tmp_path / "latents.safetensors"
    save_file({"latents": torch.zeros(1, WAN22["z_dim"], 1, 150, 150)}, file)
    assert run("decode", file, "--vae", vae, "--out", tmp_path / "picture.png") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "latents of 150x150 cells, 2400x2400 pixels, need at least" in line
    assert "this machine has 0.00105" in line


def test_faults_of_a_file_name_it(vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file, latents = latents_file(tmp_path)
    out = ("--out", tmp_path / "picture.png", "--vae", vae)
    save_file({"latents": latents.to(torch.int32)}, file)
    assert run("decode", file, *out) == 2
    assert f"of '{file}' must be floating point, got torch.int32" in capsys.readouterr().err
    file.write_bytes(file.read_bytes()[:-4])
    assert run("decode", file, *out) == 2
    assert f"'{file}' is not a complete safetensors file" in capsys.readouterr().err
