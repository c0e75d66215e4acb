"""One class name stands for one class, in the whole package."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import ahn


def test_class_names_are_unique() -> None:
    places = defaultdict(list)
    root = Path(ahn.__file__).parent
    for file in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(f"{file.relative_to(root)}:{node.lineno}")
    assert len(places) > 100
    assert {name: found for name, found in places.items() if len(found) > 1} == {}
