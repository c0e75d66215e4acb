"""Chinese word segmentation: jieba at LV-Eval's version, because Chinese scores depend on its dictionary."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from typing import Protocol

from ahn.errors import AHNError, install_command

JIEBA = "0.42.1"  # LV-Eval's requirements.txt


class Segmenter(Protocol):
    """The one method of jieba's tokenizer that is used."""

    def cut(self, sentence: str, cut_all: bool = False) -> Iterator[str]: ...


@functools.cache
def _segmenter() -> Segmenter:
    try:
        import jieba
    except ImportError as error:
        raise AHNError(f"Chinese scores need jieba: {install_command('eval')}.") from error
    if jieba.__version__ != JIEBA:
        raise AHNError(
            f"Chinese scores are defined with jieba {JIEBA}, but {jieba.__version__} is installed: "
            f"run pip install jieba=={JIEBA}."
        )
    jieba.setLogLevel(logging.WARNING)  # it reports the loading of its dictionary on stderr
    return jieba.Tokenizer()  # our own: words that a program adds to jieba's global one must not change scores


def cut(text: str) -> list[str]:
    """The words of a text in order, white space and punctuation included, so that joining them gives the text.

    Raises:
        AHNError: jieba is missing or has another version.
    """
    return list(_segmenter().cut(text, cut_all=False))
