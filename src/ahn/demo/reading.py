"""Reading one document chunk by chunk with a cache, measuring on the way. Logits of the whole text never exist."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ahn.demo.methods import Method, bytes_of, synchronize

CHUNK = 256
"""Tokens read at once, and so the number of rows of logits that exist. More is no faster on a CPU."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """What one document gave.

    Attributes:
        losses: (L - 1,) float32 on the CPU; entry t is the loss in nats of token t + 1, read up to token t.
        guesses: the most probable token at each asked position.
        cache_bytes: (tokens read, bytes of the cache) after every chunk.
        seconds: for all of it.
    """

    losses: Tensor
    guesses: list[int]
    cache_bytes: list[tuple[int, int]]
    seconds: float


@torch.inference_mode()
def read(
    model: PreTrainedModel,
    method: Method,
    ids: Sequence[int],
    asked: Sequence[int] = (),
    advance: Callable[[int], Any] = lambda tokens: None,
) -> Reading:
    """Read `ids` (L tokens) inside `method.on(model)`.

    Args:
        asked: positions whose token is to be guessed from those before it; all ≥ 1.
        advance: called with the number of tokens of every chunk.
    """
    cache = method.new_cache(model)
    tokens = torch.tensor(ids, device=model.device)
    wanted = torch.tensor(asked, dtype=torch.long, device=model.device) - 1
    losses, guesses, sizes = [], torch.zeros_like(wanted), []
    start = time.perf_counter()
    for first, logits, found in by_chunk(model, cache, tokens, 0, len(ids), CHUNK):
        losses.append(found)
        here = (wanted >= first) & (wanted < first + len(logits))
        guesses[here] = logits[wanted[here] - first].argmax(-1)
        synchronize(model)
        sizes.append((first + len(logits), bytes_of(cache)))
        advance(len(logits))
    seconds = time.perf_counter() - start
    return Reading(torch.cat(losses).cpu(), guesses.tolist(), sizes, seconds)


def by_chunk(
    model: PreTrainedModel, cache: Cache, tokens: Tensor, start: int, stop: int, size: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Read the tokens from `start` to `stop` of a document whose earlier ones are in the cache, `size` at a time.

    Args:
        tokens: (L,), all of the document: the token after a chunk is needed for the chunk's last loss.

    Yields:
        Of each chunk of n tokens the position of the first, the logits (n, V), and the float32 losses in nats of the
        tokens one further on, (n,): one fewer at the document's end.
    """
    for first in range(start, stop, size):
        last = min(first + size, stop)
        logits = model(input_ids=tokens[None, first:last], past_key_values=cache, use_cache=True).logits[0]
        targets = tokens[first + 1 : last + 1]
        yield first, logits, F.cross_entropy(logits[: len(targets)].float(), targets, reduction="none")
