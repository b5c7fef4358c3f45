"""The root of the package: what its import loads, and that each public name is found."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import cosmos3_fast

ROOT = Path(__file__).parents[1]


def loaded(statement: str) -> set[str]:
    """The modules that are loaded after a statement in a new process."""
    code = f"import sys; {statement}; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(result.stdout.split())


@pytest.mark.parametrize("module", ["cosmos3_fast", "cosmos3_fast.ops"])
def test_ops_come_alone(module: str):
    modules = loaded(f"import {module}")
    parts = {name.split(".")[1] for name in modules if name.startswith("cosmos3_fast.")}
    assert not parts & {"engines", "images", "latents", "vae", "bulk", "cli"}
    assert not modules & {"PIL", "safetensors", "diffusers"}


def test_the_networks_need_torch_alone():
    modules = loaded("import cosmos3_fast.vae")
    assert not modules & {"PIL", "safetensors", "diffusers", "cosmos3_fast.images"}


@pytest.mark.parametrize("name", cosmos3_fast.__all__)
def test_public_names_are_found(name: str):
    value = getattr(cosmos3_fast, name)
    assert callable(value)
    assert name in dir(cosmos3_fast)
    assert value.__module__.startswith("cosmos3_fast.")


def test_all_names_are_imported_with_a_star():
    modules = loaded("from cosmos3_fast import *; assert LatentPreparation and accelerate")
    assert "cosmos3_fast.latents" in modules


def test_modules_are_attributes_and_others_are_not():
    assert "cosmos3_fast.vae.verify" in loaded(
        "import cosmos3_fast; cosmos3_fast.vae.FrameEncoder; import cosmos3_fast.vae.verify"
    )
    with pytest.raises(AttributeError, match="'cosmos3_fast' has no attribute 'frobnicate'"):
        cosmos3_fast.frobnicate  # noqa: B018


def test_no_module_hides_a_name():
    modules = {path.stem for path in (ROOT / "cosmos3_fast").iterdir()}
    assert not modules & set(cosmos3_fast.__all__)
