"""`python -m cosmos3_fast encode`: its result, its summary, its picture and its exit status."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("pyarrow", reason="the bulk extra is not installed")
pytest.importorskip("tqdm", reason="the bulk extra is not installed")

from bulk_cases import close, tiny_checkpoint, write_pictures
from PIL import Image

from cosmos3_fast import FrameDecoder, FrameEncoder
from cosmos3_fast.bulk import LatentDataset
from cosmos3_fast.bulk.contact import contact_sheet
from cosmos3_fast.cli import main as cli
from cosmos3_fast.images.load import load_frames

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], vae: Path, tmp_path: Path) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        options = ("--out", tmp_path / "out", "--vae", vae, "--workers", 0)
        status = cli.main(["encode", *map(str, (*arguments, *options))])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def test_a_folder_is_encoded(run: Run, vae: Path, tmp_path: Path):
    paths = write_pictures(tmp_path / "in", 5)
    status, out, _ = run(tmp_path / "in", "--size", "16x24", "--dtype", "fp32", "--preview", 3)
    assert status == 0
    assert f"{tmp_path / 'out'}: 5 encoded in " in out
    assert "images/s), 5 in all" in out
    assert "errors: 0" in out
    dataset = LatentDataset(tmp_path / "out", vae)
    encoder = FrameEncoder.from_pretrained(vae, dtype=torch.float32)
    assert close(dataset[4]["latents"], encoder(load_frames(paths[4], 16, 24))[0])
    with Image.open(tmp_path / "out" / "preview.png") as sheet:
        assert sheet.width > 3 * 320
        shown = torch.from_numpy(__import__("numpy").array(sheet))
    decoder = FrameDecoder.from_pretrained(vae, dtype=torch.float32)
    decoded = decoder(dataset[0]["latents"][None], output="uint8")[0]
    assert torch.equal(shown[16:32, 16:40], decoded)
    status, out, _ = run(tmp_path / "in", "--size", "16x24", "--dtype", "fp32")
    assert "0 encoded" in out
    assert "skipped: 5 encoded before, 0 repeated" in out


def test_strict_is_an_exit_status(run: Run, tmp_path: Path):
    paths = write_pictures(tmp_path / "in", 3)
    paths[1].write_bytes(b"broken")
    arguments = (tmp_path / "in", "--bucket", "500,0.001M")
    status, out, _ = run(*arguments)
    assert status == 0
    assert "errors: 1 (errors.parquet)" in out
    assert f"{paths[1]}: " in out
    status, out, _ = run(*arguments, "--strict")
    assert status == 1
    assert "2 in all" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--size", "15x24"), "height must be a positive multiple of the VAE's spatial factor 4"),
        (("--size", "16x24", "--bucket", "1M"), "not allowed with argument --size"),
        (("--bucket", "big"), "must be areas such as 0.25M,1M, got 'big'"),
        (("--clips", "3"), "clips must be 1 + 4k frames, got 3"),
        (("--preview", "0"), "preview must be a positive integer, got 0"),
    ],
)
def test_faults_take_one_line(run: Run, tmp_path: Path, arguments: tuple[str, ...], message: str):
    write_pictures(tmp_path / "in", 1)
    status, _, err = run(tmp_path / "in", *arguments)
    assert status == 2
    assert err.splitlines()[-1].startswith("error: ")
    assert message in err.splitlines()[-1]


def test_without_the_extra(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_pictures(tmp_path / "in", 1)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    status, _, err = run(tmp_path / "in", "--size", "16x24")
    assert status == 2
    assert "cosmos3_fast.bulk needs tqdm: pip install 'cosmos3-fast[bulk]'" in err


def test_a_contact_sheet_of_any_sizes():
    pictures = [torch.full((h, w, 3), 200, dtype=torch.uint8) for h, w in ((900, 40), (30, 700))]
    sheet = contact_sheet(pictures * 3, [f"folder/{i}.png" for i in range(6)])
    assert sheet.height == 2 * (320 + 26 + 16) + 16
