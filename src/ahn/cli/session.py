"""One model and one cache: read text of any length, then continue it. What `generate`, `chat` and `demo` share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ahn.cache.conversation import AHNCache
from ahn.errors import AHNError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CPU_CHUNK = 512
"""Tokens read at once on a CPU, which gains nothing from more; a progress bar gains from less."""
TINY_MEMORY = "gated_deltanet"
"""Memory of the shipped model that verbs take when no adapter is named."""
TINY_DEVICE = "cpu"
"""Where the shipped model runs unless told otherwise: a GPU would take longer to compile its kernels for it."""
SINKS_WITHOUT_MEMORY = 32
CONTEXT = 8
"""Tokens decoded together with a new one: what a token looks like depends on its neighbours."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 takes the most probable one.

    Raises:
        AHNError: a number is out of range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise AHNError(
                f"The temperature must be ≥ 0 and top-p in (0, 1], got {self.temperature:g} and {self.top_p:g}."
            )

    def choose(self, logits: Tensor, generator: torch.Generator) -> int:
        """A token by logits (V,)."""
        if self.temperature == 0:
            return int(logits.argmax())
        chances, order = (logits.float().cpu() / self.temperature).softmax(-1).sort(descending=True)
        # the smallest set of tokens that reaches top_p: a token stays if those before it do not reach it yet
        chances = chances.masked_fill(chances.cumsum(-1) - chances >= self.top_p, 0)
        return int(order[torch.multinomial(chances, 1, generator=generator)])


class Session:
    """A conversation of one model: everything read and written so far is in its cache.

    Attributes:
        finished: whether the last continuation ended by itself, with an end token, rather than at its limit.
        written: token ids of the last continuation.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.finished = False
        self.written: list[int] = []
        self.reset()

    def reset(self, cache: AHNCache | None = None) -> None:
        """Start again with an empty cache, or go on with the given one."""
        self.cache = cache or AHNCache.for_model(self.model)
        self._logits: Tensor | None = None
        self._tail: list[int] = []

    def encode(self, text: str, start: bool) -> list[int]:
        """Token ids of a text; at the `start` with the tokenizer's own first token, if it has one."""
        return self.tokenizer(text, add_special_tokens=start, verbose=False)["input_ids"]

    def read(self, ids: Sequence[int], advance: Callable[[int], Any] = lambda tokens: None) -> None:
        """Read token ids in chunks; `advance` is called with the number of tokens of each.

        Raises:
            AHNError: there is nothing to read and nothing was read before.
        """
        if not ids and self._logits is None:
            raise AHNError("There is no text to read.")
        size = self.cache.config.prefill_chunk_size
        if self.model.device.type == "cpu":
            size = min(size, CPU_CHUNK)
        for first in range(0, len(ids), size):
            chunk = ids[first : first + size]
            self._feed(chunk)
            advance(len(chunk))

    def write(self, sampling: Sampling) -> Iterator[str]:
        """Continue what was read, piece by piece of text. Every token is in the cache when the iterator is through."""
        assert self._logits is not None, "read something first"
        generator = torch.Generator().manual_seed(sampling.seed)
        ends = self._end_tokens()
        ids = list(self._tail)
        context, shown = 0, len(ids)
        self.finished, self.written = False, []
        while not self.finished and len(self.written) < sampling.max_new_tokens:
            token = sampling.choose(self._logits, generator)
            ids.append(token)
            self.written.append(token)
            self.finished = token in ends
            before, now = self._decode(ids[context:shown]), self._decode(ids[context:])
            if len(now) > len(before) and not now.endswith("\ufffd"):  # that is a character still without its last byte
                yield now[len(before) :]
                context, shown = max(0, shown - CONTEXT), len(ids)
            self._feed([token])
        rest = self._decode(ids[context:])[len(self._decode(ids[context:shown])) :]
        if rest:
            yield rest

    def memory(self) -> dict[str, Any]:
        """What the cache holds, as JSON types."""
        config, seen = self.cache.config, self.cache.seen
        return {
            "memory": config.memory,
            "window": config.window,
            "sinks": config.sinks,
            "quantized": config.quantized,
            "tokens_seen": seen,
            "tokens_quantized": min(config.quantized, max(0, seen - config.lossless)),
            "tokens_in_memory": max(0, seen - config.lossless - config.quantized),
            "cache_bytes": self.cache.nbytes(),
        }

    @torch.inference_mode()
    def _feed(self, ids: Sequence[int]) -> None:
        tokens = torch.tensor([list(ids)], device=self.model.device)
        output = self.model(input_ids=tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self._logits = output.logits[0, -1]
        self._tail = [*self._tail, *ids[-CONTEXT:]][-CONTEXT:]

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _end_tokens(self) -> set[int]:
        named = self.model.generation_config.eos_token_id
        several = named if isinstance(named, list) else [named]
        return {token for token in (*several, self.tokenizer.eos_token_id) if token is not None}


def open_session(
    model: str | None,
    adapter: str | None,
    window: int | None = None,
    sinks: int | None = None,
    quantized: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> Session:
    """A session with the model and adapter that a user named; with the shipped ones if none was named.

    Raises:
        AHNError: a model without a memory, or one that cannot be loaded.
    """
    from ahn.checkpoint.loading import Source

    if model is not None and adapter is None and _has_no_memory(model):
        return _without_memory(model, window, sinks, quantized, device, dtype)
    model, adapter, device = named_or_shipped(model, adapter, device)
    return Session(*Source.open(model, adapter, window, sinks, quantized).load_ready(device, dtype))


def _has_no_memory(model: str) -> bool:
    from ahn import shipped

    module = shipped.known(model)
    return module is not None and not module.adapters()


def _without_memory(
    model: str, window: int | None, sinks: int | None, quantized: int | None, device: str | None, dtype: str | None
) -> Session:
    """A model that no memory is shipped for yet: what leaves its window is forgotten."""
    import ahn
    from ahn import shipped
    from ahn.checkpoint.loading import Source
    from ahn.cli import common

    loaded, tokenizer = Source.open(shipped.resolve(model)).load_ready(device, dtype, memory=False)
    trained = loaded.config.max_position_embeddings
    sinks = SINKS_WITHOUT_MEMORY if sinks is None else sinks
    window = window or trained // 2 - sinks  # so that a long text shows what forgetting is, within the trained length
    ahn.attach(loaded, ahn.AHNConfig(memory="window_only", window=window, sinks=sinks, quantized=quantized or 0))
    common.err.print(f"ahn ships no memory for {model} yet: what leaves the window is forgotten.")
    return Session(loaded, tokenizer)


def named_or_shipped(model: str | None, adapter: str | None, device: str | None) -> tuple[str, str | None, str | None]:
    """Directories and device for what a user named; of the shipped ones if no model was named, nor an adapter alone."""
    from ahn import shipped, tiny

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
        exact += f", {coarse:,} before them at two bits a number"
    return f"{seen:,} tokens: {exact}, {written:,} in the memory ({memory['memory']}); {size}"


def warn_beyond_training(session: Session, total: int) -> str | None:
    """A sentence if the model was not trained for positions up to `total`."""
    limit = getattr(session.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is None or total <= limit:
        return None
    return f"{total:,} tokens are more than the {limit:,} positions that this model was trained for."
