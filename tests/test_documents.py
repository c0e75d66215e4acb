"""What documents say of the repository is so: paths exist, links lead somewhere, cited sections and names are there."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.documents import LANGUAGES, blocks, commands, run, runs, unknown_options
from support.sources import trees

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


def test_every_picture_is_shown_somewhere() -> None:
    shown = {name for document in DOCUMENTS for name in re.findall(r"images/([\w.-]+)\)", prose(document))}
    assert shown == {path.name for path in (ROOT / "docs/images").iterdir()}


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
    for block in blocks(document):
        if block.language != "python":
            continue
        compile(block.code, str(document), "exec")
        for module, names in re.findall(r"^from (ahn[\w.]*) import ([\w, ]+)$", block.code, flags=re.M):
            found = importlib.import_module(module)
            assert not [name for name in re.split(r",\s*", names) if not hasattr(found, name)], module
        for name in re.findall(r"\bahn\.(\w+)\(", block.code):
            assert hasattr(importlib.import_module("ahn"), name), name


@pytest.mark.parametrize("suffix", [".md", ".py"])
def test_dotted_names_are_there(suffix: str) -> None:
    """A dotted name of ours in documents, docstrings and comments; what follows `ahn.fn.` is a tensor's name."""
    missing = [
        (path.name, name)
        for path in (DOCUMENTS if suffix == ".md" else SOURCES)
        for name in re.findall(r"`(ahn(?:\.\w+)+)[`(]", path.read_text(encoding="utf-8"))
        if not name.startswith(("ahn.fn.", "ahn.cli.VERB")) and not _is_there(name)
    ]
    assert not missing


def _is_there(name: str) -> bool:
    """Whether a dotted name is a module, or what is in one, in a class, or among a class's fields."""
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        outer, _, last = name.rpartition(".")
        return "." in outer and _is_there(outer) and last in getattr(pkgutil.resolve_name(outer), "__annotations__", {})
    return True


@documents
def test_blocks_say_what_they_are(document: Path) -> None:
    assert not [block.line for block in blocks(document) if block.language not in LANGUAGES]
    fences = re.findall(r"^ *```", document.read_text(encoding="utf-8"), flags=re.M)
    fenced = [block for block in blocks(document) if "setup" not in _line(document, block.line)]
    assert len(fences) == 2 * len(fenced), "a block that is not found is not run"


def _line(document: Path, number: int) -> str:
    return document.read_text(encoding="utf-8").splitlines()[number - 1]


@documents
def test_commands_in_documents_have_their_options(document: Path) -> None:
    lines = [words for block in blocks(document) if block.language == "bash" for words in commands(block.code)]
    assert not [unknown for words in lines if (unknown := unknown_options(words))]


def test_the_check_of_options_finds_mistakes() -> None:
    assert commands("FLAG=1 ahn chat --a b \\\n --c | x ahn  # ahn") == [["chat", "--a", "b", "--c"]]
    assert unknown_options(["chat", "--window=5", "--widnow", "5"]) == ["--widnow"]
    assert unknown_options(["eval", "perplexity", "--length", "9", "--lenght"]) == ["--lenght"]
    assert unknown_options(["train", "a.yaml", "--output_dir", "x", "--max-steps", "1", "--stesp"]) == ["--stesp"]
    assert unknown_options(["tarin"]) == ["tarin"]


def test_blocks_of_the_readme_run(tmp_path: Path) -> None:
    assert len(runs(ROOT / "README.md")) >= 1
    ended = run(ROOT / "README.md", tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "daisy" in ended.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "document",
    [path for path in DOCUMENTS if path.name != "CHANGELOG.md" and path != ROOT / "README.md" and runs(path)],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_blocks_run_in_order(document: Path, tmp_path: Path) -> None:
    ended = run(document, tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def _public_docstrings() -> Iterator[tuple[str, str]]:
    for path, tree in trees().items():
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
