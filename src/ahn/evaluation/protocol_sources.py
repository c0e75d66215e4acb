"""A benchmark's own files: where they are, that they are the right ones, and what they assign.

Nothing that is downloaded is executed or imported: Python files are parsed, and values taken from their syntax tree.
What has the pinned sha256 is known to be text, Python and complete: only that is checked.
"""

import ast
import hashlib
import http.client
import urllib.request
from dataclasses import dataclass

from ahn.errors import AHNError

TIMEOUT = 60.0  # seconds without an answer


@dataclass(frozen=True)
class Source:
    """One file of a GitHub repository at one commit."""

    repository: str
    revision: str
    path: str
    sha256: str

    @property
    def url(self) -> str:
        return f"https://raw.githubusercontent.com/{self.repository}/{self.revision}/{self.path}"

    def text(self, content: bytes, where: str) -> str:
        """The text of these bytes."""
        found = hashlib.sha256(content).hexdigest()
        if found != self.sha256:
            raise AHNError(
                f"{where} is not {self.path} of {self.repository} at {self.revision}: "
                f"expected sha256 {self.sha256}, found {found}."
            )
        return content.decode("utf-8")


def fetch(url: str) -> bytes:
    """What lies at a URL."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            content: bytes = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise AHNError(
            f"{url} could not be downloaded ({error}). Connect to the network, or name a directory with the protocol's "
            f"files (--protocol-dir)."
        ) from error
    return content


def assigned(text: str) -> dict[str, ast.expr]:
    """What a Python file assigns to names at its top level, unevaluated; the last assignment counts."""
    return {
        target.id: node.value
        for node in ast.parse(text).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def entries(node: ast.expr) -> dict[str, ast.expr]:
    """The unevaluated values of a dictionary by their keys: its other values may be no literals."""
    assert isinstance(node, ast.Dict)
    keys = [ast.literal_eval(key) for key in node.keys if key is not None]
    return dict(zip(keys, node.values, strict=True))
