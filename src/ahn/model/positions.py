"""How a base model turns keys by their positions, where it can be repeated."""

from __future__ import annotations

import functools
import inspect
import sys
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ahn import private
from ahn.errors import AHNError
from ahn.layout.rotation import Rotation
from ahn.wrappers import decoder_of

_MOVING = ("dynamic", "longrope")
"""Types of RoPE whose angles change with the length of the text: a key cannot be turned back."""


def rotation_of(model: PreTrainedModel, attention: nn.Module) -> Rotation | None:
    """The rotation of a model whose layers have attention modules of this kind; None where it cannot be repeated.

    That is so without a rotary embedding of the decoder's own that takes positions alone (Gemma 3 has several, and
    models that see images give three positions per token), where angles depend on the length of the text, or where
    layers turn keys only sometimes, or do more to them afterwards.
    """
    embedding: Any = getattr(decoder_of(model), "rotary_emb", None)
    apply = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if embedding is None or apply is None or not _fits(apply, ("q", "k", "cos", "sin")) or not _turns_last(attention):
        return None
    if not _fits(type(embedding).forward, ("self", "x", "position_ids")):
        return None
    config = model.config.get_text_config(decoder=True)
    parameters = getattr(config, "rope_parameters", None) or {}
    kind = str(getattr(embedding, "rope_type", "default"))
    several = "mrope_section" in parameters or hasattr(embedding, "mrope_section")
    if several or any(name in kind for name in _MOVING):
        return None
    return Rotation(embedding, apply, float(getattr(embedding, "attention_scaling", 1.0)))


def steady_up_to(model: PreTrainedModel) -> int | None:
    """Tokens of a text up to which the base turns keys by one set of angles, and all of a longer one by another.

    None where angles depend on positions alone. A key that is kept has the angles of when it was read, so a text that
    goes beyond has to do so in one forward, as in transformers.
    """
    embedding: Any = getattr(decoder_of(model), "rotary_emb", None)
    kind = str(getattr(embedding, "rope_type", "default"))  # some models have a dictionary, by types of layers
    if not any(name in kind for name in _MOVING):
        return None
    config = model.config.get_text_config(decoder=True)
    parameters = getattr(config, "rope_parameters", None) or {}
    found = [x for x in (parameters, *parameters.values()) if isinstance(x, dict)]
    lengths = [x.get("original_max_position_embeddings") for x in found]
    return min((x for x in lengths if isinstance(x, int)), default=config.max_position_embeddings)


class OwnAngles(functools.partial[Any]):
    """The forward of a rotary embedding in `_MOVING`, with the embedding: see `_own_angles`."""


def give_own_angles(model: PreTrainedModel) -> None:
    """Let angles follow from the positions that are asked for, and from nothing else."""
    for embedding in _moving_embeddings(model):
        private.set_forward(embedding, OwnAngles(_own_angles, embedding))


def take_own_angles(model: PreTrainedModel) -> None:
    """Undo `give_own_angles`."""
    for embedding in _moving_embeddings(model):
        private.reset_forward(embedding, OwnAngles)


def _moving_embeddings(model: PreTrainedModel) -> list[nn.Module]:
    """Of the decoder; some models have one for each kind of layer."""
    kinds = ((part, str(getattr(part, "rope_type", ""))) for part in decoder_of(model).modules())
    return [part for part, kind in kinds if any(name in kind for name in _MOVING)]


def _own_angles(embedding: Any, *args: Any, **kwargs: Any) -> Any:
    """Cosines and sines as of an embedding that has turned nothing before.

    transformers keeps in the module what the last text asked for. With `dynamic`, a shorter text would get the angles
    of a longer one that the model has read meanwhile; and of two threads one would turn by what the other has put
    there. Steps that are compiled run one after the other, and are of texts whose angles stay (`check_steady`).
    """
    forward = type(embedding).forward
    if torch.compiler.is_compiling():
        return forward(embedding, *args, **kwargs)
    fresh = object.__new__(type(embedding))
    vars(fresh).update(vars(embedding))
    buffers = dict(embedding.named_buffers(recurse=False))
    for name in [name for name in buffers if name.endswith("original_inv_freq")]:
        buffers[name.replace("original_", "")] = buffers[name].clone()  # transformers writes into it
    private.set_buffers(fresh, buffers)
    lengths = [name for name in vars(fresh) if name.endswith("max_seq_len_cached")]
    vars(fresh).update(dict.fromkeys(lengths, embedding.original_max_seq_len))
    return forward(fresh, *args, **kwargs)


def check_steady(limit: int | None, seen: int, total: int) -> None:
    """Raises AHNError if a text of so many tokens, of which some were read before, goes beyond `steady_up_to`."""
    if limit is not None and 0 < seen <= limit < total:
        raise AHNError(
            f"This base turns keys otherwise in texts of more than {limit} tokens (RoPE of the type longrope or "
            f"dynamic), {seen} were read before, and there may be {total}: read the whole text in one forward, or stay "
            "below."
        )


def _turns_last(attention: nn.Module) -> bool:
    """Whether what the layer does to its keys ends with a turn, in every layer that `rotates`.

    Cohere 2 turns keys in sliding layers alone, and says so nowhere but in its code; HunYuan scales them afterwards.
    """
    lines = inspect.getsource(type(attention).forward).splitlines()
    calls = [n for n, line in enumerate(lines) if "apply_rotary_pos_emb(" in line]
    body = len(lines[0]) - len(lines[0].lstrip()) + 4
    always = all(len(lines[n]) - len(lines[n].lstrip()) == body for n in calls)
    scaled = any("norm(" in line for line in lines[calls[-1] + 1 :]) if calls else False
    return bool(calls) and (always or hasattr(attention, "use_rope")) and not scaled


def rotates(attention: nn.Module) -> bool:
    """Whether the base turns the keys of this layer: some models have layers that do not (SmolLM3)."""
    return bool(getattr(attention, "use_rope", True))


def _fits(function: Any, names: tuple[str, ...]) -> bool:
    """Whether a function takes arguments of these names first and can do without others."""
    parameters = list(inspect.signature(function).parameters.values())
    first, rest = parameters[: len(names)], parameters[len(names) :]
    optional = all(p.default is not p.empty or p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in rest)
    return tuple(p.name for p in first) == names and optional
