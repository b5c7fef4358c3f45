"""No module of the package or of the benchmarks imports itself by way of others."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


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


def circle(graph: dict[str, set[str]]) -> list[str] | None:
    """The modules of one circle in their order, None where there is none."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str] | None:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return None
        for other in sorted(graph[module]):
            if (round_trip := visit(other, [*path, module])) is not None:
                return round_trip
        done.add(module)
        return None

    for module in sorted(graph):
        if (round_trip := visit(module, [])) is not None:
            return round_trip
    return None


@pytest.mark.parametrize("package", ["cosmos3_fast", "benchmarks"])
def test_imports_make_no_circle(package: str):
    graph = imports(ROOT / package, ROOT)
    assert len(graph) > 10
    assert any(graph.values())
    assert circle(graph) is None


def test_a_circle_is_seen(tmp_path: Path):
    folder = tmp_path / "package"
    folder.mkdir()
    for name, text in {
        "__init__": "",
        "a": "from package import b\n",
        "b": "import package.c\n",
        "c": "def later():\n    from package import a\n",
    }.items():
        (folder / f"{name}.py").write_text(text)
    assert circle(imports(folder, tmp_path)) is None
    (folder / "c.py").write_text("from package.a import anything\n")
    assert circle(imports(folder, tmp_path)) == [
        "package.a", "package.b", "package.c", "package.a",
    ]  # fmt: skip
