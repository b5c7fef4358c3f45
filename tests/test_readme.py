"""What README says of versions is what the test environments install."""

from __future__ import annotations

import re
from pathlib import Path

import cosmos3_fast.ops  # noqa: F401 - registers them
from cosmos3_fast.engines.releases import TESTED
from cosmos3_fast.ops import registry

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def pinned(engine: str, package: str) -> str:
    folder = ROOT / "tests" / "engines" / engine
    for name in ("requirements-nodeps.txt", "requirements.txt"):
        file = folder / name
        if file.exists() and (found := re.search(rf"^{package}==(\S+)", file.read_text(), re.M)):
            return found.group(1)
    raise AssertionError(f"{folder} does not pin {package}")


def test_versions_are_those_the_engine_tests_install():
    torch_version = re.search(r"^TORCH \?= torch==(\S+)", (ROOT / "Makefile").read_text(), re.M)
    assert torch_version is not None
    for engine, tested in TESTED.items():
        newest = pinned(engine.replace("-", "_"), engine)
        others = ", ".join(version for version in tested if version != newest)
        row = f"| {engine} | {newest} | {others} | {torch_version[1]} | `make test-{engine}` |"
        assert row in README
        assert newest in tested


def test_every_schema_of_the_latent_op_is_shown():
    for schema in (each for each in registry.SCHEMAS if each.startswith("prepare_latents")):
        assert f"cosmos3::{schema}" in README


def test_files_and_targets_it_names_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"\bmake ([a-z][a-z-]*)", README):
        assert re.search(rf"^{target}:", makefile, re.M), target
    for path in re.findall(r"`((?:examples|benchmarks|tests|csrc|cosmos3_fast)/[\w./]+)`", README):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"\]\(((?!http|#)[^)]+)\)", README):
        assert (ROOT / path).exists(), path
