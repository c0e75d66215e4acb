"""Reading one document, measuring on the way."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ahn.measure.clock import synchronize
from ahn.measure.reading import bytes_of_cache, losses, new_cache

CHUNK = 256
"""Tokens read at once, and so the number of rows of logits that exist. More is no faster on a CPU."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """What one document gave.

    Attributes:
        losses: (L - 1,) float32 on the CPU; entry t is the loss in nats of token t + 1, read up to token t.
        guesses: the most probable token at each asked position.
        cache_bytes: (tokens read, bytes of the cache) after every chunk.
    """

    losses: Tensor
    guesses: list[int]
    cache_bytes: list[tuple[int, int]]
    seconds: float


@torch.inference_mode()
def read(
    model: PreTrainedModel,
    ids: Sequence[int],
    asked: Sequence[int] = (),
    advance: Callable[[int], Any] = lambda tokens: None,
) -> Reading:
    """Read `ids` (L tokens) as the model is.

    Args:
        asked: positions whose token is to be guessed from those before it; all ≥ 1.
    """
    cache = new_cache(model)
    tokens = torch.tensor(ids, device=model.device)
    wanted = torch.tensor(asked, dtype=torch.long, device=model.device) - 1
    parts, guesses, sizes = [], torch.zeros_like(wanted), []
    start = time.perf_counter()
    for first, logits, found in losses(model, cache, tokens, 0, len(ids), CHUNK):
        parts.append(found)
        here = (wanted >= first) & (wanted < first + len(logits))
        guesses[here] = logits[wanted[here] - first].argmax(-1)
        synchronize(model.device)
        sizes.append((first + len(logits), bytes_of_cache(cache)))
        advance(len(logits))
    seconds = time.perf_counter() - start
    return Reading(torch.cat(parts).cpu(), guesses.tolist(), sizes, seconds)
