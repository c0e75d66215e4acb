"""How a base model turns keys by their positions, where it can be repeated."""

from __future__ import annotations

import inspect
import sys
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ahn.layout.rotation import Rotation

_MOVING = ("dynamic", "longrope")
"""Types of RoPE whose angles change with the length of the text: a key cannot be turned back."""


def rotation_of(model: PreTrainedModel, attention: nn.Module) -> Rotation | None:
    """The rotation of a model whose layers have attention modules of this kind; None where it cannot be repeated.

    That is so without a rotary embedding of the decoder's own that takes positions alone (Gemma 3 has several, and
    models that see images give three positions per token), or where angles depend on the length of the text.
    """
    embedding: Any = getattr(model.get_decoder(), "rotary_emb", None)
    apply = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if embedding is None or apply is None or not _fits(apply, ("q", "k", "cos", "sin")):
        return None
    if not _fits(type(embedding).forward, ("self", "x", "position_ids")):
        return None
    config = model.config.get_text_config(decoder=True)
    parameters = getattr(config, "rope_parameters", None) or {}
    kind = str(getattr(embedding, "rope_type", "default"))
    if any(name in kind for name in _MOVING) or "mrope_section" in parameters:
        return None
    return Rotation(embedding, apply, float(getattr(embedding, "attention_scaling", 1.0)))


def _fits(function: Any, names: tuple[str, ...]) -> bool:
    """Whether a function takes arguments of these names first and can do without others."""
    parameters = list(inspect.signature(function).parameters.values())
    first, rest = parameters[: len(names)], parameters[len(names) :]
    optional = all(p.default is not p.empty or p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in rest)
    return tuple(p.name for p in first) == names and optional
