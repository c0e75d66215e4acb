"""Replies that follow a JSON schema: llguidance says which tokens may come next, and what bytes a token stands for."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ahn.errors import AHNError

if TYPE_CHECKING:
    from llguidance import LLTokenizer
    from transformers import PreTrainedTokenizerBase


class Grammars:
    """Makes processors of transformers' kind from JSON schemas."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, ends: Collection[int]) -> None:
        self.tokenizer, self.vocabulary, self.ends = tokenizer, vocabulary, sorted(ends)
        self._tokenizer: LLTokenizer | None = None

    def of_schema(self, schema: dict[str, Any]) -> SchemaProcessor:
        """A processor for one reply."""
        from llguidance import LLMatcher

        try:
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides={"whitespace_flexible": False})
        except (ValueError, RecursionError) as error:
            raise AHNError(f"The JSON schema cannot be used: {error}") from error
        matcher = LLMatcher(self.loaded(), grammar, log_level=0)
        if matcher.is_error():
            reason = " ".join(str(matcher.get_error()).split())[:300]
            raise AHNError(f"The JSON schema cannot be used: {reason}")
        return SchemaProcessor(matcher)

    def token_bytes(self, token: int) -> bytes:
        """What a token stands for; where several tokens make a character, a part of it."""
        return self.loaded().decode_bytes([token])

    def loaded(self) -> LLTokenizer:
        """Made at the first use: it takes a second for a large vocabulary."""
        if self._tokenizer is None:
            import llguidance.hf

            if not self.tokenizer.is_fast:
                raise AHNError("A JSON schema needs a fast tokenizer; this model has a slow one.")
            try:
                self._tokenizer = llguidance.hf.from_tokenizer(
                    self.tokenizer, n_vocab=self.vocabulary, eos_token=self.ends or None
                )
            except ValueError as error:
                raise AHNError(f"A JSON schema cannot be used with this model's tokenizer: {error}") from error
        return self._tokenizer


class SchemaProcessor:
    """Takes the tokens out that the schema does not allow next; one for one reply, called once for each token."""

    def __init__(self, matcher: Any) -> None:
        self.matcher = matcher
        self._seen: int | None = None

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (1, V) after token ids (1, n)."""
        if self._seen is None:
            self._seen = ids.shape[1]  # the prompt
        for token in ids[0, self._seen :].tolist():
            if not self.matcher.consume_token(token):
                raise AHNError(f"The reply left its JSON schema: {self.matcher.get_error()}")
        self._seen = ids.shape[1]
        bits = np.frombuffer(self.matcher.compute_bitmask(), dtype=np.uint8)
        allowed = torch.from_numpy(np.unpackbits(bits, bitorder="little")[: scores.shape[1]].astype(bool))
        if len(allowed) < scores.shape[1]:  # rows of the model's matrix that no token has
            allowed = torch.nn.functional.pad(allowed, (0, scores.shape[1] - len(allowed)))
        return scores.masked_fill(~allowed.to(scores.device), -torch.inf)
