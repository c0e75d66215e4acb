"""The one exception type of every expected failure, and what functions say that are given the wrong kind of thing."""

from __future__ import annotations

import os
import reprlib
from typing import Any


class AHNError(ValueError):
    """Something the caller can fix: a wrong path, shape, window or model. The message says what to do."""


def check_path(path: Any) -> None:
    """Raises AHNError if something is not the name of a directory."""
    if not isinstance(path, str | os.PathLike):
        raise AHNError(f"This takes a directory or a Hub id as a string or a path, not {named(path)}.")


def named(thing: Any) -> str:
    """What something is, for a message."""
    kind = f"the class {thing.__name__}" if isinstance(thing, type) else type(thing).__name__
    return f"the string {reprlib.repr(thing)}" if isinstance(thing, str) else kind
