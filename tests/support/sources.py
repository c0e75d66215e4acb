"""The package's own sources, parsed once for every test that looks at them."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "src" / "ahn"


@cache
def trees() -> dict[Path, ast.Module]:
    """Of every module, in the order of paths."""
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}
