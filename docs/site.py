"""What the site needs beyond MkDocs: documents and notebooks from elsewhere, links to files, the help of each verb."""

from __future__ import annotations

import base64
import contextlib
import io
import json
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
    "examples/benchmark_and_report.ipynb": "examples/benchmark_and_report.md",
    "examples/distil_a_memory.ipynb": "examples/distil_a_memory.md",
    "examples/look_into_a_memory.ipynb": "examples/look_into_a_memory.md",
    "examples/read_a_book.ipynb": "examples/read_a_book.md",
    "src/ahn/smollm2/README.md": "smollm2.md",
    "src/ahn/tiny/README.md": "ahn-tiny.md",
}
"""Documents that are kept elsewhere in the repository, and the pages they become."""
SOURCES = {page: document for document, page in PAGES.items()}
HELP = "<!-- help of the verbs -->"
PICTURE = re.compile(r"^!\[[^\]]*\]\((\S+)\)$", re.M)
"""A picture that is a paragraph of its own."""
THOUSANDS = re.compile(r"(?<=\d) (?=\d{3}\b)")
"""The space in a number such as 32 640."""


def on_files(files: Any, config: Any) -> Any:
    """Adds the documents from elsewhere, and the plots of notebooks."""
    for document, page in PAGES.items():
        text = (ROOT / document).read_text(encoding="utf-8")
        if document.endswith(".ipynb"):
            text, plots = notebook(text, Path(page).stem)
            for name, plot in plots.items():
                files.append(File.generated(config, posixpath.join(posixpath.dirname(page), name), content=plot))
        files.append(File.generated(config, page, content=text))
    return files


def notebook(text: str, name: str) -> tuple[str, dict[str, bytes]]:
    """A notebook with its outputs as Markdown, and the plots that it shows, by file name."""
    parts, plots = [], {}
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        printed = ""
        for output in cell["outputs"]:
            if "image/png" in output.get("data", {}):
                plot = f"{name}-{len(plots) + 1}.png"
                plots[plot] = base64.b64decode("".join(output["data"]["image/png"]))
                parts.append(f"![What this cell draws]({plot})")
            else:
                printed += "".join(output.get("text") or output["data"]["text/plain"])
        if printed.strip():
            parts.append(f"```text\n{printed.strip(chr(10))}\n```")
    return "\n\n".join(parts) + "\n", plots


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links as they are in the repository become links of the site."""
    name = page.file.src_uri
    folder = posixpath.dirname(SOURCES.get(name, f"docs/{name}"))
    if HELP in markdown:
        markdown = markdown.replace(HELP, verbs())
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.M | re.S)
    parts[::2] = [_links(part, folder, posixpath.dirname(name), config.repo_url) for part in parts[::2]]
    parts[::2] = [PICTURE.sub(r"[\g<0>](\1)", part) for part in parts[::2]]  # leads to itself in its own size
    return "".join(parts)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """No line ends within a number."""
    parts = re.split(r"(<pre.*?</pre>|<code.*?</code>|<[^>]+>)", html, flags=re.S)
    parts[::2] = [THOUSANDS.sub("\N{NO-BREAK SPACE}", part) for part in parts[::2]]
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
        if not (ROOT / file).exists():
            return match[0]  # made for the site, as plots of notebooks are
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
