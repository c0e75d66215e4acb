"""`forward` and `generate` of an adapted model: prompts longer than the lossless total are read in chunks."""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterator
from functools import cache as memoize
from types import CodeType, MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ahn import decode, memory, private
from ahn.cache.conversation import AHNCache
from ahn.cache.progress import check_mask
from ahn.config import AHNConfig
from ahn.decode.compiled import leaves_fused
from ahn.errors import AHNError
from ahn.layout.anchors import anchor_moves, anchor_step, near_reach
from ahn.model import generation, masks, packing, pushing
from ahn.model.positions import check_steady
from ahn.wrappers import decoder_of

_OF_TOKENS = {
    "input_ids", "inputs_embeds", "attention_mask", "position_ids", "logits_to_keep", "token_type_ids",
    "mm_token_type_ids", "cache_position", *private.CACHE_NAMES,
}  # fmt: skip
"""Arguments that can be cut into chunks, or that every chunk can have."""
_KINDS = ("token_type_ids", "mm_token_type_ids")
"""What each token is: of the text, or of an image."""
_PER_TOKEN = ("input_ids", "position_ids", *_KINDS)


class Wrapped:
    """A method of one model with ours in front of it. A class, so that the model can be copied and pickled with it."""

    def __init__(self, model: PreTrainedModel, name: str, ours: Callable[..., Any]) -> None:
        self.model, self.name, self.ours = model, name, ours

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        adapter = getattr(self.model, "_ahn", None)
        if adapter is None:  # detached, inside what somebody put around this meanwhile
            return getattr(type(self.model), self.name)(self.model, *args, **kwargs)
        if not adapter.handles:
            raise AHNError(
                "The AHN was taken off through a shallow copy of this model (copy.copy), which has the same modules: "
                "load the model afresh, or copy with copy.deepcopy."
            )
        return self.ours(self.model, *args, **kwargs)

    @property
    def __code__(self) -> CodeType:  # torch.export reads it
        return getattr(type(self.model), self.name).__code__

    @property
    def __signature__(self) -> inspect.Signature:  # generate() and trainers read it
        return inspect.signature(MethodType(getattr(type(self.model), self.name), self.model))


def wrap(model: PreTrainedModel) -> None:
    """Put ours before the model's own `forward`, `generate` and `save_pretrained`, as attributes of the instance."""
    # accelerate's hook, if the model lies on several devices, stays the outermost: it would move what goes to a chunk.
    private.set_forward(model, Wrapped(model, "forward", _forward))
    decoder = decoder_of(model)
    if decoder is not model and private.has_own_forward(decoder):
        private.set_forward(decoder, packing.Separate(packing.forward, decoder, model))
    if hasattr(model, "generate"):
        model.generate = Wrapped(model, "generate", _generate)
        model.init_continuous_batching = Wrapped(model, "init_continuous_batching", _refuse_batching)
    setattr(model, private.REPLICATE, Wrapped(model, private.REPLICATE, _refuse_replicas))
    model.save_pretrained = Wrapped(model, "save_pretrained", pushing.save_pretrained)
    model.push_to_hub = Wrapped(model, "push_to_hub", pushing.push)


def unwrap(model: PreTrainedModel) -> None:
    """Undo `wrap`."""
    private.reset_forward(model, Wrapped)
    private.reset_forward(decoder_of(model), packing.Separate)
    for name in ("generate", "init_continuous_batching", private.REPLICATE, "save_pretrained", "push_to_hub"):
        if isinstance(model.__dict__.get(name), Wrapped):
            delattr(model, name)


@memoize
def _positional(function: Callable[..., Any]) -> tuple[str, ...]:
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)[1:]


