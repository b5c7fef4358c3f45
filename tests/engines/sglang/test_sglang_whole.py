"""SGLang from a model folder to a video, with its workers and with this package as their plugin.

The model is Cosmos3 with random weights and a hundred thousand times smaller; `DiffGenerator` and
the command `sglang generate` find this package by its entry point alone.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import numpy as np
import pytest
import sglang_engine
import sglang_runs
import tiny_pipeline
import torch
from PIL import Image

import cosmos3_fast

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        sglang_engine.RELEASE < (0, 5, 23),
        reason="the servers of older releases need other packages",
    ),
]

PIXELS, FRAMES = 64, 9
# In every process of SGLang's, before torchvision is imported; `sglang_engine` says why.
SITECUSTOMIZE = """
import importlib.abc
import sys


class BeforeTorchvision(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = library = torch.library.Library("torchvision", "DEF")
            library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            sys.torchvision_schemas = library


sys.meta_path.insert(0, BeforeTorchvision())
"""
ARGUMENTS = {"attention_backend": "torch_sdpa"}
# What of the VAE's own code a request runs: pixel frames encoded, latent frames decoded. "file"
# asks for what "i2v" did, whose picture SGLang's cache still has.
OWN = {
    "plain": {"i2v": (1, 3), "file": (0, 3), "v2v": (9, 3), "t2i": (0, 1), "transfer": (18, 3)},
    "exact": {"i2v": (1, 3), "file": (0, 3), "v2v": (5, 3), "t2i": (0, 1), "transfer": (18, 3)},
    "fast": {"i2v": (0, 3), "file": (0, 3), "v2v": (5, 3), "t2i": (0, 0), "transfer": (18, 3)},
    "fast,clips": {"i2v": (0, 0), "file": (0, 0), "v2v": (0, 0), "t2i": (0, 0), "transfer": (0, 0)},
}
# Those whose frames are compared.
REQUESTS = ["i2v", "v2v", "t2i", "transfer"]
# "i2v" of other pictures: of one, 16 bits of theirs may be near by chance.
PICTURES = {f"i2v {n}": n for n in range(1, 4)}


def environment(mode: str) -> dict[str, str]:
    """Of a worker; "plain" is SGLang without this package."""
    if mode == "plain":
        return {"SGLANG_PLUGINS": "count"}
    return {"COSMOS3_FAST": mode}


def run(command: list[str], folder: Path, timeout: float = 900, **variables: str) -> str:
    """Its output. Nothing that it starts outlives it."""
    paths = [str(folder / "site"), str(Path(sglang_runs.__file__).parent)]
    paths += [path for path in [os.environ.get("PYTHONPATH")] if path]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("COSMOS3_FAST")}
    log = folder / "log.txt"
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={
                **inherited,
                **variables,
                "PYTHONPATH": os.pathsep.join(paths),
                "SGLANG_DISABLE_COSMOS3_GUARDRAILS": "1",
                "OMP_NUM_THREADS": "1",
                sglang_runs.CALLS: str(folder / "calls.jsonl"),
            },
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(timeout)
            is_alone = ends(process.pid, timeout=30)
        finally:
            if not ends(process.pid, timeout=0):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert status == 0, log.read_text()[-5000:]
    assert is_alone, "a worker outlived what started it"
    return log.read_text()


def ends(group: int, timeout: float) -> bool:
    """Whether the last process of a group ends in so many seconds."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, a picture, a video, and what Python finds first in SGLang's processes."""
    folder = tmp_path_factory.mktemp("whole")
    pipe = tiny_pipeline.make_pipe(torch.bfloat16, z_dim=48)
    pipe.save_pretrained(folder / "model")
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, (FRAMES, PIXELS, PIXELS + 32, 3), dtype=np.uint8)
    Image.fromarray(noise[0]).save(folder / "image.png")
    for n in PICTURES.values():
        Image.fromarray(noise[n]).save(folder / f"image {n}.png")
    imageio.imwrite(folder / "video.mp4", noise, fps=24, plugin="pyav", codec="libx264")
    site = folder / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SITECUSTOMIZE)
    sglang_engine.write_metadata(site, count="sglang_runs:register")
    return folder


def requests(folder: Path) -> dict[str, dict[str, Any]]:
    common = {"prompt": "a street", "height": PIXELS, "width": PIXELS, "num_frames": FRAMES}
    common |= {"num_inference_steps": 2, "seed": 3, "save_output": False, "return_frames": True}
    image, video = str(folder / "image.png"), str(folder / "video.mp4")
    return {
        "i2v": {**common, "image_path": image},
        "file": {**common, "image_path": image, "save_output": True, "return_frames": False},
        "v2v": {**common, "video_path": video},
        "t2i": {**common, "num_frames": 1},
        "transfer": {**common, "control_path": video, "num_video_frames_per_chunk": FRAMES},
    } | {
        name: {**common, "image_path": str(folder / f"image {n}.png"), "seed": 3 + n}
        for name, n in PICTURES.items()
    }  # fmt: skip


