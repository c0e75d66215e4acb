"""What `generate` is asked for, checked against what an AHN can do, before anything is computed."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ahn import private
from ahn.cache.conversation import AHNCache
from ahn.config import AHNConfig
from ahn.errors import AHNError
from ahn.model import masks
from ahn.model.positions import check_steady

_DEFAULT_NEW_TOKENS = 20
"""What transformers generates where nobody says a length."""
_OWN_GUESSES = ("assistant_early_exit", "use_mtp")
"""Guesses that the model makes itself, beside the cache that it reads with."""
_GUESSES = ("prompt_lookup_num_tokens", *_OWN_GUESSES)


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
        check_steady(model._ahn.steady, before, _length(model, kwargs, before))
    _check_healing(model, kwargs)
    kind = _asked(model, kwargs, "cache_implementation")
    if kind not in (None, "dynamic", "hybrid"):
        warnings.warn(
            f"cache_implementation={kind!r} is ignored: a model with an AHN keeps an ahn.AHNCache, whose size does not "
            f"grow. To keep it on the CPU, pass {private.CACHE}=ahn.AHNCache.for_model(model, offloading=True).",
            stacklevel=4,
        )
    return kwargs if kind is None else kwargs | {"cache_implementation": None}


def guesses(model: PreTrainedModel, kwargs: dict[str, Any]) -> bool:
    """Whether tokens are guessed ahead, to be read by this model and taken out again where they are wrong."""
    return kwargs.get("assistant_model") is not None or any(_asked(model, kwargs, name) for name in _GUESSES)


def _check_guesses(model: PreTrainedModel, kwargs: dict[str, Any], config: AHNConfig, before: int) -> None:
    """Tokens that were guessed wrong are taken out of the cache again: see `AHNCache.activate_past_recording`."""
    if not guesses(model, kwargs):
        return
    if model._ahn.recurrent_base and private.keeps_states(model):
        raise AHNError(
            "The recurrent layers of this base keep one state, from which tokens that were guessed wrong cannot be "
            "taken out again: generate without prompt_lookup_num_tokens and assistant_model."
        )
    drafter = kwargs.get("assistant_model")
    if getattr(drafter, "ahn_config", None) is not None and AHNCache.for_model(drafter).recurrent:
        raise AHNError(
            f"A {type(drafter).__name__} with an AHN cannot be the assistant_model: its layers keep one recurrent "
            "state, from which what was guessed wrong cannot be taken out again. Take another assistant, or "
            "prompt_lookup_num_tokens."
        )
    own = [name for name in _OWN_GUESSES if _asked(model, kwargs, name)]
    total = _length(model, kwargs, before) + int(_asked(model, kwargs, "num_assistant_tokens") or 0 if own else 0)
    if own and total > config.lossless:
        raise AHNError(
            f"{own[0]} works up to window + sinks = {config.lossless} tokens, and text and guesses may have {total}. "
            "Ask for fewer tokens, widen the window, or guess with prompt_lookup_num_tokens or an assistant_model."
        )
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and not bool(mask.all()) and total > config.lossless:
        raise AHNError(
            "Guessing tokens ahead (prompt_lookup_num_tokens, assistant_model) beyond window + sinks = "
            f"{config.lossless} tokens takes a prompt without padding. Leave it out: a single row needs none."
        )


def _check_healing(model: PreTrainedModel, kwargs: dict[str, Any]) -> None:
    """transformers makes the prompt's tokens anew, with padding for the token that begins a text."""
    tokenizer = kwargs.get("tokenizer")
    known = None not in (getattr(tokenizer, "bos_token_id", None), getattr(tokenizer, "pad_token_id", None))
    if _asked(model, kwargs, "token_healing") and not known:
        raise AHNError(
            "token_healing needs tokenizer=, with a bos_token and a pad_token: the prompt is read by it anew."
        )


def _check_padding(model: PreTrainedModel, kwargs: dict[str, Any], config: AHNConfig, before: int) -> None:
    """Padding on the right lies between real tokens once the text goes on."""
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or bool(mask[:, -1].all()):
        return
    if model._ahn.recurrent_base:
        raise AHNError(masks.GAP)
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
