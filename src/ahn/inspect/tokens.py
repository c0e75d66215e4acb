"""Kinds of tokens, by a light reading of the text that knows code and harms prose little."""

from __future__ import annotations

import keyword
import re
from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ahn.errors import AHNError

KINDS = ("number", "name", "keyword", "operator", "whitespace", "text", "other")
"""`name`: a word; `keyword`: one of Python's; `operator`: punctuation too; `text`: inside a string or comment."""

_UNKNOWN = "\ufffd"  # stands for special tokens and for parts of a character
_PREFIX = r"(?<!\w)[rbfuRBFU]{0,2}"
_TELLING, _VISIBLE = re.compile(r"\w"), re.compile(r"\S")
_PARTS = re.compile(
    rf"""
    (?P<text> \#[^\n]* | {_PREFIX}(?P<triple>\"{{3}}|'{{3}}) (?:.|\n)*? (?:(?P=triple)|\Z)
        | {_PREFIX}"(?:\\.|[^"\\\n])*" | {_PREFIX}'(?:\\.|[^'\\\n])*' )
    | (?P<number> \d(?:\w|\.(?=\d))* )
    | (?P<name> [^\W\d]\w* )
    | (?P<whitespace> \s+ )
    | (?P<other> [{_UNKNOWN}\x00-\x1f\x7f]+ )
    | (?P<operator> . )
    """,
    re.VERBOSE,
)


def token_kinds(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int] | Tensor) -> list[str]:
    """The kind of each token, one of `KINDS`.

    A token is what its first letter or digit is part of, if it has none its first character that is no space: a
    keyword in `" return"`, a name in `".append"` and in the `"7"` of `x17`. Tokens of spaces and newlines alone are
    whitespace, in strings and comments too. A quotation mark opens a string if its line closes it.

    Args:
        ids: of one text, from its beginning: a sequence of integers, or a tensor (L,) or (1, L).

    Raises:
        AHNError: the tensor has more than one row.
    """
    if isinstance(ids, Tensor):
        if ids.numel() != ids.shape[-1]:
            raise AHNError(f"Kinds are those of one text's tokens; take one row of ids {tuple(ids.shape)}.")
        ids = ids.flatten().tolist()
    pieces = _pieces(tokenizer, ids)
    of = [kind for part in _PARTS.finditer("".join(pieces)) for kind in [_kind(part)] * len(part[0])]
    kinds, start = [], 0
    for piece in pieces:
        telling = _TELLING.search(piece) or _VISIBLE.search(piece)
        kinds.append(of[start + telling.start()] if telling else "whitespace" if piece else "other")
        start += len(piece)
    return kinds


def _kind(part: re.Match[str]) -> str:
    name = next(kind for kind in KINDS if kind != "keyword" and part[kind] is not None)
    return "keyword" if name == "name" and keyword.iskeyword(part[0]) else name


def _pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text of each token."""
    special = set(tokenizer.all_special_ids)
    pieces = {}
    for i in set(ids):
        text = tokenizer.decode([i], clean_up_tokenization_spaces=False)
        name = tokenizer.convert_ids_to_tokens(i)
        if name and name.startswith("\u2581") and not text.startswith(" "):
            text = f" {text}"  # SentencePiece drops the space before the first word of what it decodes
        pieces[i] = _UNKNOWN if i in special else text
    return [pieces[i] for i in ids]
