"""Imports point downwards: there is no cycle, and the core imports no strategy."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import structprecond

ROOT = Path(structprecond.__file__).parent
# a file may import from its own layer and the layers before it
FLOORS = (
    {"errors", "tables", "checks"},
    {"linalg", "structures", "groups", "roles"},
    {"core"},
    {"strategies", "sharpness"},
    {"chooser", "diagnostics", "migrate"},
    {"testing", "plan"},
)


def _modules(root: Path) -> dict[str, Path]:
    """Return the files of a package by the names of their modules."""
    parts = {
        file: file.relative_to(root.parent).with_suffix("").parts for file in root.rglob("*.py")
    }
    return {".".join(p[:-1] if p[-1] == "__init__" else p): f for f, p in parts.items()}


def imports_of(root: Path) -> dict[str, set[str]]:
    """Return the modules of a package that each module imports, also in functions and `if`s."""
    modules = _modules(root)
    graph = {}
    for name, file in modules.items():
        found = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                assert node.level == 0, f"{name} imports relatively"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                found |= {n if n in modules else node.module for n in names}
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
        graph[name] = (found & modules.keys()) - {name}
    return graph


def _floor(module: str) -> int:
    part = module.split(".")[1]
    return next(i for i, parts in enumerate(FLOORS) if part in parts)


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = imports_of(ROOT)
    assert len(graph) > 50
    assert list(TopologicalSorter(graph).static_order())


def test_imports_do_not_point_upwards() -> None:
    graph = imports_of(ROOT)
    del graph["structprecond"]
    assert any(m.startswith("structprecond.core") for m in graph["structprecond.strategies.soap"])
    upwards = [
        f"{module} imports {other}"
        for module, others in graph.items()
        for other in others
        if other == "structprecond" or _floor(other) > _floor(module)
    ]
    assert not [line for line in upwards if not line.startswith("structprecond.testing")]


def test_a_circle_and_a_hidden_import_are_found(tmp_path: Path) -> None:
    root = tmp_path / "pkg"
    root.mkdir()
    (root / "__init__.py").write_text("")
    (root / "one.py").write_text("from pkg import two\n")
    (root / "two.py").write_text("def f():\n    from pkg.one import x\n")
    graph = imports_of(root)
    assert graph == {"pkg": set(), "pkg.one": {"pkg.two"}, "pkg.two": {"pkg.one"}}
    with pytest.raises(CycleError):
        list(TopologicalSorter(graph).static_order())
