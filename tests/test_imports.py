"""No module of the package or of the benchmarks imports itself by way of others."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def imports(folder: Path, root: Path) -> dict[str, set[str]]:
    """By module of a package, the package's modules that it imports when it is imported itself.

    What stands in a function, or below `if TYPE_CHECKING`, is not.
    """
    files = {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for path in folder.rglob("*.py")
    }
    found: dict[str, set[str]] = {}
    for module, path in files.items():
        found[module] = set()
        for node in ast.parse(path.read_text()).body:
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                # A name of a package is one of its modules, or stands in its __init__.
                names = [name if name in files else node.module for name in names]
            found[module].update(name for name in names if name in files and name != module)
    return found


@pytest.mark.parametrize("package", ["cosmos3_fast", "benchmarks"])
def test_imports_make_no_circle(package: str):
    graph = imports(ROOT / package, ROOT)
    assert len(graph) > 10
    assert any(graph.values())
    TopologicalSorter(graph).prepare()
