"""The documentation site: pages, reference, links, and a build without a warning."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import test_public_api

import ahn

ROOT = Path(__file__).parents[1]
CONFIGURATION = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("ahn_site_hooks", ROOT / "docs/site.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_is_in_the_navigation_once(hooks: ModuleType) -> None:
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    listed = re.findall(r"^ +- .+: (\S+\.md)$", CONFIGURATION, flags=re.M)
    assert sorted(listed) == sorted(pages | set(hooks.PAGES.values()))
    assert all((ROOT / document).is_file() for document in hooks.PAGES)


def test_the_reference_has_every_public_name() -> None:
    shown = [
        name
        for page in (ROOT / "docs/reference").glob("*.md")
        for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), flags=re.M)
    ]
    named = ("ahn.model.observer", "ahn.training.calibration", "ahn.training.heads")  # by the guides
    assert sorted(shown) == sorted([*(f"ahn.{name}" for name in (*ahn.__all__, *test_public_api.MODULES)), *named])


@pytest.mark.parametrize(
    ("page", "target", "made"),
    [
        ("index.md", "docs/results.md#setup", "results.md#setup"),
        ("index.md", "docs/images/ahn.svg", "images/ahn.svg"),
        ("results.md", "../src/ahn/tiny/README.md#memories", "ahn-tiny.md#memories"),
        ("ahn-tiny.md", "../../../docs/results.md", "results.md"),
        ("reference/training.md", "../training.md", "../training.md"),
        ("read-a-book.md", "../examples/read_a_book.ipynb", "examples/read_a_book.md"),
        ("examples.md", "read_a_book.ipynb", "examples/read_a_book.md"),
        ("examples/read_a_book.md", "../docs/inspect.md", "../inspect.md"),
        ("examples/read_a_book.md", "read_a_book-1.png", "read_a_book-1.png"),
        ("log.md", "#speed", "#speed"),
        ("log.md", "https://arxiv.org", "https://arxiv.org"),
        ("log.md", "../pyproject.toml", "https://example.org/ahn/blob/main/pyproject.toml"),
    ],
)
def test_links_of_the_repository_become_links_of_the_site(hooks: ModuleType, page: str, target: str, made: str) -> None:
    folder = str(Path(hooks.SOURCES.get(page, f"docs/{page}")).parent).removeprefix(".")
    at = str(Path(page).parent).removeprefix(".")
    assert hooks._links(f"[a [b]]({target})", folder, at, "https://example.org/ahn/") == f"[a [b]]({made})"


def test_a_notebook_becomes_a_page_with_what_it_printed_and_drew(hooks: ModuleType) -> None:
    notebooks = [document for document in hooks.PAGES if document.endswith(".ipynb")]
    assert sorted(notebooks) == sorted(f"examples/{path.name}" for path in (ROOT / "examples").glob("*.ipynb"))
    for document in notebooks:
        page, plots = hooks.notebook((ROOT / document).read_text(encoding="utf-8"), "name")
        assert page.startswith("# ") and "```python\n" in page and "```text\n" in page
        assert list(plots) == ["name-1.png"] and "](name-1.png)" in page
        assert plots["name-1.png"].startswith(b"\x89PNG")


def test_a_picture_leads_to_itself(hooks: ModuleType) -> None:
    """On a phone its letters are small."""
    page = SimpleNamespace(file=SimpleNamespace(src_uri="results.md"))
    text = "![a figure](images/demo.png)\n\n```text\n![a](b.png)\n```\nsee ![this](images/ahn.svg)\n"
    made = hooks.on_page_markdown(text, page, SimpleNamespace(repo_url=None), None)
    assert made == text.replace("![a figure](images/demo.png)", "[![a figure](images/demo.png)](images/demo.png)")


def test_no_line_ends_within_a_number(hooks: ModuleType) -> None:
    """In a table's narrow column 1 022 tokens/s were read as 1, and 022 below it."""
    html = "<td title='1 022'>55 fit: 1 022 tokens/s, 1 024 000</td> 12 34 <code>a 1 000</code><pre>1 000\n2 000</pre>"
    made = hooks.on_page_content(html, None, None, None)
    assert made.replace("\N{NO-BREAK SPACE}", "_") == html.replace("fit: 1 022", "fit: 1_022").replace(
        "1 024 000", "1_024_000"
    )


def test_without_a_repository_a_link_to_a_file_is_its_text(hooks: ModuleType) -> None:
    assert hooks._links("see [the file](../pyproject.toml).", "docs", "", None) == "see the file."


class Targets(HTMLParser):
    """What a page links to and what can be linked to in it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.ids.add(value)
            elif name in ("href", "src") and value and tag in ("a", "img"):
                self.links.append(value)


@pytest.mark.slow
def test_it_builds_strictly_and_its_links_lead_somewhere(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    found = {path: Targets(path.read_text(encoding="utf-8")) for path in (tmp_path / "site").rglob("index.html")}
    assert len(found) >= 30
    broken = []
    for path, page in found.items():
        for link in page.links:
            target, _, anchor = link.partition("#")
            if re.match(r"[a-z]+:", link):
                continue
            file = (path.parent / target).resolve() if target else path
            file = file / "index.html" if file.is_dir() else file
            if not file.exists() or (anchor and file in found and anchor not in found[file].ids):
                broken.append((path.parent.name, link))
    assert not broken
    models = (tmp_path / "site/reference/models/index.html").read_text(encoding="utf-8")
    assert "ahn.attach" in models and "ahn.AHNCache.for_model" in models
    assert "--max-new-tokens" in (tmp_path / "site/reference/command-line/index.html").read_text(encoding="utf-8")
