"""What `generate` is asked for, checked against what an AHN can do, before anything is computed."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ahn import private
from ahn.config import AHNConfig
from ahn.errors import AHNError

_DEFAULT_NEW_TOKENS = 20
"""What transformers generates where nobody says a length."""
_GUESSES = ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")


def checked(model: PreTrainedModel, kwargs: dict[str, Any], config: AHNConfig) -> dict[str, Any]:
    """The arguments for the base model's `generate`.

    Args:
        config: of the conversation that the text goes on.

    Raises:
        AHNError: something would go wrong once tokens leave the window, and they will.
    """
    ids = next(
        (kwargs[name] for name in ("input_ids", "inputs", "inputs_embeds") if kwargs.get(name) is not None), None
    )
    mask = kwargs.get("attention_mask")
    if isinstance(ids, Tensor):
        before = mask.shape[1] if isinstance(mask, Tensor) and mask.dim() == 2 else ids.shape[1]
        _check_guesses(model, kwargs, config, before)
        _check_padding(model, kwargs, config, before)
    kind = _asked(model, kwargs, "cache_implementation")
    if kind not in (None, "dynamic", "hybrid"):
        warnings.warn(
            f"cache_implementation={kind!r} is ignored: a model with an AHN keeps an ahn.AHNCache, whose size does not "
            f"grow. To keep it on the CPU, pass {private.CACHE}=ahn.AHNCache.for_model(model, offloading=True).",
            stacklevel=4,
        )
    return kwargs if kind is None else kwargs | {"cache_implementation": None}


def _check_guesses(model: PreTrainedModel, kwargs: dict[str, Any], config: AHNConfig, before: int) -> None:
    """Guessed tokens that turn out wrong are taken out of the cache again, which a memory cannot do."""
    assistant = kwargs.get("assistant_model")
    if assistant is None and not any(_asked(model, kwargs, name) for name in _GUESSES):
        return
    own = getattr(assistant, "ahn_config", None)
    lossless = min(config.lossless, config.lossless if own is None else own.lossless)
    # An assistant stops at the text's length, a lookup does not.
    ahead = _asked(model, kwargs, "num_assistant_tokens") if _asked(model, kwargs, "use_mtp") else None
    total = _length(model, kwargs, before) + int(_asked(model, kwargs, "prompt_lookup_num_tokens") or ahead or 0)
    if total > lossless:
        raise AHNError(
            "Guessing tokens ahead (assistant_model, prompt_lookup_num_tokens) works up to window + sinks = "
            f"{lossless} tokens, and text and guesses may have {total}: guesses that fail cannot be taken out of the "
            "memory again. Ask for fewer tokens, widen the window, or generate without guesses."
        )


def _check_padding(model: PreTrainedModel, kwargs: dict[str, Any], config: AHNConfig, before: int) -> None:
    """Padding on the right lies between real tokens once the text goes on."""
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or bool(mask[:, -1].all()):
        return
    total = _length(model, kwargs, before)
    if total > config.lossless:
        raise AHNError(
            f"attention_mask ends with padding, and the text may have {total} tokens, more than window + sinks = "
            f"{config.lossless}. Pad on the left (tokenizer.padding_side = 'left')."
        )


def _length(model: PreTrainedModel, kwargs: dict[str, Any], before: int) -> int:
    """Tokens that the text can have at most, those of the prompt and of the conversation before it included."""
    new, total = (_asked(model, kwargs, name) for name in ("max_new_tokens", "max_length"))
    if new is None and total is not None:
        return max(int(total), before)
    return before + int(_DEFAULT_NEW_TOKENS if new is None else new)


def _asked(model: PreTrainedModel, kwargs: dict[str, Any], name: str) -> Any:
    """An option of generation: an argument before the given configuration, and that before the model's own."""
    if name in kwargs:
        return kwargs[name]
    found = getattr(kwargs.get("generation_config"), name, None)
    return getattr(model.generation_config, name, None) if found is None else found
