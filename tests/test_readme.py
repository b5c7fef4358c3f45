"""What the documents say of versions, files and each other is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import cosmos3_fast.ops  # noqa: F401 - registers them
from cosmos3_fast.engines.releases import TESTED
from cosmos3_fast.ops import registry

ROOT = Path(__file__).parent.parent
MAKEFILE = (ROOT / "Makefile").read_text()
FOLDERS = "examples|benchmarks|tests|csrc|cosmos3_fast"
DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("examples/*.md")),
    *sorted(ROOT.glob("benchmarks/**/*.md")),
]


def pinned(engine: str, package: str) -> str:
    folder = ROOT / "tests" / "engines" / engine
    for name in ("requirements-nodeps.txt", "requirements.txt"):
        file = folder / name
        if file.exists() and (found := re.search(rf"^{package}==(\S+)", file.read_text(), re.M)):
            return found.group(1)
    raise AssertionError(f"{folder} does not pin {package}")


def test_versions_are_those_the_engine_tests_install():
    torch_version = re.search(r"^TORCH \?= torch==(\S+)", MAKEFILE, re.M)
    assert torch_version is not None
    document = (ROOT / "docs" / "engines.md").read_text()
    readme = (ROOT / "README.md").read_text().lower()
    for engine, tested in TESTED.items():
        assert f"**{engine}** {tested[0]} to {tested[-1]}" in readme
        newest = pinned(engine.replace("-", "_"), engine)
        others = ", ".join(version for version in tested if version != newest)
        row = f"| {engine} | {newest} | {others} | {torch_version[1]} | `make test-{engine}` |"
        assert row in document
        assert newest in tested


def test_every_schema_of_the_latent_op_is_shown():
    document = (ROOT / "docs" / "op.md").read_text()
    for schema in (each for each in registry.SCHEMAS if each.startswith("prepare_latents")):
        assert f"cosmos3::{schema}" in document


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def anchors(document: Path) -> set[str]:
    """Those that GitHub makes of headings."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_targets_files_and_links_exist(document: Path):
    text = document.read_text()
    if "/results/" not in str(document):  # what those name was there when they were written
        for target in re.findall(r"`(?:\w+=\S+ )*make ([a-z-]+)", text):
            assert target.endswith("-") or re.search(rf"^{target}:", MAKEFILE, re.M), target
        for path in re.findall(rf"`((?:{FOLDERS})/[\w./]*)`", text):
            assert (ROOT / path).exists(), path
    for link in re.findall(r"\]\(((?!http)[^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
