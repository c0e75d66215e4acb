"""The house as docs/architecture.md draws it: every room is listed, and imports go to rooms above, without circles."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from support.sources import PACKAGE, trees

ROOT = Path(__file__).parents[1]
TABLE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("## Rooms")[1].split("\n## ")[0]
ROOMS = re.findall(r"^\| `(\w+)` \|", TABLE, flags=re.M)
MODULES = {
    ".".join(("ahn", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in trees()
}

LONGEST = 400
"""Lines of a module."""


def imports(tree: ast.AST, for_types: bool) -> Iterator[str]:
    """Modules of the package that are imported, at once or when a function runs.

    Args:
        for_types: also those that only a type checker imports.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and not for_types:
            for other in node.orelse:
                yield from imports(other, for_types)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES else str(node.module)
        elif not isinstance(node, ast.expr):  # which holds no statement
            yield from imports(node, for_types)


def edges(for_types: bool) -> dict[str, set[str]]:
    return {
        name: {found for found in imports(trees()[path], for_types)} & set(MODULES) for name, path in MODULES.items()
    }


def test_every_room_is_listed() -> None:
    found = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert sorted(ROOMS) == sorted(found - {"__init__"})


def test_no_module_is_long() -> None:
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    assert not {name: length for name, length in lengths.items() if length > LONGEST}


def test_imports_go_to_rooms_above() -> None:
    wrong = []
    for name, targets in edges(for_types=False).items():
        for target in targets - {"ahn"}:  # the root names what is below and loads it when it is used
            here, there = name.split(".")[1:2], target.split(".")[1]
            if here and ROOMS.index(there) > ROOMS.index(here[0]):
                wrong.append(f"{name} imports {target}")
    assert not wrong, wrong


def test_no_modules_know_each_other_in_a_circle() -> None:
    """Not by what a function imports when it runs either, nor by a name that only a type needs."""
    graph = {name: targets - {name, "ahn"} for name, targets in edges(for_types=True).items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))
