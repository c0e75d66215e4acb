"""Reading a text chunk by chunk with a cache: the logits of all of it never exist, and losses come on the way."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from ahn import private
from ahn.cache.conversation import AHNCache

CHUNK = 4096
"""Tokens of a chunk without an AHN, whose configuration says it otherwise."""
CPU_CHUNK = 256
"""On a CPU, which gains little from more; whoever looks at a progress bar, or stops it with Ctrl-C, gains from less."""


def new_cache(model: PreTrainedModel, batch: int | None = None) -> Cache:
    """An empty cache for a model with an AHN or without; without a batch size it takes the first forward's."""
    if getattr(model, "ahn_config", None) is not None:
        return AHNCache.for_model(model, batch_size=batch)
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def bytes_of_cache(cache: Cache) -> int:
    """Bytes of all tensors that a cache holds. To be asked before it decodes: an AHNCache rearranges itself for it."""
    if isinstance(cache, AHNCache):
        return cache.nbytes()
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.is_initialized)


def chunk_size(model: PreTrainedModel) -> int:
    """Tokens to read at once where only the last logits are wanted."""
    config = getattr(model, "ahn_config", None)
    size = CHUNK if config is None else config.chunk
    return min(size, CPU_CHUNK) if model.device.type == "cpu" else size


def in_chunks(
    model: PreTrainedModel, cache: Cache, ids: Sequence[int] | Tensor, start: int, stop: int, size: int, logits: int = 1
) -> Iterator[tuple[int, Tensor]]:
    """Read the tokens from `start` to `stop` of a text whose earlier ones are in the cache, `size` at a time.

    Args:
        ids: (L,) all of the text.
        logits: rows of logits wanted of each chunk, its last ones; 0 is all.

    Yields:
        After each chunk the position up to which the text is read, and the logits (rows, V).
    """
    for first in range(start, stop, size):
        last = min(first + size, stop)
        tokens = torch.as_tensor(ids[first:last], device=model.device)[None]
        output = model(input_ids=tokens, use_cache=True, logits_to_keep=logits, **{private.CACHE: cache})
        yield last, output.logits[0]


def losses(
    model: PreTrainedModel, cache: Cache, ids: Tensor, start: int, stop: int, size: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """As `in_chunks`, with the loss of every token.

    Args:
        ids: (L,) on the model's device: the token after a chunk is needed for the chunk's last loss.

    Yields:
        Of each chunk of n tokens the position of the first, the logits (n, V), and the float32 losses in nats of the
        tokens one further on, (n,): one fewer at the text's end.
    """
    for last, logits in in_chunks(model, cache, ids, start, stop, size, logits=0):
        first = last - len(logits)
        targets = ids[first + 1 : last + 1]
        yield first, logits, F.cross_entropy(logits[: len(targets)].float(), targets, reduction="none")
