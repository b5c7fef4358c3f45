"""`python -m cosmos3_fast decode`: videos and pictures; the decoded frame in previews."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import write_checkpoint
from decoder_cases import WAN22
from PIL import Image
from safetensors.torch import save_file

from cosmos3_fast import ClipDecoder, FrameDecoder
from cosmos3_fast.cli import main as cli
from cosmos3_fast.cli import prepare as cli_prepare
from cosmos3_fast.images import preview
from cosmos3_fast.vae.source import VaeSource
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
        (("--out", "frames", "--frame", 1), "--out must be a .png for --frame, got 'frames'"),
        (("--out", "frames", "--fps", 8), "--out must be a video or .gif for --fps, got 'frames'"),
        (("--crf", 3), "--out must be .mp4 or .webm for --crf, got 'picture.png'"),
        (("--fps", "0/0"), "must be a number in [0.01, 1000] such as 24 or 30000/1001, got '0/0'"),
        (("--key", "x"), "has no tensor `x`, but 1 others: --key takes one, such as `latents`"),
        (("--sample", 1), "--sample must be in [0, 1), got 1"),
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


def pictures(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())])


def clip_of(vae: Path, latents: torch.Tensor, normalized: bool = True) -> np.ndarray:
    decoder = ClipDecoder.from_pretrained(vae, dtype=torch.float32)
    decode = decoder if normalized else decoder.decode_unnormalized
    return decode(latents, output="uint8")[0].numpy()


def test_all_frames_become_pictures(vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file, latents = latents_file(tmp_path)
    assert run("decode", file, "--vae", vae, "--out", tmp_path / "frames") == 0
    assert np.array_equal(pictures(tmp_path / "frames"), clip_of(vae, latents))
    told = capsys.readouterr()
    assert f"{tmp_path / 'frames'}: 9 pictures of 96x64\n" in told.out
    assert "latents taken as normalized, by default (--scale)" in told.out
    assert "decoding 9 frames ..." in told.err
    save_file({"latents": latents}, file, {"cosmos3_fast": "0"})
    assert run("decode", file, "--vae", vae, "--out", tmp_path / "again") == 0
    assert "latents taken as normalized, as `prepare` writes them" in capsys.readouterr().out


def test_all_frames_become_a_video(vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    av = pytest.importorskip("av", reason="PyAV is not installed (the extra [video])")
    file, _ = latents_file(tmp_path)
    for suffix in (".mp4", ".webm", ".gif"):
        out = tmp_path / f"clip{suffix}"
        assert run("decode", file, "--vae", vae, "--out", out, "--fps", "12.5") == 0
        with av.open(str(out)) as container:
            assert sum(1 for _ in container.decode(video=0)) == 9
        assert f"{out}: 9 frames of 96x64 at 12.5 fps" in capsys.readouterr().out
    assert run("decode", file, "--vae", vae, "--out", tmp_path / "a.mp4", "--crf", 60) == 2
    assert "crf of .mp4 must be a number in [0, 51], got 60" in capsys.readouterr().err


def test_progress_counts_frames_on_a_terminal(
    vae: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(cli._Output, "isatty", lambda self: True)
    file, _ = latents_file(tmp_path)
    assert run("decode", file, "--vae", vae, "--out", tmp_path / "frames") == 0
    line = capsys.readouterr().err.splitlines()
    assert any("decoding 9 frames ... 1 of 9" in each for each in line)
    assert any(each.startswith("decoding 9 frames ... 9 of 9, ") for each in line)


def test_latents_of_a_dataset(vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    _, latents = latents_file(tmp_path)
    (tmp_path / "data" / "shards").mkdir(parents=True)
    shard = tmp_path / "data" / "shards" / "0a.safetensors"
    other = shard.with_name("00.safetensors")
    save_file({"k0": torch.zeros(2, 2, 2, 2)}, other, {"vae_hash": "0", "cosmos3_fast": "0"})
    samples = {"k1": latents[0].clone(), "k2": latents[0, :, :1].clone()}
    save_file(samples, shard, {"vae_hash": "0", "cosmos3_fast": "0"})
    for i, source in enumerate((shard, tmp_path / "data")):
        out = tmp_path / f"frames{i}"
        assert run("decode", source, "--key", "k1", "--vae", vae, "--out", out) == 0
        assert np.array_equal(pictures(out), clip_of(vae, latents))
        assert "normalized, as `encode` writes them" in capsys.readouterr().out
        picture = tmp_path / f"{i}.png"
        arguments = ("--key", "k1", "--vae", vae, "--out", picture, "--frame", 2)
        assert run("decode", source, *arguments) == 0
        wanted = FrameDecoder.from_pretrained(vae, dtype=torch.float32)(
            latents[:, :, 2:3], output="uint8"
        )
        assert np.array_equal(np.asarray(Image.open(picture)), wanted[0])
    capsys.readouterr()
    out = ("--vae", vae, "--out", tmp_path / "frames")
    for source, key, message in (
        (tmp_path / "data", (), "--key must say which sample of"),
        (tmp_path / "data", ("--key", "k9"), "--key must be one of the folder"),
        (shard, (), "has no tensor `latents`, but 2 others: --key takes one, such as `k1`, `k2`"),
        (tmp_path, (), "is no file, and no folder that `encode` wrote"),
    ):
        assert run("decode", source, *key, *out) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("clips", [False, True])
def test_the_vae_of_a_dataset_is_compared(
    vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], clips: bool
):
    own, shard = VaeSource(vae).fingerprint(clips), tmp_path / "0.safetensors"
    arguments = ("decode", shard, "--key", "k", "--vae", vae, "--out", tmp_path / "picture.png")
    # A clip's hash covers more of the VAE; a picture may be in a folder of clips.
    for frames in (1, 2):
        latents = torch.zeros(WAN22["z_dim"], frames, 2, 2)
        for known in (own, "0123456789abcdef"):
            save_file({"k": latents}, shard, {"vae_hash": known, "cosmos3_fast": "0"})
            assert run(*arguments) == 0
            warned = [li for li in capsys.readouterr().err.splitlines() if "WARNING" in li]
            assert len(warned) == (known != own)
    (line,) = warned
    assert "was encoded by a VAE with the hash 0123456789ab, " in line
    assert f"--vae '{vae}' has {VaeSource(vae).fingerprint()[:12]}: the frames may be wrong" in line


def test_a_decoder_alone_is_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_checkpoint(tmp_path / "vae", WAN22, synthetic_decoder_state_dict(WAN22))
    shard, out = tmp_path / "0.safetensors", tmp_path / "picture.png"
    save_file({"k": torch.zeros(WAN22["z_dim"], 1, 2, 2)}, shard, {"vae_hash": "0"})
    assert run("decode", shard, "--key", "k", "--vae", tmp_path, "--out", out) == 0
    assert "WARNING: --vae cannot be compared with the VAE that encoded" in capsys.readouterr().err


def test_latents_of_other_programs(vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    _, latents = latents_file(tmp_path)
    both = torch.cat([latents.flip(2), latents])
    mark = {"latent_format_version_0": torch.tensor([])}
    files = {
        "tensor.pt": (lambda path: torch.save(both, path), True, "by default"),
        "latents.pt": (lambda path: torch.save({"latents": both}, path), True, "by default"),
        "samples.pt": (lambda path: torch.save({"samples": both}, path), False, "as ComfyUI has"),
        "comfy.latent": (
            lambda path: save_file({"latent_tensor": both, **mark}, path),
            False,
            "on the VAE's own scale, as ComfyUI writes them",
        ),
    }
    wanted = {normalized: clip_of(vae, latents, normalized) for normalized in (True, False)}
    for name, (write, normalized, said) in files.items():
        write(tmp_path / name)
        for scale in (None, "normalized", "vae"):
            out = tmp_path / f"{name} {scale}".replace(".", " ")
            chosen = () if scale is None else ("--scale", scale)
            arguments = ("--sample", 1, "--vae", vae, "--out", out, *chosen)
            assert run("decode", tmp_path / name, *arguments) == 0
            told = capsys.readouterr().out
            assert "sample 1 of 2" in told
            assert (said if scale is None else "by --scale") in told
            given = normalized if scale is None else scale == "normalized"
            assert np.array_equal(pictures(out), wanted[given]), (name, scale)


def test_files_of_other_programs_that_hold_none(
    vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    _, latents = latents_file(tmp_path)
    out = ("--vae", vae, "--out", tmp_path / "frames")
    save_file({"latent_tensor": latents}, tmp_path / "old.latent")
    torch.save({"latents": [1]}, tmp_path / "list.pt")
    torch.save({"x": latents}, tmp_path / "x.pt")
    torch.save(latents[0], tmp_path / "four.pt")
    torch.save(Path("x"), tmp_path / "object.pt")
    (tmp_path / "broken.pt").write_bytes(b"PK")
    for name, message in (
        ("old.latent", "has an unknown scale, as no `latent_format_version_0` is with it"),
        ("list.pt", "must be a tensor, got list"),
        ("x.pt", "has no tensor `latents`, but 1 others: --key takes one, such as `x`"),
        ("four.pt", "must have shape [B, z, T, h, w], got [48, 3, 4, 6]"),
        ("object.pt", "cannot be read as a file of tensors: Weights only load failed"),
        ("broken.pt", "cannot be read as a file of tensors"),
    ):
        assert run("decode", tmp_path / name, *out) == 2, name
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    assert run("decode", tmp_path / "x.pt", "--key", "x", *out) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_latents_that_are_not_finite_make_no_video(
    vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], value: float
):
    file, latents = latents_file(tmp_path)
    latents[0, 3, 2, 2, 2] = value
    save_file({"latents": latents}, file)
    assert run("decode", file, "--vae", vae, "--out", tmp_path / "frames") == 2
    assert "latents must hold finite values, got NaN or infinity" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
