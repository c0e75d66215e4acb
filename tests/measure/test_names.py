"""One class name stands for one class, in the whole package."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator

from support.sources import PACKAGE, trees


def classes(node: ast.AST) -> Iterator[ast.ClassDef]:
    """Of a module, in whatever statement."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield child
        if not isinstance(child, ast.expr):  # which holds no statement
            yield from classes(child)


def test_class_names_are_unique() -> None:
    places = defaultdict(list)
    for file, tree in trees().items():
        for node in classes(tree):
            places[node.name].append(f"{file.relative_to(PACKAGE)}:{node.lineno}")
    assert len(places) > 100
    assert {name: found for name, found in places.items() if len(found) > 1} == {}
