"""One model and one cache: read text of any length, then continue it. What `generate`, `chat` and `demo` share.

The text is written by transformers' `generate`, with the model's own generation settings; this module keeps the cache
between calls and shows the text while it is written.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Unpack

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ahn import private
from ahn.cache.conversation import AHNCache
from ahn.cli import common
from ahn.cli.writing import Interrupt, Pieces, Sampling, StoppedError
from ahn.config import Reach
from ahn.errors import AHNError
from ahn.evaluation.reader import end_tokens, generated
from ahn.measure.reading import chunk_size, in_chunks
from ahn.measure.tokens import LONG, token_ids
from ahn.memory import get

TINY_MEMORY = "gated_deltanet"
"""Memory of the shipped model that verbs take when no adapter is named."""
TINY_DEVICE = "cpu"
"""Where the shipped model runs unless told otherwise: a GPU would take longer to compile its kernels for it."""


class Session:
    """A conversation of one model: everything read and written so far is in its cache, up to the last token.

    The last token is read by the next call: `generate` begins with it.

    Attributes:
        finished: whether the last continuation ended by itself, with an end token, rather than at its limit.
        interrupted: whether Ctrl-C ended the last continuation.
        written: token ids of the last continuation.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.finished = self.interrupted = False
        self.written: list[int] = []
        self.ends = end_tokens(model, tokenizer)
        self.reset()

    def reset(self, cache: AHNCache | None = None) -> None:
        """Start again with an empty cache, or go on with the given one."""
        self.cache = cache or AHNCache.for_model(self.model)
        self._before = self.cache.seen  # tokens of another session, whose ids are not known here
        self._ids: list[int] = []

    def copy(self) -> Session:
        """The same conversation with the same model, to go on in another way."""
        other = copy.copy(self)
        other.cache, other._ids = copy.deepcopy(self.cache), list(self._ids)
        return other

    @property
    def seen(self) -> int:
        return self._before + len(self._ids)

    def encode(self, text: str, start: bool) -> list[int]:
        """Token ids of a text; at the `start` with the tokenizer's own first token, if it has one.

        Raises:
            AHNError: the text holds bytes that are no UTF-8, as an argument or a terminal may give them.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise AHNError(f"The text is not UTF-8 (character {error.start + 1:,} of it).") from error
        with contextlib.ExitStack() as shown:
            if len(text) >= LONG:
                shown.enter_context(common.progress()).add_task("tokenising", total=None)
            return token_ids(self.tokenizer, text, special=start)

    def read(
        self,
        ids: Sequence[int],
        advance: Callable[[int], Any] = lambda tokens: None,
        interrupt: Interrupt | None = None,
    ) -> int:
        """Read token ids in chunks; `advance` is called with the number of tokens of each.

        Args:
            interrupt: stops when it is wanted; a chunk that was begun is then as if it had not been.

        Returns:
            How many were read: all of them, unless interrupted.

        Raises:
            AHNError: there is nothing to read and nothing was read before.
        """
        if not ids and not self.seen:
            raise AHNError("There is no text to read.")
        first = len(self._ids)
        self._ids += ids
        told = first
        for read in self._feed(self.cache.seen - self._before, len(self._ids) - 1, interrupt):
            advance(read - told)
            told = read
        if interrupt is not None and interrupt.wanted:
            del self._ids[max(told, first) :]
            return len(self._ids) - first
        advance(len(self._ids) - told)
        return len(ids)

    def take_back(self) -> None:
        """Leave the last token of what was just written out of the conversation: the cache has not read it yet."""
        self._ids.pop()

    def save(self, file: str) -> None:
        for _ in self._feed(self.cache.seen - self._before, len(self._ids)):
            pass
        self.reset(self.cache)
        self.cache.save(file)

    @torch.inference_mode()
    def _feed(self, start: int, stop: int, interrupt: Interrupt | None = None) -> Iterator[int]:
        chunks = in_chunks(self.model, self.cache, self._ids, start, stop, chunk_size(self.model))
        if interrupt is None:
            yield from (read for read, _ in chunks)
            return
        # A chunk takes seconds on a CPU: it stops between two layers, and a copy of the cache knows nothing of it. On
        # CUDA it is over sooner than that, and there may be no room for the copy.
        amid = self.model.device.type != "cuda"
        with interrupt.within(self.model) if amid else contextlib.nullcontext():
            kept = copy.deepcopy(self.cache) if amid else self.cache
            try:
                for read, _ in chunks:
                    yield read
                    if interrupt.wanted:
                        return
                    kept = copy.deepcopy(self.cache) if amid else self.cache
            except StoppedError:
                self.cache = kept

    @torch.no_grad()
    def write(
        self, sampling: Sampling, show: Callable[[str], Any] = lambda text: None, interrupt: Interrupt | None = None
    ) -> str:
        """Continue what was read, and return the text; `show` is called with every piece of it as it is written."""
        assert self._ids, "read something first"
        # A lookup wants the text; else transformers takes all of a text, or what the cache has not read.
        whole = sampling.lookup or not self._before
        new = self._ids if whole else self._ids[self.cache.seen - self._before :]
        tokens = torch.tensor([new], device=self.model.device)
        streamer = Pieces(self.tokenizer, self._ids, show)
        device = self.model.device
        with torch.random.fork_rng(devices=[device.index or 0] if device.type == "cuda" else []):
            torch.manual_seed(sampling.seed)
            output = generated(
                self.model,
                self.tokenizer,
                input_ids=tokens,
                attention_mask=torch.ones(1, self.seen, dtype=torch.long, device=tokens.device),
                streamer=streamer,
                stopping_criteria=None if interrupt is None else [interrupt],
                **{private.CACHE: self.cache},
                **sampling.arguments(self.ends),
            )
        self.written = output[0, len(new) :].tolist()
        self._ids += self.written
        self.finished = self.written[-1] in self.ends
        self.interrupted = interrupt is not None and interrupt.wanted and not self.finished
        return streamer.text

    def memory(self) -> dict[str, Any]:
        """What window, memory and cache hold, as JSON types."""
        config = self.cache.config
        return {
            "memory": config.memory,
            "window": config.window,
            "sinks": config.sinks,
            "quantized": config.quantized,
            "bits": config.tier_label,
            "tokens_seen": self.seen,
            "tokens_quantized": min(config.quantized, max(0, self.seen - config.lossless)),
            "tokens_in_memory": max(0, self.seen - config.lossless - config.quantized),
            "cache_bytes": self.cache.nbytes(),
        }


def open_session(
    model: str | None, adapter: str | None, device: str | None = None, dtype: str | None = None, **reach: Unpack[Reach]
) -> Session:
    """A session with the model and adapter that a user named; with the shipped ones if none was named."""
    from ahn.checkpoint.loading import ModelSource

    # What it says of texts beyond `max_position_embeddings` does not hold here; `warn_beyond_training` says what does.
    logging.getLogger("transformers.generation.stopping_criteria").setLevel(logging.ERROR)
    model, adapter, device = named_or_shipped(model, adapter, device)
    return Session(*ModelSource.open(model, adapter, **reach).load_ready(device, dtype))


def named_or_shipped(model: str | None, adapter: str | None, device: str | None) -> tuple[str, str | None, str | None]:
    """Directories and device for what a user named; of the shipped ones if no model was named, nor an adapter alone."""
    from ahn import tiny
    from ahn.checkpoint import shipped

    if model is None and adapter is not None:
        return adapter, None, device  # an adapter knows its base
    name = model or "tiny"
    if shipped.known(name) is tiny:
        device = device or TINY_DEVICE
    return shipped.resolve(name), shipped.resolve_adapter(name, adapter, TINY_MEMORY), device


def sentence(memory: dict[str, Any]) -> str:
    """`Session.memory` in words."""
    seen, written, coarse = memory["tokens_seen"], memory["tokens_in_memory"], memory["tokens_quantized"]
    size = f"cache {memory['cache_bytes'] / 2**20:.1f} MiB"
    if not written + coarse:
        return f"{seen:,} tokens, all of them exact (window {memory['window']:,}, sinks {memory['sinks']:,}); {size}"
    exact = f"the first {memory['sinks']:,} and the last {memory['window']:,} exact"
    if coarse:
        exact += f", {coarse:,} before them at {memory['bits']} per number"
    left = "forgotten" if get(memory["memory"]).forgets else f"in the memory ({memory['memory']})"
    return f"{seen:,} tokens: {exact}, {written:,} {left}; {size}"


def warn_beyond_training(session: Session, total: int) -> str | None:
    """A sentence if the model was not trained for positions up to `total`."""
    limit = getattr(session.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is None or total <= limit or 0 < session.cache.config.reach <= limit:
        return None  # no query sees a token from farther than the model was trained for
    return f"{total:,} tokens are more than the {limit:,} positions that this model was trained for."
