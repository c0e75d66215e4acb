"""A benchmark's own files: where they are, that they are the right ones, and the literals in them.

Nothing that is downloaded is executed or imported: Python files are parsed, and values taken from their syntax tree.
"""

from __future__ import annotations

import ast
import hashlib
import http.client
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ahn.errors import AHNError

TIMEOUT = 60.0  # seconds without an answer


@dataclass(frozen=True)
class Source:
    """One file of a GitHub repository at one commit.

    Attributes:
        repository: "owner/name".
        revision: the commit's full id.
        path: in the repository.
        sha256: of the file's bytes, in hexadecimal.
    """

    repository: str
    revision: str
    path: str
    sha256: str

    @property
    def url(self) -> str:
        return f"https://raw.githubusercontent.com/{self.repository}/{self.revision}/{self.path}"


@dataclass(frozen=True)
class SourceText:
    """A checked file: its text, and what to call it in a message."""

    content: str
    where: str


def fetch(url: str) -> bytes:
    """What lies at a URL.

    Raises:
        AHNError: there is no network, no such file, or the download broke off.
    """
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            content: bytes = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise AHNError(
            f"{url} could not be downloaded ({error}). Connect to the network, or name a directory with the protocol's "
            f"files (--protocol-dir)."
        ) from error
    return content


def checked(source: Source, content: bytes, where: str) -> SourceText:
    """The text of a source, if it is the pinned one.

    Raises:
        AHNError: the sha256 is another one, or the file is no UTF-8.
    """
    found = hashlib.sha256(content).hexdigest()
    if found != source.sha256:
        raise AHNError(
            f"{where} is not {source.path} of {source.repository} at {source.revision}: "
            f"expected sha256 {source.sha256}, found {found}."
        )
    try:
        return SourceText(content.decode("utf-8"), where)
    except UnicodeDecodeError as error:
        raise AHNError(f"{where} is not UTF-8 text: {error}.") from error


def assigned(text: SourceText, name: str) -> ast.expr:
    """What a Python file assigns to a name at its top level, unevaluated; the last assignment counts.

    Raises:
        AHNError: the file is no Python, or does not assign the name.
    """
    try:
        module = ast.parse(text.content)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise AHNError(f"{text.where} is not valid Python: {error}.") from error
    values = [
        node.value
        for node in module.body
        if isinstance(node, ast.Assign)
        and any(isinstance(target, ast.Name) and target.id == name for target in node.targets)
    ]
    if not values:
        raise AHNError(f"{text.where} does not assign {name}.")
    return values[-1]


def entries(text: SourceText, name: str) -> dict[str, ast.expr]:
    """The unevaluated values of a dictionary that a Python file assigns, by their keys.

    Raises:
        AHNError: as `assigned`, or it is no dictionary display with strings for keys.
    """
    node = assigned(text, name)
    if not isinstance(node, ast.Dict):
        raise AHNError(f"{text.where}, line {node.lineno}: {name} must be a dictionary.")
    result = {}
    for key, value in zip(node.keys, node.values, strict=True):
        if not (isinstance(key, ast.Constant) and isinstance(key.value, str)):
            raise AHNError(f"{text.where}, line {value.lineno}: the keys of {name} must be strings.")
        result[key.value] = value
    return result


def function_names(text: SourceText, name: str) -> dict[str, str]:
    """A dictionary of functions that a Python file assigns, with the functions' names in their place.

    Raises:
        AHNError: as `entries`, or a value is no plain name.
    """
    names = {}
    for key, value in entries(text, name).items():
        if not isinstance(value, ast.Name):
            raise AHNError(f"{text.where}, line {value.lineno}: {name}[{key!r}] must be the name of a function.")
        names[key] = value.id
    return names


def literal_entries(text: SourceText, name: str, keys: Iterable[str]) -> dict[str, Any]:
    """The values under some keys of a dictionary that a Python file assigns; its other values may be anything.

    Raises:
        AHNError: as `entries`, or a key is missing, or its value is no literal.
    """
    values = entries(text, name)
    result = {}
    for key in keys:
        if key not in values:
            raise AHNError(f"{text.where} has no {name}[{key!r}].")
        result[key] = _value(values[key], text)
    return result


def literal(text: SourceText, name: str) -> Any:
    """The literal that a Python file assigns to a name.

    Raises:
        AHNError: as `assigned`, or it is something that would have to be executed.
    """
    return _value(assigned(text, name), text)


def _value(node: ast.expr, text: SourceText) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise AHNError(f"{text.where}, line {node.lineno}: expected a literal value ({error}).") from error
