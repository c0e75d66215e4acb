"""Reading with a pretrained model: losses of texts, facts asked through the chat, a whole book by position."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ahn.measure.reading import bytes_of_cache, chunk_size, losses, new_cache
from ahn.measure.texts import read_texts

AFRESH = 4096
"""Tokens after which a reading of a book begins anew, where it has no memory of what was before."""


class Asked(NamedTuple):
    """A chat: its tokens (L,), and where each of its answers stands among them."""

    ids: Tensor
    answers: list[slice]


def tokens_of(tokenizer: Any, text: str) -> Tensor:
    """All tokens (L,) of a text that `read_texts` knows."""
    parts = [part.text.strip() + "\n\n" for part in read_texts(text)]
    encoded = tokenizer(parts, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(list(itertools.chain.from_iterable(encoded)))


def pieces(ids: Tensor, length: int, count: int) -> Tensor:
    """So many pieces (count, length) of a text, evenly spaced."""
    starts = torch.linspace(0, len(ids) - length, count).long().tolist()
    return torch.stack([ids[start : start + length] for start in starts])


def read_chats(tokenizer: Any, file: Path, most: int) -> list[Asked]:
    """The first chats of a file of `make_chats.py`."""
    with file.open(encoding="utf-8") as lines:
        return [asked(tokenizer, json.loads(line)) for line in itertools.islice(lines, most)]


def asked(tokenizer: Any, chat: dict[str, Any]) -> Asked:
    """A chat as the model reads it, with its answers."""
    text = tokenizer.apply_chat_template(chat["messages"], tokenize=False)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    answers, at = [], 0
    for message, item in zip(chat["messages"][1::2], chat["asked"], strict=True):
        at = text.index(message["content"], at)
        first = at + message["content"].rindex(item["answer"])
        last = first + len(item["answer"])
        inside = [n for n, (begin, end) in enumerate(encoded["offset_mapping"]) if begin < last and end > first]
        answers.append(slice(inside[0], inside[-1] + 1))
        at += len(message["content"])
    return Asked(torch.tensor(encoded["input_ids"]), answers)


@torch.no_grad()
def logits_before(model: PreTrainedModel, ids: Tensor, wanted: Tensor, cache: Any) -> Tensor:
    """Logits (B, len(wanted), V) of the tokens at these places of ids (B, L), from the tokens before each."""
    return model(ids.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=wanted - 1).logits


def text_losses(model: PreTrainedModel, ids: Tensor, exact: int, batch: int) -> tuple[list[float], int]:
    """Of each text of ids (N, L) its mean loss beyond the exact tokens, and the bytes of one text's cache."""
    found, size = [], 0
    wanted = torch.arange(exact + 1, ids.shape[1])
    for some in ids.split(batch):
        cache = new_cache(model, len(some))
        logits = logits_before(model, some, wanted, cache)
        targets = some[:, wanted].to(logits.device)
        # One text at a time: float32 logits of all of them would take twice the memory again.
        found += [F.cross_entropy(row.float(), target).item() for row, target in zip(logits, targets, strict=True)]
        size = bytes_of_cache(cache) // len(some)
    return found, size


def recalled(model: PreTrainedModel, chats: list[Asked], batch: int = 1) -> tuple[list[bool], int]:
    """Of each answer in the chats, whether every token of it is the likeliest, and the bytes of one chat's cache.

    Args:
        batch: chats read at once. Shorter ones go on with their own last token, which changes nothing before it: rows
            that stand side by side are read faster than padded ones.
    """
    found, size = [], 0
    for first in range(0, len(chats), batch):
        some = chats[first : first + batch]
        length = max(len(chat.ids) for chat in some)
        ids = torch.stack([torch.cat([x.ids, x.ids[-1:].expand(length - len(x.ids))]) for x in some])
        places = [torch.cat([torch.arange(part.start, part.stop) for part in chat.answers]) for chat in some]
        wanted, cache = torch.cat(places).unique(), new_cache(model, len(some))
        best = logits_before(model, ids, wanted, cache).argmax(-1).cpu()
        for row, at in enumerate(places):
            right = best[row, torch.searchsorted(wanted, at)] == ids[row, at]
            found += [bool(part.all()) for part in right.split([x.stop - x.start for x in some[row].answers])]
        size = bytes_of_cache(cache) // len(some)
    return found, size


@torch.no_grad()
def by_position(model: PreTrainedModel, ids: Tensor, width: int, afresh: bool) -> tuple[list[float], int]:
    """Mean losses of a whole book ids (L,), of `width` tokens each, and the bytes of the last cache.

    Args:
        afresh: begin anew after every `AFRESH` tokens: what the text's own difficulty is, without anything from before.
    """
    ids = ids.to(model.device)
    known: list[Tensor] = []
    cache = new_cache(model)
    for start, stop in _readings(len(ids), AFRESH if afresh else len(ids)):
        cache = new_cache(model)
        known += [part for _, _, part in losses(model, cache, ids[start:stop], 0, stop - start, chunk_size(model))]
        known.append(ids.new_full((1,), -1, dtype=torch.float32))  # nothing comes before the next one's first token
    every = torch.cat(known)[: len(ids)]
    return [part[part >= 0].mean().item() for part in every.split(width)], bytes_of_cache(cache)


def _readings(length: int, at_once: int) -> Iterator[tuple[int, int]]:
    for start in range(0, length, at_once):
        yield start, min(start + at_once, length)