@pytest.fixture(scope="module")
def results(folder) -> dict[str, dict[str, tuple[np.ndarray, dict[str, Any]]]]:
    """By run and request: the frames, if they are not saved, and what of the VAE's own code ran."""
    runs = {
        mode: {"environment": environment(mode), "arguments": ARGUMENTS} for mode in OWN
    } | {
        f"{mode} in float32": {
            "environment": environment(mode),
            "arguments": {**ARGUMENTS, "vae_precision": "fp32"},
        }
        for mode in ("plain", "fast,clips")
    }  # fmt: skip
    told = {"model": str(folder / "model"), "runs": runs, "requests": requests(folder)}
    (folder / "runs.json").write_text(json.dumps(told))
    run([sys.executable, sglang_runs.__file__, str(folder)], folder)
    found = {}
    for name in runs:
        frames = np.load(folder / f"{name}.npz")
        counts = json.loads((folder / f"{name}.json").read_text())
        found[name] = {request: (frames.get(request), counts[request]) for request in counts}
    return found


def difference(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """In levels of 255."""
    return np.abs(ours.astype(np.float64) - theirs.astype(np.float64))


def rms(levels: np.ndarray) -> float:
    return float(np.sqrt((levels**2).mean()))


@pytest.mark.parametrize("mode", OWN)
def test_what_of_the_vae_runs(results, mode):
    found = {
        request: (counts["encoder"], counts["decoder"])
        for request, (_, counts) in results[mode].items()
    }
    assert found == OWN[mode] | dict.fromkeys(PICTURES, OWN[mode]["i2v"])
    # The workers have imported what is tested here.
    assert results[mode]["i2v"][1]["package"] == cosmos3_fast.__file__


@pytest.mark.parametrize("request_", REQUESTS)
def test_exact_mode_gives_every_byte(results, request_):
    plain = results["plain"][request_][0]
    assert plain.shape == (1 if request_ == "t2i" else FRAMES, PIXELS, PIXELS, 3)
    assert np.array_equal(results["exact"][request_][0], plain)


@pytest.mark.parametrize("mode", ["fast", "fast,clips"])
@pytest.mark.parametrize("request_", REQUESTS)
def test_fast_mode_is_no_further_from_float32_than_sglang(results, mode, request_):
    """Of a bfloat16 VAE; the latents are denoised in bfloat16 in all of them.

    In fast mode SGLang's own VAE decodes the clip of a picture, and its rounding is what differs,
    up or down: 0.97 to 1.003 by picture, 0.991 of four together, with a standard deviation of
    0.007. What encoding alone adds is compared in `test_fast.py`.
    """
    names = [request_, *(PICTURES if request_ == "i2v" else [])]
    precise, plain, ours = (
        np.stack([results[run][name][0] for name in names])
        for run in ("plain in float32", "plain", mode)
    )
    own = difference(plain, precise)
    assert np.array_equal(ours, plain) == (OWN[mode][request_] in [OWN["exact"][request_]])
    scatter = 1.02 if (mode, request_) == ("fast", "i2v") else 1
    assert rms(difference(ours, precise)) <= scatter * rms(own)
    # By pixel, with the level that rounding to bytes adds to either.
    assert difference(ours, precise).max() <= own.max() + 1


@pytest.mark.parametrize("request_", REQUESTS)
def test_fast_mode_in_float32_is_within_a_level(results, request_):
    ours, counts = results["fast,clips in float32"][request_]
    assert (counts["encoder"], counts["decoder"]) == (0, 0)
    assert difference(ours, results["plain in float32"][request_][0]).max() <= 1


@pytest.mark.parametrize("mode", ["exact", "fast,clips"])
def test_the_command_writes_the_same_file(folder, results, mode):
    asked = requests(folder)["file"]
    words = [str(Path(sys.executable).with_name("sglang")), "generate"]
    words += ["--model-path", str(folder / "model"), "--attention-backend", "torch_sdpa"]
    for name in ("prompt", "height", "width", "num_frames", "num_inference_steps", "seed"):
        words += [f"--{name.replace('_', '-')}", str(asked[name])]
    words += ["--image-path", asked["image_path"], "--output-path", str(folder / "command" / mode)]
    log = run([*words, "--output-file-name", "file.mp4"], folder, **environment(mode))
    counts = sglang_runs.counted(folder / "calls.jsonl", PIXELS)
    assert (counts["encoder"], counts["decoder"]) == OWN[mode]["i2v"]
    path = "whole" if mode == "exact" else "fast"
    assert f"cosmos3_fast ({path}) encoded 1 of 1 pixel frames" in log
    written = (folder / "command" / mode / "file.mp4").read_bytes()
    assert written == (folder / {"exact": "plain"}.get(mode, mode) / "file.mp4").read_bytes()
