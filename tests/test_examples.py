"""The encoder and the op in one compiled graph, and as an exported program (the example)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import compile_graph
import pytest
import torch
from torch._dynamo.testing import CompileCounter

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def model() -> compile_graph.ConditionedLatents:
    return compile_graph.narrow_model()


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def assert_conditioned(model, pixels, noise, got) -> None:
    latents, velocity_mask = got
    assert latents.shape == noise.shape
    # Inductor may order sums otherwise than eager convolutions and norms do.
    torch.testing.assert_close(latents[:, :, :1], model.encoder(pixels), rtol=1e-4, atol=1e-5)
    assert torch.equal(latents[:, :, 1:], noise[:, :, 1:])
    assert velocity_mask.flatten().tolist() == [0.0] + [1.0] * (noise.shape[2] - 1)


@torch.no_grad()
def test_one_graph_serves_every_size(model: compile_graph.ConditionedLatents):
    counter = CompileCounter()
    counted = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    # torch's own conv2d compiles small images apart; these are large for it at every depth.
    for height, width, frames in [(288, 304, 17), (320, 288, 29), (304, 352, 81)]:
        pixels, noise = compile_graph.inputs(height, width, frames)
        assert_conditioned(model, pixels, noise, counted(pixels, noise))
    assert counter.frame_count == 1
    assert counter.op_count > 10


@torch.no_grad()
def test_inductor(model: compile_graph.ConditionedLatents):
    pixels, noise = compile_graph.inputs(48, 64)
    compiled = torch.compile(model, fullgraph=True)
    assert_conditioned(model, pixels, noise, compiled(pixels, noise))


@torch.no_grad()
def test_exported_saved_loaded(model: compile_graph.ConditionedLatents, tmp_path: Path):
    example = compile_graph.inputs(48, 64)
    loaded = compile_graph.export_and_load(model, example, tmp_path / "model.pt2")
    for frames in (17, 81):
        pixels, noise = compile_graph.inputs(48, 64, frames)
        assert_conditioned(model, pixels, noise, loaded(pixels, noise))


def test_the_example_runs():
    run = subprocess.run(
        [sys.executable, EXAMPLES / "compile_graph.py", "--height", "32", "--width", "48"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "compiled, one graph: latents [1, 48, 5, 2, 3]" in run.stdout
    assert "exported, saved, loaded, run on 81 frames" in run.stdout
