"""How `generate` of transformers writes for the command line: its settings, its text piece by piece, and Ctrl-C."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from ahn.errors import AHNError
from ahn.serve.engine.text import TextStream

COLDEST = 1e-6
"""Temperatures below take the most probable token: transformers divides scores by them, which may become infinite."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; None leaves it to the model's `generation_config`.

    Attributes:
        temperature: 0 takes the most probable token, and so does anything below `COLDEST`.
        top_p: tokens are drawn, among those that make up this probability.
        lookup: so many tokens at once are guessed to be what followed the last words earlier in the text; 0 for none.

    Raises:
        AHNError: a number is out of range.
    """

    max_new_tokens: int = 256
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0
    lookup: int = 0

    def __post_init__(self) -> None:
        if (self.temperature is not None and not 0 <= self.temperature < math.inf) or (
            self.top_p is not None and not 0 < self.top_p <= 1
        ):
            raise AHNError(f"The temperature must be ≥ 0 and top-p in (0, 1], got {self.temperature} and {self.top_p}.")
        if self.temperature == 0 and self.top_p is not None:
            raise AHNError("top-p chooses among tokens to draw, and temperature 0 draws none: leave one of them out.")
        if not -(1 << 63) <= self.seed < 1 << 63:
            raise AHNError(f"The seed must fit into 64 bits, got {self.seed}.")

    def arguments(self, ends: Collection[int]) -> dict[str, Any]:
        """For `model.generate` with a cache: they go before its `generation_config`, all else in which stays."""
        chosen: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "max_length": None, "num_beams": 1}
        chosen |= {"num_return_sequences": 1, "use_cache": True, "cache_implementation": None}
        chosen |= {"eos_token_id": sorted(ends) or None, "pad_token_id": min(ends, default=0)}
        if self.lookup:
            chosen["prompt_lookup_num_tokens"] = self.lookup
        if self.temperature is not None or self.top_p is not None:
            chosen["do_sample"] = self.temperature is None or self.temperature >= COLDEST
        if self.temperature and chosen["do_sample"]:
            chosen["temperature"] = self.temperature
        if self.top_p is not None:
            chosen["top_p"] = self.top_p
        return chosen


class StoppedError(Exception):
    """A forward ended between two layers because Ctrl-C asked for it; nothing can go on with its cache."""


class Interrupt(StoppingCriteria):
    """Ctrl-C as a request: inside the block it stops what asks for it, between two tokens, chunks or layers."""

    def __init__(self) -> None:
        self.wanted = False

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self.wanted, device=input_ids.device)

    @contextlib.contextmanager
    def watching(self, insist: bool = True) -> Iterator[Interrupt]:
        """Take Ctrl-C as a request inside the block; the second is a KeyboardInterrupt as ever, if one may `insist`."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = signal.getsignal(signal.SIGINT)

        def ask(*_: Any) -> None:
            self.wanted = True
            if insist:
                signal.signal(signal.SIGINT, before)

        signal.signal(signal.SIGINT, ask)
        try:
            yield self
        finally:
            signal.signal(signal.SIGINT, before)

    @contextlib.contextmanager
    def within(self, model: PreTrainedModel) -> Iterator[None]:
        """Inside the block a forward of the model raises `StoppedError` between two layers once it is wanted."""

        def check(*_: Any) -> None:
            if self.wanted:
                raise StoppedError

        hooks = [layer.register_forward_pre_hook(check) for layer in model.get_decoder().layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class Pieces(BaseStreamer):
    """Shows tokens as text while they are generated: a character comes when its last byte is there."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, before: Sequence[int], show: Callable[[str], Any]) -> None:
        self.stream, self.show = TextStream(tokenizer, before), show
        self._prompt_is_next = True  # `generate` begins with the prompt

    @property
    def text(self) -> str:
        return self.stream.text

    def put(self, value: Tensor) -> None:
        if self._prompt_is_next:
            self._prompt_is_next = False
            return
        for token in value.flatten().tolist():
            self._show(self.stream.add(token))

    def end(self) -> None:
        self._show(self.stream.end())

    def _show(self, piece: str) -> None:
        if piece:
            self.show(piece)
