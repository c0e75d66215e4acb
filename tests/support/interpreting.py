"""Triton's interpreter, without what it does again and again: half of its time, and the same results."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from support import effort


def hasten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what each operation and each call of a kernel's function would look up anew.

    Sums and products of integers are computed a second time in 64 bits, to see whether they overflow: shapes of tests
    are far too small for that, and only `make test-all` looks.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    builder, patched, numpy_type = interpreter.interpreter_builder, interpreter._patch_lang, interpreter._get_np_dtype
    builder_options = dataclasses.replace(builder.options, sanitize_overflow=effort.everything)
    held: list[Any] = []  # modules of the language that a caller's scope has patched
    types: dict[str, Any] = {}

    class Scope:
        """The outermost one for these modules. Triton never takes back what functions of a kernel patched."""

        def __init__(self, fn: Any, languages: list[Any]) -> None:
            self.inner, self.languages = patched(fn), languages
            held.extend(languages)

        def restore(self) -> None:
            self.inner.restore()
            for language in self.languages:
                held.remove(language)

    def patch_once(fn: Any) -> Any:
        languages = [x for x in fn.__globals__.values() if x is tl or x is tl.core]
        return interpreter._LangPatchScope() if all(x in held for x in languages) else Scope(fn, languages)

    def known_type(wanted: Any) -> Any:
        if wanted.name not in types:
            types[wanted.name] = numpy_type(wanted)
        return types[wanted.name]

    monkeypatch.setattr(builder, "options", builder_options)
    monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
    monkeypatch.setattr(interpreter, "_get_np_dtype", known_type)
