"""Rows that hold several documents, whose positions begin anew with each: every document is read as if alone.

Collators that save padding make such rows (`DataCollatorWithFlattening`). transformers knows them by their positions,
without a cache and a mask, and lets no document see another. A window that leaves one document would meet the next, and
so would a memory; so a document that is longer than the window gets a forward of the decoder of its own here. The
others have one together, which is the base's: nothing leaves a window. Where the base has recurrent layers, which go on
from one document into the next, each has its own.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ahn import private
from ahn.decode import asked
from ahn.errors import AHNError
from ahn.model.context import BaseForward

WITH_IMAGES = "Rows that hold several documents with images are not supported; pad the documents instead."
_OF_KERNELS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
_OF_TOKENS = ("input_ids", "inputs_embeds", "position_ids", "per_layer_inputs")


class PackedDocument(NamedTuple):
    """Where a document lies: its row, its first token and the one behind its last."""

    row: int
    start: int
    stop: int

    @property
    def length(self) -> int:
        """In tokens."""
        return self.stop - self.start


class Separate(functools.partial):
    """The forward that `attach` puts before a decoder's own. A partial, whose first argument is the decoder."""


def documents(model: PreTrainedModel, kwargs: dict[str, Any]) -> list[PackedDocument]:
    """The documents of a forward by its arguments, in order; none where each row is one text, or goes on with one.

    Without a cache every jump of positions begins a document, as in transformers. Where a new cache is wanted, only a
    step back does: trainers leave `use_cache` as it is, and no text goes back.

    Raises:
        AHNError: boundaries for kernels alone, or in positions of several dimensions.
    """
    positions = kwargs.get("position_ids")
    if kwargs.get("attention_mask") is not None or kwargs.get(private.CACHE) is not None:
        return []
    if positions is None and kwargs.get(_OF_KERNELS[0]) is not None:
        raise AHNError("Rows that hold several documents need position_ids that begin anew with each.")
    if not isinstance(positions, Tensor) or positions.dim() < 2 or positions.shape[-1] < 2:
        return []
    if positions.dim() > 2:  # of text and of images; those of the text come first where they are given
        if len(positions) == 4 and bool((positions[0].diff() < 0).any()):
            raise AHNError(WITH_IMAGES)
        return []
    begins = positions.diff() < 0 if wants_cache(model, kwargs) else positions.diff() != 1
    if not bool(begins.any()):
        return []
    tokens = kwargs.get("input_ids")
    batch = len(kwargs["inputs_embeds"] if tokens is None else tokens)
    return [document for row, cuts in enumerate(begins.expand(batch, -1).cpu()) for document in _between(row, cuts)]


def wants_cache(model: PreTrainedModel, kwargs: dict[str, Any]) -> bool:
    """What `use_cache` resolves to."""
    use_cache = kwargs.get("use_cache")
    return bool(
        getattr(model.config.get_text_config(decoder=True), "use_cache", None) if use_cache is None else use_cache
    )


def _between(row: int, begins: Tensor) -> list[PackedDocument]:
    cuts = [0, *(begins.nonzero()[:, 0] + 1).tolist(), len(begins) + 1]
    return [PackedDocument(row, start, stop) for start, stop in itertools.pairwise(cuts)]


def forward(decoder: PreTrainedModel, model: PreTrainedModel, **kwargs: Any) -> Any:
    """The decoder's forward, with each document of each row in its place.

    Args:
        decoder: of `model`, which has the AHN.
        kwargs: as the hook on the decoder leaves them: by name, without `ahn_forward` if there are several documents.

    Raises:
        AHNError: more is asked for than hidden states.
    """
    several = [] if "ahn_forward" in kwargs else documents(model, kwargs)
    if not several:
        return type(decoder).forward(decoder, **kwargs)
    for more in ("output_attentions", "output_router_logits"):
        if asked(model, kwargs, more):
            raise AHNError(f"{more} is not given for rows that hold several documents; pad them instead.")
    as_tuple = asked(model, kwargs, "return_dict") is False
    rest = {name: x for name, x in kwargs.items() if name not in _OF_KERNELS}
    rest |= {"return_dict": True, "use_cache": False}
    # A recurrence would go on from one document into the next.
    together = 0 if model._ahn.recurrent_base else model.ahn_config.lossless
    short = [document for document in several if document.length <= together]
    output, found = None, dict[PackedDocument, list[Tensor]]()
    if short:
        lengths = [document.length for document in short]
        numbers = torch.arange(len(short)).repeat_interleave(torch.tensor(lengths))
        given = _joined(rest, short)
        numbers = numbers.to(given["position_ids"].device)
        output = decoder(**given, ahn_forward=BaseForward(model._ahn.kernel, numbers))
        parts = [x.split(lengths, dim=1) for x in _states(output)]
        found |= {document: [states[place] for states in parts] for place, document in enumerate(short)}
    for document in several:
        if document.length > together:
            output = decoder(**_joined(rest, [document]))
            found[document] = _states(output)
    assert output is not None
    rows = [[found[document] for document in several if document.row == row] for row in range(several[-1].row + 1)]
    last, *layers = (
        torch.cat([torch.cat([states[i] for states in row], dim=1) for row in rows]) for i in range(len(rows[0][0]))
    )
    output.last_hidden_state = last
    if output.hidden_states is not None:
        output.hidden_states = tuple(layers)
    return output.to_tuple() if as_tuple else output


def _joined(kwargs: dict[str, Any], chosen: list[PackedDocument]) -> dict[str, Any]:
    """The arguments for these documents alone, in one row."""
    given = {name: kwargs[name] for name in _OF_TOKENS if kwargs.get(name) is not None}
    return kwargs | {
        name: torch.cat([x[min(at.row, len(x) - 1), at.start : at.stop] for at in chosen])[None]
        for name, x in given.items()
    }


def _states(output: Any) -> list[Tensor]:
    """What an output has per token: the last hidden state, and those of all layers where they were asked for."""
    return [output.last_hidden_state, *(output.hidden_states or ())]
