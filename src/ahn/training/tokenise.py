"""Conversations and texts to token ids, and which of them are to be learned."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ahn.errors import AHNError
from ahn.training.records import BadRowError, Conversation, decode, normalise

STAND_IN = "\u2983{}\u2984"
"""Takes the place of the assistant's n-th reply when a template is asked where replies go."""

KEPT, SHORT, IDLE, BAD = "kept", "short", "idle", "bad"
"""What became of a row. Short: `shortest` tokens or fewer. Idle: long, but with nothing to learn late enough."""


@dataclasses.dataclass
class RowTokenizer:
    """Tokenises batches of raw rows for `datasets.map`; a row of the result is a sample, or says why there is none.

    Args:
        tokenizer: a fast one.
        cutoff: longest sample in tokens. A conversation is cut, a text goes on in the next sample.
        shortest: samples of this many tokens or fewer are left out.
        smallest_total: no student sees fewer tokens exactly; a sample must have something to learn beyond them.
        strict: raise at a bad row.
    """

    tokenizer: PreTrainedTokenizerBase
    cutoff: int
    shortest: int
    smallest_total: int
    strict: bool = False

    def key(self) -> str:
        """Everything that the result depends on."""
        backend = self.tokenizer.backend_tokenizer
        template = self.tokenizer.chat_template
        numbers = [1, self.cutoff, self.shortest, self.smallest_total]  # the first is the version of this code
        return json.dumps([numbers, backend.to_str(), template, str(self.tokenizer.special_tokens_map)])

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Columns `input_ids`, `learn` (whether each token is to be learned), `fate`, `problem`, `where`."""
        found: dict[str, list[Any]] = {name: [] for name in ("input_ids", "learn", "fate", "problem", "where")}
        for values in zip(*batch.values(), strict=True):
            row = dict(zip(batch, values, strict=True))
            for sample in self._samples(row, str(row.get("where", "a row"))):
                for name, value in sample.items():
                    found[name].append(value)
        return found

    def _samples(self, row: dict[str, Any], where: str) -> Iterator[dict[str, Any]]:
        nothing = np.zeros(0, np.int32)
        try:
            content = normalise(decode(row))
            pieces = [self._conversation(content)] if isinstance(content, list) else self._text(content)
        except BadRowError as error:
            if self.strict:
                raise AHNError(f"{where}: {error} (strict: the first bad row stops the run).") from None
            yield {
                "input_ids": nothing,
                "learn": nothing.astype(bool),
                "fate": BAD,
                "problem": str(error),
                "where": where,
            }
            return
        for ids, learn in pieces:
            fate = self._fate(ids, learn)
            if fate != KEPT:
                ids, learn = nothing, nothing.astype(bool)
            yield {"input_ids": ids, "learn": learn, "fate": fate, "problem": "", "where": where}

    def _fate(self, ids: np.ndarray, learn: np.ndarray) -> str:
        if len(ids) <= self.shortest:
            return SHORT
        # The position before a token predicts it, and it must be at `smallest_total` or later.
        return KEPT if learn[self.smallest_total + 1 :].any() else IDLE

    def _text(self, text: str) -> list[tuple[np.ndarray, np.ndarray]]:
        ids = np.array(self.tokenizer(text, verbose=False)["input_ids"], np.int32)
        pieces = [ids[start : start + self.cutoff] for start in range(0, len(ids), self.cutoff)]
        if len(pieces) > 1 and len(pieces[-1]) <= self.shortest:
            pieces.pop()  # the rest of a long text is not a sample that somebody wrote too short
        return [(piece, np.ones(len(piece), bool)) for piece in pieces]

    def _conversation(self, messages: Conversation) -> tuple[np.ndarray, np.ndarray]:
        text, spans = render(messages, self.tokenizer)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = np.array(encoded["input_ids"], np.int32)[: self.cutoff]
        starts = np.array([start for start, _ in encoded["offset_mapping"]], np.int64)[: self.cutoff]
        learn = np.zeros(len(ids), bool)
        for first, last in spans:
            learn |= (starts >= first) & (starts < last)
        return ids, learn


def render(messages: Conversation, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[tuple[int, int]]]:
    """A conversation in the model's chat template, and where the assistant's replies are in it, in characters.

    A reply ends with the end-of-turn token that the template puts after it: that is to be learned too.

    Raises:
        BadRowError: the template refuses the messages or rewrites what a reply says.
        AHNError: the tokenizer has no template.
    """
    if not tokenizer.chat_template:
        raise AHNError(
            "The data holds conversations, but the tokenizer has no chat template: use an instruction-tuned model's "
            "tokenizer, or plain text."
        )
    replies = [message["content"] for message in messages if message["role"] == "assistant"]
    numbers = iter(range(len(replies)))
    outline = [
        message | {"content": STAND_IN.format(next(numbers))} if message["role"] == "assistant" else message
        for message in messages
    ]
    text, shape = _template(messages, tokenizer), _template(outline, tokenizer)
    around = re.split("|".join(re.escape(STAND_IN.format(n)) for n in range(len(replies))), shape)
    for shown in (replies, [reply.strip() for reply in replies]):  # some templates trim
        found = _interleave(around, shown, tokenizer.eos_token or "")
        if found is not None and found[0] == text:
            return found
    raise BadRowError("the chat template rewrites what a reply says")


def _interleave(around: list[str], replies: list[str], end: str) -> tuple[str, list[tuple[int, int]]] | None:
    if len(around) != len(replies) + 1:
        return None
    text, spans = around[0], []
    for reply, after in zip(replies, around[1:], strict=True):
        closing = len(end) if end and after.startswith(end) else 0
        spans.append((len(text), len(text) + len(reply) + closing))
        text += reply + after
    return text, spans


def _template(messages: Conversation, tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # jinja2's errors, and what templates raise by themselves
        raise BadRowError(f"the chat template refuses it: {error}") from None
