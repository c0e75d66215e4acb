"""Reading one document chunk by chunk with a cache, measuring on the way. Logits of the whole text never exist."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

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
    for first in range(0, len(ids), CHUNK):
        part = tokens[first : first + CHUNK]
        logits = model(input_ids=part[None], past_key_values=cache, use_cache=True).logits[0]
        targets = tokens[first + 1 : first + 1 + CHUNK]
        losses.append(F.cross_entropy(logits[: len(targets)].float(), targets, reduction="none"))
        here = (wanted >= first) & (wanted < first + len(part))
        guesses[here] = logits[wanted[here] - first].argmax(-1)
        synchronize(model)
        sizes.append((first + len(part), bytes_of(cache)))
        advance(len(part))
    seconds = time.perf_counter() - start
    return Reading(torch.cat(losses).cpu(), guesses.tolist(), sizes, seconds)
