"""Rows that hold several documents, whose positions begin anew with each: every document is read as if alone.

Collators that save padding make such rows (`DataCollatorWithFlattening`). transformers knows them by their positions,
without a cache and a mask, and lets no document see another. A window that leaves one document would meet the next, and
so would a memory; so each document gets a forward of its own here, if one of them is longer than the window.
"""

from __future__ import annotations

import itertools
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ahn import private
from ahn.decode import asked
from ahn.errors import AHNError
from ahn.model.context import BaseForward

Documents: TypeAlias = list[list[tuple[int, int]]]
"""Of each row: first token and the one behind the last."""
_OF_KERNELS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
_OF_LOSSES = ("num_items_in_batch", "shift_labels", "ignore_index")


def documents(kwargs: dict[str, Any], wants_cache: bool) -> Documents:
    """The documents of a forward by its arguments; none where each row is one text, or goes on with one.

    Without a cache every jump of positions begins a document, as in transformers. Where a new cache is wanted, only a
    step back does: trainers leave `use_cache` as it is, and no text goes back.

    Raises:
        AHNError: boundaries for kernels alone.
    """
    positions = kwargs.get("position_ids")
    if kwargs.get("attention_mask") is not None or kwargs.get(private.CACHE) is not None:
        return []
    if positions is None and kwargs.get(_OF_KERNELS[0]) is not None:
        raise AHNError("Rows that hold several documents need position_ids that begin anew with each.")
    if not isinstance(positions, Tensor) or positions.dim() != 2 or positions.shape[1] < 2:
        return []
    begins = positions.diff() < 0 if wants_cache else positions.diff() != 1
    if not bool(begins.any()):
        return []
    tokens = kwargs.get("input_ids")
    batch = len(kwargs["inputs_embeds"] if tokens is None else tokens)
    return [_between(row) for row in begins.expand(batch, -1).cpu()]


def _between(begins: Tensor) -> list[tuple[int, int]]:
    cuts = [0, *(begins.nonzero()[:, 0] + 1).tolist(), len(begins) + 1]
    return list(itertools.pairwise(cuts))


def read(model: PreTrainedModel, kwargs: dict[str, Any], rows: Documents) -> Any:
    """What the model's forward gives, all documents of all rows in their places.

    Raises:
        AHNError: more is asked for than hidden states, logits and loss.
    """
    base = type(model).forward
    if max(stop - start for row in rows for start, stop in row) <= model.ahn_config.lossless:
        # Nothing leaves a window.
        return base(model, **kwargs | {"use_cache": False}, ahn_forward=BaseForward(model._ahn.kernel))
    for more in ("output_attentions", "output_router_logits"):
        if asked(model, kwargs, more):
            raise AHNError(f"{more} is not given for rows that hold several documents; pad them instead.")
    labels, keep = kwargs.pop("labels", None), kwargs.pop("logits_to_keep", 0)
    as_tuple = asked(model, kwargs, "return_dict") is False
    of_loss = {name: kwargs.pop(name) for name in _OF_LOSSES if name in kwargs}
    rest = {name: x for name, x in kwargs.items() if name not in _OF_KERNELS} | {
        "return_dict": True,
        "use_cache": False,
    }
    outputs = [[base(model, **_document(rest, row, *bounds)) for bounds in found] for row, found in enumerate(rows)]
    output, logits = outputs[-1][-1], _joined([[x.logits for x in row] for row in outputs])
    if output.hidden_states is not None:
        layers = range(len(output.hidden_states))
        output.hidden_states = tuple(_joined([[x.hidden_states[i] for x in row] for row in outputs]) for i in layers)
    output.logits = logits[:, slice(-keep, None) if isinstance(keep, int) else keep]
    if labels is not None:
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        output.loss = model.loss_function(logits=output.logits, labels=labels, vocab_size=vocabulary, **of_loss)
    return output.to_tuple() if as_tuple else output


def _document(kwargs: dict[str, Any], row: int, start: int, stop: int) -> dict[str, Any]:
    """The arguments for one document alone."""
    part = dict(kwargs)
    for name in ("input_ids", "inputs_embeds", "position_ids"):
        if part.get(name) is not None:
            x = part[name]
            part[name] = (x[row : row + 1] if len(x) > 1 else x)[:, start:stop]
    return part


def _joined(parts: list[list[Tensor]]) -> Tensor:
    """(B, L, …) of parts (1, n, …), by row and document."""
    return torch.cat([torch.cat(row, dim=1) for row in parts])
