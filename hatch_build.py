"""What distributions say of the repository, whose address is `REPOSITORY_URL` when they are built and nowhere else."""

from __future__ import annotations

import os
import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\((?![a-z]+:|#)([^)\s]+)\)")
"""A link of the README to a file of the repository."""


class RepositoryLinks(MetadataHookInterface):
    """Gives an index the project's addresses and a README whose links lead somewhere from there."""

    def update(self, metadata: dict[str, object]) -> None:
        """Called by hatchling. Without an address links become what they show, and the paper's is the only URL."""
        repository = os.environ.get("REPOSITORY_URL", "").rstrip("/")
        readme = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": with_links(readme, repository)}
        urls = {"Paper": "https://arxiv.org/abs/2510.07318"}
        if repository:
            urls["Source"] = repository
            urls["Changelog"] = f"{repository}/blob/HEAD/CHANGELOG.md"
            urls["Issues"] = f"{repository}/issues"
        metadata["urls"] = urls


def with_links(readme: str, repository: str) -> str:
    """The README with links to files as links to the repository; as what they show if its address is not known."""

    def link(found: re.Match[str]) -> str:
        picture, shown, target = found.groups()
        if not repository:
            return "" if picture else shown
        return f"{picture}[{shown}]({repository}/{'raw' if picture else 'blob'}/HEAD/{target})"

    return LINK.sub(link, readme)
