"""The command line: a round trip, its errors, and that a failure leaves nothing behind."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_files import write_checkpoint
from PIL import Image
from safetensors import safe_open

from cosmos3_fast.cli import main as cli
from cosmos3_fast.cli import prepare as cli_prepare
from cosmos3_fast.cli.info import format_info
from cosmos3_fast.images import preview
from cosmos3_fast.latents import LatentPreparation
from cosmos3_fast.vae import FrameEncoder, synthetic

PHOTOGRAPH = Path(__file__).parents[2] / "examples" / "falcon9_dscovr.jpg"
SMALL = {**synthetic.COSMOS3_VAE_CONFIG, "base_dim": 8, "decoder_base_dim": 8}


@pytest.fixture(autouse=True)
def _small_synthetic_vae(monkeypatch):
    monkeypatch.setattr(synthetic, "COSMOS3_VAE_CONFIG", SMALL)


@pytest.fixture
def run(capsys):
    def call(*argv):
        status = cli.main([str(each) for each in argv])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def prepare_args(tmp_path, *more):
    return (
        *("prepare", PHOTOGRAPH, "--size", "64x96", "--num-frames", 17),
        *("--out", tmp_path / "latents.safetensors", *more),
    )


def read(path):
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def last_line(text):
    return text.strip().splitlines()[-1]


def test_prepare_round_trip(run, tmp_path):
    args = prepare_args(tmp_path, "--seed", 7, "--preview", tmp_path / "preview.png")
    status, out, err = run(*args)
    assert status == 0
    assert "RANDOM weights" in err
    assert "fast mode" in out
    tensors, metadata = read(tmp_path / "latents.safetensors")
    assert metadata["image"] == "falcon9_dscovr.jpg"
    assert metadata["vae"] == "synthetic (random weights, seed 0)"
    expected = {
        "height": "64",
        "width": "96",
        "num_frames": "17",
        "condition_frames": "0",
        "seed": "7",
        "dtype": "bfloat16",
        "mode": "fast",
        "vae_dtype": "float32",
        "device": "cpu",
        "torch": torch.__version__,
    }
    assert expected.items() <= metadata.items()
    assert metadata["cosmos3_fast"]
    assert str(tmp_path) not in "".join(metadata.values())

    config = synthetic.synthetic_config(SMALL, 0)
    encoder = FrameEncoder.from_state_dict(
        synthetic.synthetic_state_dict(config, 0), config, torch.float32
    )
    prepared = LatentPreparation(encoder)(PHOTOGRAPH, 17, 64, 96, seed=7)
    assert set(tensors) == {"latents", "velocity_mask", "condition_latents"}
    for name, tensor in tensors.items():
        assert torch.equal(tensor, getattr(prepared, name))
    with Image.open(tmp_path / "preview.png") as picture:
        assert picture.format == "PNG"
        assert picture.mode == "RGB"
        assert picture.width == preview.WIDTH
        assert 400 < picture.height < 2000
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "latents.safetensors",
        "preview.png",
    ]


def test_prepare_is_reproducible(run, tmp_path):
    contents = []
    for _ in range(2):
        assert run(*prepare_args(tmp_path))[0] == 0
        contents.append(read(tmp_path / "latents.safetensors"))
    (first, metadata), (again, same) = contents
    assert metadata == same
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "float16"])
def test_prepare_dtypes(run, tmp_path, dtype):
    assert run(*prepare_args(tmp_path, "--dtype", dtype))[0] == 0
    tensors, metadata = read(tmp_path / "latents.safetensors")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"torch." + metadata["dtype"]}


def test_prepare_exact_and_later_frames(run, tmp_path):
    pytest.importorskip("diffusers")
    for frames, count in (("0,1", 2), ("0", 1)):
        args = prepare_args(tmp_path, "--condition-frames", frames, "--dtype", "fp32")
        results = {}
        for mode in ("exact", "fast"):
            assert run(*args, "--mode", mode)[0] == 0
            results[mode], metadata = read(tmp_path / "latents.safetensors")
            assert metadata["mode"] == mode
            assert metadata["condition_frames"] == frames
        assert results["fast"]["condition_latents"].shape == (1, 48, count, 4, 6)
        for name, tensor in results["exact"].items():
            torch.testing.assert_close(results["fast"][name], tensor, rtol=0, atol=1e-4)
    assert run(*prepare_args(tmp_path, "--condition-frames", "1"))[0] == 0
    assert read(tmp_path / "latents.safetensors")[1]["mode"] == "fast"


@pytest.mark.parametrize("layout", ["vae", "."])
def test_a_checkpoint_folder(run, tmp_path, layout):
    pytest.importorskip("diffusers")
    checkpoint = tmp_path / "checkpoint"
    synthetic.synthetic_vae(SMALL, 5, 8).save_pretrained(checkpoint / layout)
    for mode in ("fast", "exact"):
        status, _, err = run(*prepare_args(tmp_path, "--vae", checkpoint, "--mode", mode))
        assert status == 0
        assert "RANDOM" not in err
        assert read(tmp_path / "latents.safetensors")[1]["vae"] == str(checkpoint)
    status, out, _ = run("verify", "--vae", checkpoint, "--size", "32x48", "--dtypes", "fp32")
    assert status == 0
    assert "float32" in out


def test_a_truncated_checkpoint(run, tmp_path):
    config = synthetic.synthetic_config(SMALL, 0)
    folder = tmp_path / "checkpoint" / "vae"
    write_checkpoint(folder, config, synthetic.synthetic_state_dict(config, 0))
    weights = next(folder.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    status, _, err = run(*prepare_args(tmp_path, "--vae", tmp_path / "checkpoint"))
    assert status == 2
    assert last_line(err).startswith("error: ")
    assert weights.name in last_line(err)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--size", "480"), "must be HEIGHTxWIDTH such as 480x832, got '480'"),
        (("--size", "72x96"), "height must be a multiple of the VAE's spatial factor 16, got 72"),
        (("--size", "0x96"), "height must be a positive integer, got 0"),
        (("--num-frames", "0"), "num_frames must be a positive integer, got 0"),
        (("--num-frames", "x"), "--num-frames: invalid int value: 'x'"),
        (("--seed", str(2**64)), "--seed: must be an integer in [-2^63, 2^64), got"),
        (("--seed", "1.5"), "--seed: must be an integer, got '1.5'"),
        (("--dtype", "int8"), "must be one of float32, bfloat16, float16, got 'int8'"),
        (("--condition-frames", "a"), "must be integers such as 0,1, got 'a'"),
        (("--condition-frames", "0,0"), "condition_frames must be distinct, got [0, 0]"),
        (("--condition-frames", "0,5"), "condition_frames must be in [0, 5)"),
        (("--mode", "quick"), "--mode: invalid choice: 'quick'"),
        (("--device", "abacus"), "'abacus' cannot be used"),
        (("--vae", "no/such/folder/anywhere"), "no/such/folder/anywhere"),
        (("--preview", "picture.jpg"), "--preview must end in .png"),
        (("--preview", "no/such/folder/p.png"), "--preview 'no/such/folder/p.png': the folder"),
        (("--frobnicate",), "unrecognized arguments: --frobnicate"),
    ],
)
def test_prepare_errors(run, tmp_path, more, message):
    status, out, err = run(*prepare_args(tmp_path, *more))
    assert status == 2
    assert out == ""
    assert "Traceback" not in err
    assert last_line(err).startswith("error: ")
    assert message in last_line(err)
    assert list(tmp_path.iterdir()) == []


def test_image_errors(run, tmp_path):
    truncated = tmp_path / "cut.jpg"
    truncated.write_bytes(PHOTOGRAPH.read_bytes()[:5000])
    for image, message in (
        (tmp_path / "none.jpg", "does not exist"),
        (truncated, "cannot be read"),
    ):
        status, _, err = run("prepare", image, "--out", tmp_path / "latents.safetensors")
        assert status == 2
        assert message in last_line(err)
    assert [path.name for path in tmp_path.iterdir()] == ["cut.jpg"]


def test_out_errors(run, tmp_path):
    for out, message in ((tmp_path, "is a folder"), (tmp_path / "a" / "b", "does not exist")):
        status, _, err = run("prepare", PHOTOGRAPH, "--out", out)
        assert status == 2
        assert f"--out '{out}'" in last_line(err)
        assert message in last_line(err)
    same = tmp_path / "same.png"
    status, _, err = run("prepare", PHOTOGRAPH, "--out", same, "--preview", same)
    assert status == 2
    assert "are the same file" in last_line(err)


@pytest.mark.parametrize("fault", [OSError("disk full"), RuntimeError("boom"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["save", "preview"])
def test_a_failure_while_writing_keeps_the_old_files(run, tmp_path, monkeypatch, fault, where):
    target, picture = tmp_path / "latents.safetensors", tmp_path / "preview.png"
    target.write_bytes(b"old latents")
    picture.write_bytes(b"old picture")

    def fail(*args, **kwargs):
        if where == "save":
            Path(args[1]).write_bytes(b"half")
        raise fault

    if where == "save":
        monkeypatch.setattr(cli_prepare, "save_file", fail)
    else:
        monkeypatch.setattr(cli_prepare, "render_preview", fail)
    status, _, err = run(*prepare_args(tmp_path, "--preview", picture))
    assert status == (130 if isinstance(fault, KeyboardInterrupt) else 2)
    assert last_line(err).startswith("error: ")
    assert target.read_bytes() == b"old latents"
    assert picture.read_bytes() == b"old picture"
    assert len(list(tmp_path.iterdir())) == 2


def test_verify(run):
    pytest.importorskip("diffusers")
    status, out, err = run("verify", "--size", "64x96", "--dtypes", "fp32,bf16,fp16")
    assert status == 0, out
    assert "RANDOM weights" in err
    rows = {tuple(line.split()[:2]): line for line in out.splitlines()[2:8]}
    dtypes = ("float32", "bfloat16", "float16")
    assert set(rows) == {(part, dtype) for part in ("encoder", "decoder") for dtype in dtypes}
    assert all(line.endswith("ok") for line in rows.values())
    assert [line.split(":")[0] for line in out.splitlines()[8:]] == [
        f"round trip in {dtype}" for dtype in dtypes
    ]
    assert all("PSNR" in line for line in out.splitlines()[8:])
    # Not smaller: on six latent cells of so narrow a network, some seeds round worse than the VAE.
    status, out, err = run("verify", "--size", "64x96")
    assert status == 0, out
    assert "float16 is left out" in err


def test_verify_of_a_clip(run):
    args = ("verify", "--size", "32x48", "--dtypes", "fp32,bf16", "--frames")
    status, out, err = run(*args, "5")
    assert status == 0, out + err
    assert out.count("of changes by frame") == 2
    assert "round trip in bfloat16: PSNR" in out
    status, _, err = run(*args, "4")
    assert (status, err.splitlines()[-1]) == (2, "error: --frames must be 1 + 4k, got 4")


def test_verify_fails_out_of_bounds(run, monkeypatch):
    pytest.importorskip("diffusers")
    forward = FrameEncoder.forward
    monkeypatch.setattr(FrameEncoder, "forward", lambda self, pixels: forward(self, pixels) * 1.001)
    original = FrameEncoder.from_vae
    monkeypatch.setattr(
        FrameEncoder, "from_vae", lambda vae, dtype: original(vae, dtype, probe=False)
    )
    status, out, _ = run("verify", "--size", "32x48", "--dtypes", "fp32")
    assert status == 1
    assert "OUT OF BOUNDS" in out


def test_verify_on_a_photograph_and_its_errors(run):
    pytest.importorskip("diffusers")
    args = ("verify", "--dtypes", "bf16", "--size")
    assert run(*args, "32x48", "--image", PHOTOGRAPH)[0] == 0
    status, _, err = run(*args, "40x48")
    assert status == 2
    assert "multiples of 16, got 40x48" in last_line(err)


def test_without_diffusers(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    for args in (("verify", "--size", "32x48"), prepare_args(tmp_path, "--mode", "exact")):
        status, _, err = run(*args)
        assert status == 2
        assert "needs diffusers" in last_line(err)
    assert run(*prepare_args(tmp_path))[0] == 0


def test_info(run):
    status, out, _ = run("info")
    assert status == 0
    assert out.strip() == format_info().strip()


def test_help_and_no_command(run):
    status, out, _ = run("prepare", "--help")
    assert status == 0
    assert "--condition-frames" in out
    status, _, err = run()
    assert status == 2
    assert last_line(err).startswith("error: ")


def test_as_a_module():
    result = subprocess.run(
        [sys.executable, "-m", "cosmos3_fast", "prepare"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: the following arguments are required: IMAGE, --out")


@pytest.mark.parametrize("num_frames", [1, 81, 189, 500])
def test_preview_of_any_length(num_frames):
    frames = (num_frames - 1) // 4 + 1
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, frames, 4, 6, generator=generator)
    prepared = preview.PreparedLatents(
        latents, torch.ones(1, 1, frames, 1, 1), latents[:, :, :1], (frames - 1,), "exact"
    )
    pixels = torch.zeros(1, 3, 5, 64, 96)
    picture = preview.render_preview(pixels, prepared, title="title", notes=("a", "b"))
    assert picture.width == preview.WIDTH
    again = preview.render_preview(pixels, prepared, title="title", notes=("a", "b"))
    assert picture.tobytes() == again.tobytes()


def test_preview_of_constant_and_of_broken_latents():
    for latents in (torch.zeros(1, 4, 2, 2, 3), torch.full((1, 4, 2, 2, 3), torch.nan)):
        prepared = preview.PreparedLatents(
            latents, torch.ones(1, 1, 2, 1, 1), latents[:, :, :1], (0,), "fast"
        )
        preview.render_preview(torch.zeros(1, 3, 32, 48), prepared, title="title")
