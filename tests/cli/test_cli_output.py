"""Where `prepare` writes: what it refuses, what it keeps, and that nothing is left behind."""

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from cosmos3_fast.cli import main as cli
from cosmos3_fast.files import TargetError, check_target, replacing
from cosmos3_fast.vae import synthetic

SMALL = {**synthetic.COSMOS3_VAE_CONFIG, "base_dim": 8}


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(synthetic, "COSMOS3_VAE_CONFIG", SMALL)
    Image.effect_noise((96, 64), 60).convert("RGB").save(tmp_path / "photo.png")

    def call(out, *more, image=tmp_path / "photo.png"):
        size = ("--size", "64x96", "--num-frames", "5")
        argv = ["prepare", os.fspath(image), *size, "--out", os.fspath(out), *map(str, more)]
        status = cli.main(argv)
        return status, capsys.readouterr().err.strip().splitlines()[-1]

    return call


def test_only_regular_files_are_replaced(run, tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for out in ("/dev/null", fifo, loop):
        status, error = run(out)
        assert status == 2
        assert error.startswith(f"error: --out {os.fspath(out)!r} ")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert stat.S_ISFIFO(fifo.stat().st_mode)


def test_inputs_and_read_only_files_stay(run, tmp_path):
    photo = tmp_path / "photo.png"
    before = photo.read_bytes()
    link = tmp_path / "link"
    link.symlink_to(photo)
    for out in (photo, link):
        status, error = run(out)
        assert (status, "is an input" in error) == (2, True)
    assert photo.read_bytes() == before
    (tmp_path / "vae").mkdir()
    weights = tmp_path / "vae" / "weights.safetensors"
    weights.write_bytes(b"weights")
    status, error = run(weights, "--vae", tmp_path / "vae")
    assert (status, "is an input" in error) == (2, True)
    kept = tmp_path / "kept"
    kept.write_bytes(b"kept")
    kept.chmod(0o444)
    status, error = run(kept)
    assert (status, "is read-only" in error) == (2, True)
    assert kept.read_bytes() == b"kept"


def test_modes_and_symlinks(run, tmp_path):
    before = os.umask(0o027)
    try:
        assert run(tmp_path / "new")[0] == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640
    (tmp_path / "new").chmod(0o604)
    link = tmp_path / "link"
    link.symlink_to("new")
    assert run(link)[0] == 0
    assert link.is_symlink()
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o604
    dangling = tmp_path / "dangling"
    dangling.symlink_to("made")
    assert run(dangling)[0] == 0
    assert (tmp_path / "made").is_file()


def test_writers_do_not_collide(tmp_path):
    target = tmp_path / "out"
    with replacing(target) as one:
        one.write_text("one")
        with replacing(target) as two:
            two.write_text("two")
        assert target.read_text() == "two"
    assert target.read_text() == "one"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_leave_nothing_behind(number, tmp_path):
    script = """
import signal, sys, time
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup leaves it ignored
from pathlib import Path
from cosmos3_fast import files
from cosmos3_fast.cli import main as cli
def run(args):
    with files.replacing(Path(sys.argv[1])) as partial:
        partial.write_text("half")
        print("ready", flush=True)
        time.sleep(60)
parse = cli._Parser.parse_args
cli._Parser.parse_args = lambda self, argv: type("Args", (), {"run": staticmethod(run)})
sys.exit(cli.main([]))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path / "out"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert error == f"error: stopped by {number.name}\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--num-frames", 10**30), "num_frames must be below 2^31"),
        (("--num-frames", 2_000_000_001), "GB of memory, this machine has"),
        (("--size", f"{10**30}x96"), "height must be below 2^31"),
        (("--size", "160000000x160000000"), "GB of memory, this machine has"),
        (("--condition-frames", 10**30), "condition_frames must be in [0, 2)"),
        (("--background", "no color"), "background must be a color"),
    ],
)
def test_what_cannot_be_is_said_before_the_weights_are_loaded(
    run, tmp_path, monkeypatch, more, message
):
    monkeypatch.setattr(synthetic, "synthetic_state_dict", None)
    status, error = run(tmp_path / "out", *more)
    assert status == 2
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "out").exists()


def test_names_that_are_not_utf8(run, tmp_path):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")
    (tmp_path / "photo.png").rename(name)
    assert run(tmp_path / "out", image=name)[0] == 0
    with safe_open(tmp_path / "out", "pt") as file:
        assert file.metadata()["image"] == r"\xff.png"
    status, error = run(name + ".out", image=name)
    assert (status, "must be a name in UTF-8" in error) == (2, True)
    with pytest.raises(TargetError, match="UTF-8"):
        check_target(name, "--out")


def test_latents_that_are_not_finite_are_not_written(run, tmp_path, monkeypatch):
    from cosmos3_fast.vae import FrameEncoder

    monkeypatch.setattr(
        FrameEncoder, "forward", lambda self, pixels: torch.full((1, 48, 1, 4, 6), torch.inf)
    )
    status, error = run(tmp_path / "out")
    assert status == 2
    assert "hold NaN or infinite values, and are not written" in error
    assert not (tmp_path / "out").exists()


def test_an_animation_is_a_clip(run, tmp_path):
    frames = [Image.effect_noise((96, 64), 40).convert("RGB") for _ in range(6)]
    frames[0].save(tmp_path / "a.tiff", save_all=True, append_images=frames[1:])
    results = []
    for keep in ("first", "last"):
        arguments = ("--condition-frames", "0,1", "--keep", keep, "--dtype", "fp32")
        assert run(tmp_path / keep, *arguments, image=tmp_path / "a.tiff")[0] == 0
        with safe_open(tmp_path / keep, "pt") as file:
            results.append(file.get_tensor("condition_latents"))
    assert results[0].shape == (1, 48, 2, 4, 6)
    assert not torch.equal(*results)


def test_warnings_take_one_line(capsys, run, tmp_path):
    Image.new("RGBA", (96, 64), (1, 2, 3, 0)).save(tmp_path / "clear.png")
    argv = ["prepare", str(tmp_path / "clear.png"), "--size", "64x96", "--num-frames", "5"]
    assert cli.main([*argv, "--out", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "warning: image" in line and "transparent pixels" in line]
    assert not [line for line in lines if "UserWarning" in line]


def command(tmp_path: Path, *prefix: str) -> list[str]:
    """`prepare` with a VAE that costs nothing, of a picture with a name that is not ASCII."""
    script = (
        "import sys\n"
        "from cosmos3_fast.cli import main as cli\n"
        "from cosmos3_fast.vae import synthetic\n"
        "synthetic.COSMOS3_VAE_CONFIG = {**synthetic.COSMOS3_VAE_CONFIG, 'base_dim': 8}\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    Image.effect_noise((96, 64), 60).convert("RGB").save(tmp_path / "Größe.png")
    size = ("--size", "64x96", "--num-frames", "5", "--out", str(tmp_path / "Größe.safetensors"))
    return [*prefix, sys.executable, "-c", script, "prepare", str(tmp_path / "Größe.png"), *size]


ROOT = Path(__file__).parents[2]


def test_the_status_is_that_of_the_work_whatever_stdout_is(tmp_path):
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    result = subprocess.run(
        command(tmp_path), cwd=ROOT, env=ascii_only, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert r"Gr\xf6\xdfe.safetensors: fast mode" in result.stdout
    for closing in ("{ sleep 0; }", "true"):
        pipe = f'set -o pipefail; "$@" 2>&1 | {closing}; exit ${{PIPESTATUS[0]}}'
        result = subprocess.run(
            command(tmp_path, "bash", "-c", pipe, "-"), cwd=ROOT, capture_output=True, check=False
        )
        assert result.returncode == 0, result.stderr
    for closing in (">&-", "2>&-", ">/dev/full"):
        result = subprocess.run(
            command(tmp_path, "bash", "-c", f'"$@" {closing}', "-"),
            cwd=ROOT,
            capture_output=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "Größe.safetensors").exists()


def test_a_signal_ends_an_operation_that_does_not_answer(tmp_path):
    script = """
import signal, sys, threading
from pathlib import Path
from cosmos3_fast import files
from cosmos3_fast.cli import main as cli
cli._PATIENCE = 0.5
def run(args):
    with files.replacing(Path(sys.argv[1])) as partial:
        partial.write_text("half")
        # As one operation of torch: Python's handlers wait for its end.
        print("ready", flush=True)
        import torch
        a = torch.rand(6000, 6000, dtype=torch.float64)
        torch.linalg.svd(a)
cli._Parser.parse_args = lambda self, argv: type("Args", (), {"run": staticmethod(run)})
sys.exit(cli.main([]))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path / "out"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(3)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert error.endswith("error: stopped by SIGTERM\n")
    assert list(tmp_path.iterdir()) == []


def test_a_child_s_signals_are_not_its_parent_s(tmp_path):
    script = """
import os, signal, sys, time
from cosmos3_fast.cli import main as cli
cli._PATIENCE = 0.2
def run(args):
    child = os.fork()
    if not child:
        try:
            time.sleep(30)
        finally:
            os._exit(0)
    time.sleep(0.2)
    os.kill(child, signal.SIGTERM)
    os.waitpid(child, 0)
    time.sleep(1)
    print("done")
    return 0
cli._Parser.parse_args = lambda self, argv: type("Args", (), {"run": staticmethod(run)})
sys.exit(cli.main([]))
"""
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout) == (0, "done\n"), result.stderr


def test_a_child_that_lives_on_is_not_waited_for(tmp_path):
    script = """
import os, sys, time
from cosmos3_fast.cli import main as cli
def run(args):
    parent = os.getpid()
    if not os.fork():
        while os.getppid() == parent:
            time.sleep(0.1)
        os._exit(0)
    return 0
cli._Parser.parse_args = lambda self, argv: type("Args", (), {"run": staticmethod(run)})
sys.exit(cli.main([]))
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=60, check=False)
    assert result.returncode == 0
