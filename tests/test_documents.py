"""What documents say of the repository is so: paths exist, links lead somewhere, cited sections and names are there."""

from __future__ import annotations

import ast
import importlib
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("src", "tests", "docs", "benchmarks", "configs", "examples", ".github")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))])
SOURCES = sorted(path for folder in ("src", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py"))

documents = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def prose(document: Path) -> str:
    """The text without its code blocks."""
    return re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.M | re.S)


def anchors(document: Path) -> set[str]:
    """GitHub's anchors of the headings."""
    headings = re.findall(r"^#+ (.*)$", prose(document), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).replace(" ", "-") for heading in headings}


@documents
def test_paths_exist(document: Path) -> None:
    """Of what stands in backticks: files and folders of the repository."""
    top = "|".join(map(re.escape, FOLDERS))
    named = re.findall(rf"`((?:{top})/[\w./-]*)`", document.read_text(encoding="utf-8"))
    assert not [path for path in named if not (ROOT / path).exists()]


@documents
def test_links_lead_somewhere(document: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        if re.match(r"https?:|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


def test_cited_sections_of_the_specification_exist() -> None:
    numbers = set(re.findall(r"^## (\d+)\.", (ROOT / "docs/spec.md").read_text(encoding="utf-8"), flags=re.M))
    cited = {
        (path.name, number)
        for path in SOURCES
        for group in re.findall(r"docs/spec\.md,\s+sections? ([\d, and]+)", path.read_text(encoding="utf-8"))
        for number in re.findall(r"\d+", group)
    }
    assert cited and not [(name, number) for name, number in cited if number not in numbers]


@documents
def test_python_in_documents_compiles_and_imports_what_is_there(document: Path) -> None:
    for block in re.findall(r"^( *)```python\n(.*?)^\1```", document.read_text(encoding="utf-8"), flags=re.M | re.S):
        code = textwrap.dedent(block[1])
        compile(code, str(document), "exec")
        for module, names in re.findall(r"^from (ahn[\w.]*) import ([\w, ]+)$", code, flags=re.M):
            found = importlib.import_module(module)
            assert not [name for name in re.split(r",\s*", names) if not hasattr(found, name)], module


def _public_docstrings() -> Iterator[tuple[str, str]]:
    for path in SOURCES:
        if ROOT / "src" in path.parents:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for node in ast.walk(tree):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                    name = getattr(node, "name", path.stem)
                    if not name.startswith("_") and (text := ast.get_docstring(node)):
                        yield f"{path.relative_to(ROOT)}: {name}", " ".join(text.lower().split())


def test_public_docstrings_use_the_glossarys_words() -> None:
    glossary = (ROOT / "docs/glossary.md").read_text(encoding="utf-8")
    refused = re.findall(r"\*\*([\w -]+)\*\*", glossary.split("|---|---|---|")[1])
    assert len(refused) >= 5
    found = [
        f"{where} says {word!r}"
        for where, text in _public_docstrings()
        for word in refused
        if re.search(rf"\b{word}\b", text)
    ]
    assert not found, found
