"""What the site needs beyond MkDocs: documents from outside this folder, links to files, and the help of each verb."""

from __future__ import annotations

import contextlib
import io
import os
import posixpath
import re
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks.md",
    "benchmarks/quality/README.md": "quality.md",
    "benchmarks/results/README.md": "rows.md",
    "examples/README.md": "examples.md",
    "src/ahn/smollm2/README.md": "smollm2.md",
    "src/ahn/tiny/README.md": "ahn-tiny.md",
}
"""Documents that are kept elsewhere in the repository, and the pages they become."""
SOURCES = {page: document for document, page in PAGES.items()}
HELP = "<!-- help of the verbs -->"


def on_files(files: Any, config: Any) -> Any:
    """Adds the documents from elsewhere."""
    for document, page in PAGES.items():
        text = (ROOT / document).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links as they are in the repository become links of the site."""
    name = page.file.src_uri
    folder = posixpath.dirname(SOURCES.get(name, f"docs/{name}"))
    if HELP in markdown:
        markdown = markdown.replace(HELP, verbs())
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.M | re.S)
    parts[::2] = [_links(part, folder, posixpath.dirname(name), config.repo_url) for part in parts[::2]]
    return "".join(parts)


def _links(text: str, folder: str, page_folder: str, repository: str | None) -> str:
    """With links that lead from a document in `folder` to files, for a page in `page_folder`."""

    def link(match: re.Match[str]) -> str:
        shown, target = match.groups()
        path, hash_, anchor = target.partition("#")
        if not path or re.match(r"[a-z]+:", target):
            return match[0]
        file = posixpath.normpath(posixpath.join(folder, path))
        page = PAGES.get(file) or (file.removeprefix("docs/") if file.startswith("docs/") else None)
        if page:
            return f"[{shown}]({posixpath.relpath(page, page_folder or '.')}{hash_}{anchor})"
        return f"[{shown}]({repository.rstrip('/')}/blob/main/{file})" if repository else shown

    return re.sub(r"\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^)\s]+)\)", link, text)


def verbs() -> str:
    """`ahn VERB --help` of each verb, as a section of its own."""
    from ahn.cli.main import VERBS

    return "\n\n".join(f"## ahn {verb}\n\n```text\n{_help(verb).strip()}\n```" for verb in VERBS)


def _help(verb: str) -> str:
    from ahn.cli.main import main

    printed = io.StringIO()
    settings = {"COLUMNS": "90", "NO_COLOR": "1", "TERM": "dumb"}
    with (
        mock.patch.dict(os.environ, settings),
        mock.patch.object(sys, "argv", ["ahn", verb, "--help"]),
        contextlib.redirect_stdout(printed),
    ):
        try:
            main()
        except SystemExit as end:
            if end.code:
                raise RuntimeError(f"ahn {verb} --help ended with {end.code}") from end
    return "\n".join(line.rstrip() for line in printed.getvalue().splitlines())