def by_name(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a method call by name, the cache by that of this transformers."""
    named = dict(zip(_positional(function), args, strict=False)) | kwargs
    private.name_cache(named)
    return named


def gives_tokens(model: PreTrainedModel) -> bool:
    """Whether a model's output has logits per token: others (classes of a text, a bare decoder) read a text at once."""
    takes_rows = "logits_to_keep" in _positional(type(model).forward)  # so does Gemma 4's decoder, without a use for it
    return takes_rows and decoder_of(model) is not model


def _generate(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    kwargs = by_name(type(model).generate, args, kwargs)
    _check_tokens(_prompt(kwargs))
    config = kwargs.get("generation_config") or model.generation_config
    use_cache = kwargs.get("use_cache", config.use_cache)
    cache, drafts = kwargs.get(private.CACHE), bool(getattr(config, "is_assistant", False))
    if drafts and kwargs.get("attention_mask") is None and isinstance(kwargs.get("input_ids"), Tensor):
        # transformers would take the padding token for padding wherever the other model has written it.
        kwargs["attention_mask"] = torch.ones_like(kwargs["input_ids"])
    if model._ahn.enabled:
        kwargs = generation.checked(model, kwargs, cache.config if isinstance(cache, AHNCache) else model.ahn_config)
    if model._ahn.enabled and use_cache is not False and cache is None:
        kwargs[private.CACHE] = AHNCache.for_model(model)
    elif isinstance(cache, AHNCache) and kwargs.get("attention_mask") is None:
        ids = _prompt(kwargs)
        if ids is not None and cache.seen and ids.shape[1] <= cache.seen:
            raise AHNError(
                f"This cache has read {cache.seen} tokens, the input has {ids.shape[1]}. Give generate all tokens from "
                "the start, or only the new ones and an attention_mask over old and new "
                f"({cache.seen} + {ids.shape[1]})."
            )
    loop = decode.loop(model, kwargs, _prompt(kwargs)) if model._ahn.enabled else None
    with _recording(model, kwargs, drafts), _settled(kwargs.get(private.CACHE)):
        return type(model).generate(model, **kwargs if loop is None else kwargs | {"custom_generate": loop})


def _refuse_batching(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    raise AHNError(
        "transformers' continuous batching (generate_batch, transformers serve) keeps pages of keys and values, which "
        "have no place for a memory: use `ahn serve`, or generate."
    )


def _refuse_replicas(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    raise AHNError(
        "torch.nn.DataParallel copies a model to each GPU without its memory; the Trainer uses it on several GPUs. "
        "Start one process for each (torchrun, accelerate launch), or show one GPU (CUDA_VISIBLE_DEVICES=0)."
    )


def _check_tokens(ids: Any) -> None:
    """Raises AHNError unless these are token ids as a model reads them, (B, n)."""
    if ids is not None and (not isinstance(ids, Tensor) or ids.dim() < 2):
        given = f"one of {ids.dim()}" if isinstance(ids, Tensor) else f"a {type(ids).__name__}"
        raise AHNError(
            f"input_ids must be a tensor of two dimensions, rows and tokens, got {given}: "
            "tokenizer(text, return_tensors='pt') gives it, or torch.tensor([ids])."
        )


def _prompt(kwargs: dict[str, Any]) -> Any:
    """Of `generate`: token ids by one of their two names."""
    return kwargs.get("input_ids") if kwargs.get("inputs") is None else kwargs["inputs"]


@contextlib.contextmanager
def _settled(cache: Any) -> Iterator[None]:
    """A step of `generate` that was launched before its text was known to be finished is taken back, come what may."""
    try:
        yield
    finally:
        if isinstance(cache, AHNCache) and cache.ahead is not None:
            cache.ahead.settle()


@contextlib.contextmanager
def _recording(model: PreTrainedModel, kwargs: dict[str, Any], drafts: bool) -> Iterator[None]:
    """What `generate` reads may be taken out again where transformers asks for it, but not what is read afterwards.

    Args:
        drafts: the model drafts for another one, which takes out of the cache what it rejects before the next draft.
    """
    cache, ids = kwargs.get(private.CACHE), _prompt(kwargs)
    if not isinstance(cache, AHNCache):
        yield
        return
    before = cache.progress.recording
    if drafts:
        cache.activate_past_recording()
    elif isinstance(ids, Tensor) and generation.guesses(model, kwargs):
        mask = kwargs.get("attention_mask")
        length = mask.shape[1] if isinstance(mask, Tensor) and mask.dim() == 2 else ids.shape[1]
        cache.progress.given_again = max(0, ids.shape[1] - (length - cache.seen))
        cache.progress.whole_mask = mask if length > ids.shape[1] else None
    try:
        yield
    finally:
        cache.progress.given_again, cache.progress.whole_mask = 0, None
        for layer in cache.layers:
            if hasattr(layer, "record_past") and not drafts:
                layer.record_past = before


def _forward(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    base = type(model).forward
    kwargs = by_name(base, args, kwargs)
    _check_tokens(kwargs.get("input_ids"))
    cache = kwargs.get(private.CACHE)
    if isinstance(cache, AHNCache) and cache.progress.given_again:
        kwargs = _new_tokens(kwargs, cache.progress.given_again)
        cache.progress.given_again = 0
    if isinstance(cache, AHNCache) and isinstance(kwargs.get("attention_mask"), Tensor):
        kwargs = _whole_mask(kwargs, cache)
    if (torch.compiler.is_exporting() or torch.jit.is_tracing()) and model._ahn.enabled:
        raise AHNError(
            "A model with an AHN cannot be exported or traced: what it computes depends on how much was read. Export "
            "the base (ahn.detach), or use torch.compile."
        )
    if isinstance(cache, AHNCache):
        if model._ahn.steady is not None and isinstance(ids := kwargs.get("input_ids"), Tensor):
            check_steady(model._ahn.steady, cache.seen, cache.seen + ids.shape[1])  # a captured step asks nobody
        cache.progress.undoable = _undoable(kwargs.get("logits_to_keep", 0))
    if (step := decode.forward(model, kwargs)) is not None:
        return step
    if model._ahn.makes_masks:
        kwargs = _from_the_start(kwargs, cache)
    pieces = _plan(model, kwargs)
    if len(pieces) < 2:
        return packing.forward(model, model, **kwargs) if decoder_of(model) is model else base(model, **kwargs)
    if cache is None:
        cache = kwargs[private.CACHE] = AHNCache.for_model(model)
    length, seen = pieces[-1][1], cache.seen
    if model._ahn.makes_masks:  # no new token is of an image
        kwargs = {name: x for name, x in kwargs.items() if name not in _KINDS}
    wanted = _wanted_rows(kwargs.pop("logits_to_keep", 0), length)
    rows, order = wanted.sort()
    logits: list[Tensor] = []
    with leaves_fused(model):
        for start, stop in pieces:
            inside = rows[(rows >= start) & (rows < stop)] - start
            part = _slice(kwargs, start, stop, seen)
            if cache.progress.recording:
                cache.progress.undoable = stop - start - int(inside[0]) if len(inside) else 0
            # A chunk that no one asked about still needs one row: transformers reads "none" as "all".
            output = base(model, **part, logits_to_keep=inside if len(inside) else 1)
            if len(inside) or stop == length:  # a view of none of its rows would hold that one to the end
                logits.append(output.logits[:, : len(inside)])
    output.logits = torch.cat(logits, dim=1)
    if not torch.equal(wanted, rows):
        output.logits = output.logits[:, order.argsort()]
    return output


def _new_tokens(kwargs: dict[str, Any], first: int) -> dict[str, Any]:
    """The arguments without the first tokens, which were read before; an attention_mask is over all of them anyway."""
    length = kwargs["input_ids"].shape[1]
    own = {name: x for name, x in kwargs.items() if name in _PER_TOKEN and isinstance(x, Tensor)}
    return kwargs | {name: x[..., first:] for name, x in own.items() if x.shape[-1] == length}


def _whole_mask(kwargs: dict[str, Any], cache: AHNCache) -> dict[str, Any]:
    """With the mask's columns for what the cache had read, where transformers cut them off."""
    mask, ids = cache.progress.whole_mask, kwargs.get("input_ids")
    if mask is None or ids is None:
        return kwargs
    columns = cache.seen + ids.shape[1]
    return kwargs | {"attention_mask": F.pad(mask[:, :columns], (0, max(0, columns - mask.shape[1])), value=1)}


def _from_the_start(kwargs: dict[str, Any], cache: Any) -> dict[str, Any]:
    """Kinds of tokens from the beginning of the text, as masks are made of them, where the new ones' were given."""
    given = {name: kwargs[name] for name in _KINDS if isinstance(kwargs.get(name), Tensor)}
    seen = cache.seen if isinstance(cache, AHNCache) else 0
    new = next((x.shape[1] for name in ("input_ids", "inputs_embeds") if (x := kwargs.get(name)) is not None), 0)
    return kwargs | {name: F.pad(x, (seen, 0)) for name, x in given.items() if x.shape[1] == new}


def _undoable(logits_to_keep: int | Tensor) -> int | None:
    """How many of the last tokens may turn out wrong: those of which somebody wants to see logits; None for all."""
    return None if isinstance(logits_to_keep, Tensor) else logits_to_keep or None


def _plan(model: PreTrainedModel, kwargs: dict[str, Any]) -> list[tuple[int, int]]:
    """Chunks (start, stop) of the new tokens; a single one where chunking is not wanted."""
    tokens = kwargs.get("input_ids")
    if tokens is None:
        tokens = kwargs.get("inputs_embeds")
    if tokens is None or not gives_tokens(model) or _not_tokens_alone(model, kwargs, tokens.shape[1]):
        return []
    if not model._ahn.enabled or torch.is_grad_enabled() or kwargs.get("labels") is not None:
        return []
    if any(decode.asked(model, kwargs, name) for name in decode.MORE_OUTPUTS):
        return []
    if decode.asked(model, kwargs, "return_dict") is False:
        return []
    cache = kwargs.get(private.CACHE)
    if not packing.wants_cache(model, kwargs) or not (cache is None or isinstance(cache, AHNCache)):
        return []
    if packing.documents(model, kwargs):
        return []
    config: AHNConfig = model.ahn_config if cache is None else cache.config
    seen, length = (0 if cache is None else cache.seen), tokens.shape[1]
    mask = kwargs.get("attention_mask")
    _check_lengths(mask, kwargs.get("position_ids"), seen, length)
    if model._ahn.recurrent_base:
        masks.check_gaps(mask, length)
    if not length:
        return []  # the base says what is wrong
    if model._ahn.steady is not None and seen + length > model._ahn.steady:
        return []  # each chunk would have angles of its own
    # While nothing leaves the window it is exactly the base model's own forward.
    size = _most(config, mask, seen + length) if seen + length > config.lossless else length
    full = min(max(config.lossless - seen, 0), length)  # a chunk either fills the window or finds it full
    cuts = {*range(0, full, size), *range(full, length, size), length}
    if config.reach and model._ahn.rotation is not None and seen + length > config.reach:
        cuts |= {column - seen for column in _anchor_moves(mask, seen, seen + length, config.reach)}
    return list(itertools.pairwise(sorted(cuts | _gaps(mask, length))))


def _check_lengths(mask: Any, positions: Any, seen: int, length: int) -> None:
    """Raises AHNError where a chunk would be given a part of what does not fit the whole."""
    if isinstance(mask, Tensor):
        check_mask(mask, seen, length)
    if isinstance(positions, Tensor) and positions.shape[-1] != length:
        raise AHNError(f"position_ids has {positions.shape[-1]} columns; expected {length}, one per new token.")


def _not_tokens_alone(model: PreTrainedModel, kwargs: dict[str, Any], length: int) -> bool:
    """Whether a prompt has images or the like, or what a token does depends on more than the tokens before it: on what
    the model noted of an earlier prompt, or on how much comes at once."""
    kinds = [x[:, -length:] for name in _KINDS if isinstance(x := kwargs.get(name), Tensor)]
    if model._ahn.makes_masks and any(bool(x.any()) for x in kinds):
        return True
    if any(getattr(x, "alora_invocation_tokens", None) for x in (getattr(model, "peft_config", None) or {}).values()):
        return True  # PEFT's aLoRA counts, from the end of what a forward reads, where it begins to act
    others = (x for name, x in kwargs.items() if name not in _OF_TOKENS)
    return hasattr(model.base_model, "rope_deltas") or any(isinstance(x, Tensor | dict | list) for x in others)


def _most(config: AHNConfig, attention_mask: Any, total: int) -> int:
    """Tokens of a chunk: in padded rows no more than in which far keys move once, at a column of each row's own."""
    padded = isinstance(attention_mask, Tensor) and attention_mask.dim() == 2 and not bool(attention_mask.all())
    if not (padded and config.reach and memory.get(config.memory).moves_keys):
        return config.chunk
    near = near_reach(config.reach, config.lossless + config.quantized)
    return min(config.chunk, anchor_step(near)) if total > near else config.chunk


def _anchor_moves(attention_mask: Any, seen: int, total: int, reach: int) -> set[int]:
    """The new columns, from `seen` to `total`, in which an anchor of some row moves."""
    pads = {0}
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        pads = set((total - attention_mask.sum(-1)).tolist())
    return {move + pad for pad in pads for move in anchor_moves(seen - pad, total - pad - 1, reach)}


def _gaps(attention_mask: Any, length: int) -> set[int]:
    """Columns of the new tokens where padding begins between real tokens of a row.

    A chat's next turn has them: the last answer's last token is read together with the next, left-padded message.
    """
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2 or length == 1:
        return set()
    real = attention_mask[:, -length:].bool()
    if bool(real.all()):
        return set()
    follows = real.flip(1).int().cummax(1).values.flip(1).bool()  # this token or a later one of the row is real
    begins = real[:, :-1] & ~real[:, 1:] & follows[:, 1:]
    return {column + 1 for column in begins.any(0).nonzero()[:, 0].tolist()}


def _wanted_rows(logits_to_keep: int | Tensor, length: int) -> Tensor:
    if isinstance(logits_to_keep, Tensor):
        rows = logits_to_keep.cpu()
        return torch.where(rows < 0, rows + length, rows)
    return torch.arange(max(0, length - logits_to_keep) if logits_to_keep else 0, length)


def _slice(kwargs: dict[str, Any], start: int, stop: int, seen: int) -> dict[str, Any]:
    """The arguments for new tokens start to stop, the first of which follows `seen` cached ones."""
    part = dict(kwargs)
    for name in ("input_ids", "inputs_embeds"):
        if part.get(name) is not None:
            part[name] = part[name][:, start:stop]
    for name in ("token_type_ids", "mm_token_type_ids"):
        if part.get(name) is not None and part[name].shape[-1] > stop - start:
            part[name] = part[name][:, start:stop]
    if part.get("position_ids") is not None:
        part["position_ids"] = part["position_ids"][..., start:stop]
    mask = part.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        part["attention_mask"] = mask[:, : seen + stop]
    return part
