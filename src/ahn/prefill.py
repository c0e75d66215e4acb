"""`forward` and `generate` of an adapted model: prompts longer than the lossless total are read in chunks."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache as memoize
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ahn.cache import AHNCache


def wrap(model: PreTrainedModel) -> None:
    """Put `forward` and `generate` of this module before the model's own, as attributes of the instance."""
    model.forward = MethodType(_like(type(model).forward, _forward), model)
    if hasattr(model, "generate"):
        model.generate = MethodType(_like(type(model).generate, _generate), model)


def unwrap(model: PreTrainedModel) -> None:
    """Undo `wrap`."""
    for name in ("forward", "generate"):
        model.__dict__.pop(name, None)


def _like(original: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        return ours(self, *args, **kwargs)

    call.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]  # generate() reads it
    call.__doc__ = original.__doc__
    return call


@memoize
def _positional(function: Callable[..., Any]) -> tuple[str, ...]:
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)[1:]


def by_name(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a method call by name."""
    return dict(zip(_positional(function), args, strict=False)) | kwargs


def wants_cache(model: PreTrainedModel, kwargs: dict[str, Any]) -> bool:
    """What `use_cache` resolves to."""
    use_cache = kwargs.get("use_cache")
    return bool(model.config.get_text_config(decoder=True).use_cache if use_cache is None else use_cache)


def _generate(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    config = kwargs.get("generation_config")
    use_cache = kwargs.get("use_cache", getattr(config, "use_cache", None))
    if model._ahn.enabled and use_cache is not False and kwargs.get("past_key_values") is None:
        kwargs["past_key_values"] = AHNCache.for_model(model)
    return type(model).generate(model, *args, **kwargs)


def _forward(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    base = type(model).forward
    kwargs = by_name(base, args, kwargs)
    pieces = _plan(model, kwargs)
    if len(pieces) < 2:
        return base(model, **kwargs)
    if kwargs.get("past_key_values") is None:
        kwargs["past_key_values"] = AHNCache.for_model(model)
    length, seen = pieces[-1][1], kwargs["past_key_values"].seen
    wanted = _wanted_rows(kwargs.pop("logits_to_keep", 0), length)
    logits: list[Tensor] = []
    for start, stop in pieces:
        rows = wanted[(wanted >= start) & (wanted < stop)] - start
        part = _slice(kwargs, start, stop, seen)
        # A chunk that no one asked about still needs one row: transformers reads "none" as "all".
        output = base(model, **part, logits_to_keep=rows if len(rows) else 1)
        if len(rows):
            logits.append(output.logits)
    output.logits = torch.cat(logits, dim=1)
    return output


def _plan(model: PreTrainedModel, kwargs: dict[str, Any]) -> list[tuple[int, int]]:
    """Chunks (start, stop) of the new tokens; a single one where chunking is not wanted."""
    tokens = kwargs.get("input_ids")
    if tokens is None:
        tokens = kwargs.get("inputs_embeds")
    if tokens is None or not model._ahn.enabled or torch.is_grad_enabled() or kwargs.get("labels") is not None:
        return []
    if kwargs.get("output_hidden_states") or kwargs.get("output_attentions") or kwargs.get("return_dict") is False:
        return []
    cache = kwargs.get("past_key_values")
    if not wants_cache(model, kwargs) or not (cache is None or isinstance(cache, AHNCache)):
        return []
    config = model.ahn_config if cache is None else cache.config
    seen, length = (0 if cache is None else cache.seen), tokens.shape[1]
    if seen + length <= config.lossless:
        return []  # nothing leaves the window: exactly the base model's own forward
    size = config.prefill_chunk_size
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _wanted_rows(logits_to_keep: int | Tensor, length: int) -> Tensor:
    if isinstance(logits_to_keep, Tensor):
        rows = logits_to_keep.cpu()
        return torch.where(rows < 0, rows + length, rows)
    return torch.arange(length - logits_to_keep if logits_to_keep else 0, length)


def _slice(kwargs: dict[str, Any], start: int, stop: int, seen: int) -> dict[str, Any]:
    """The arguments for new tokens start to stop, the first of which follows `seen` cached ones."""
    part = dict(kwargs)
    for name in ("input_ids", "inputs_embeds"):
        if part.get(name) is not None:
            part[name] = part[name][:, start:stop]
    if part.get("position_ids") is not None:
        part["position_ids"] = part["position_ids"][..., start:stop]
    mask = part.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        part["attention_mask"] = mask[:, : seen + stop]
    return part
