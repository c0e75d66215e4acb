"""The one exception type of every expected failure, and what functions say that are given the wrong kind of thing."""

import os
import reprlib
import shlex
import shutil
import sys
from typing import Any


class AHNError(ValueError):
    """Something the caller can fix: a wrong path, shape, window or model. The message says what to do."""


def check_path(path: Any, of: str = "a directory or a Hub id") -> None:
    """Raises AHNError if something is not a name, or a path, of what it is said to be."""
    if not isinstance(path, str | os.PathLike):
        raise AHNError(f"This takes {of} as a string or a path, not {named(path)}.")


def named(thing: Any) -> str:
    """What something is, for a message."""
    kind = f"the class {thing.__name__}" if isinstance(thing, type) else type(thing).__name__
    return f"the string {reprlib.repr(thing)}" if isinstance(thing, str) else kind


def reason(error: Exception) -> str:
    """What went wrong, for a message that names the file: without an error's number, and its path again."""
    return getattr(error, "strerror", None) or str(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was no memory for tensors: a GPU's error has a type of its own, a CPU's only its text."""
    text = str(error)
    full = "out of memory" in text or "can't allocate memory" in text
    return type(error).__name__ == "OutOfMemoryError" or (full and isinstance(error, RuntimeError))


def first_line(error: BaseException) -> str:
    """What an exception of another library says, in short: some say pages, and a KeyError often the key alone."""
    if isinstance(error, KeyError) and len(error.args) == 1:
        key = error.args[0]
        return first_line(ValueError(key)) if " " in str(key) else f"{key!r} is unknown or missing"
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__


def installed_version(package: str) -> str | None:
    """None if the package is not installed, as ahn itself may not be: its sources can be on the path."""
    import importlib.metadata  # every import of the package would wait for it

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def install_command(extra: str) -> str:
    """A command that installs an extra of this package, for how the package was installed here.

    From a checkout it names the checkout; otherwise the packages themselves, since no index need have this one.
    """
    import importlib.metadata
    import json
    from urllib.parse import urlparse
    from urllib.request import url2pathname

    try:
        own = importlib.metadata.distribution("ahn")
    except importlib.metadata.PackageNotFoundError:  # the sources alone, on the path
        return f"pip install -e '.[{extra}]' in a checkout of ahn"
    source = json.loads(own.read_text("direct_url.json") or "{}")
    if source.get("dir_info", {}).get("editable"):
        checkout = url2pathname(urlparse(source["url"]).path)
        return f"{_pip()} install -e {shlex.quote(f'{checkout}[{extra}]')}"
    return " ".join([_pip(), "install", *map(shlex.quote, _requirements(own.requires or [], extra))])


def _pip() -> str:
    """This Python's pip, by its short name where a shell finds it by that: an environment need not be activated."""
    found = shutil.which("pip")
    here = found is not None and os.path.dirname(found) == os.path.dirname(sys.executable)
    return "pip" if here else f"{shlex.quote(sys.executable)} -m pip"


def _requirements(requires: list[str], extra: str) -> list[str]:
    """What an extra asks for, with what other extras of this package ask for in its place."""
    found: list[str] = []
    for requirement in requires:
        what, _, condition = (part.strip() for part in requirement.partition(";"))
        if condition.replace('"', "'").endswith(f"extra == '{extra}'"):
            inner = what.partition("[")[2].partition("]")[0].split(",") if what.startswith("ahn[") else []
            found += [other for name in inner for other in _requirements(requires, name)] or [what]
    return list(dict.fromkeys(found))
