"""How exact attention is computed in one forward: chosen once, the same for all layers that are alike.

`choose` knows the ways and when each is right; a `Route` is one of them. What does not depend on the forward alone (a
layer's device, its own scores, a memory with keys of its own) is in the arguments of `choose`.
"""

from __future__ import annotations

import dataclasses
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import Any, ClassVar, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ahn.attend import spans, windowed
from ahn.attend.merge import merge
from ahn.attend.part import Part
from ahn.attend.spans_blocks import Columns
from ahn.cache import tier
from ahn.cache.tier import Passed, Seen
from ahn.layout.tier import TierView
from ahn.layout.visibility import Visibility
from ahn.memory.base import MemoryKeys, SeenKeys
from ahn.model import more_keys
from ahn.model.masks import LazyMask

Attended: TypeAlias = tuple[Tensor, Tensor | None]
_DENSE_MASK_KERNELS = ("sdpa", "eager")
QUERIES = 1024
"""At once where every head has a mask of its own."""
SHORT = 4096
"""A window of fewer tokens is."""


@dataclasses.dataclass
class AttentionCall:
    """What transformers calls an attention function with.

    Attributes:
        query: (B, Hq, n, P); key, value: (B, Hkv, T, P).
        kwargs: for the base model's own kernel.
        of_memory: the queries that read the memory, keys and values of the tokens that leave the window; None where
            they have yet to be cut out.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    kwargs: dict[str, Any]
    of_memory: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def scaling(self) -> float:
        """Of the scores."""
        return float(self.kwargs.get("scaling") or self.query.shape[-1] ** -0.5)


class Route(ABC):
    """One way to compute exact attention over sinks, window and tier."""

    tier_in_order: ClassVar[bool] = False
    """It wants the tier's tokens in the order of the text; see `ahn.cache.tier.push`."""
    tier_raw: ClassVar[bool] = False
    """It can do with the tier's tokens neither rotated back nor with their offsets; see `ahn.cache.tier.push`."""

    @abstractmethod
    def attend(self, call: AttentionCall, passed: Passed | None, made: MemoryKeys | None) -> Attended:
        """(B, n, Hq, P), and the weights where the base kernel gives them.

        Args:
            passed: of the tier, if there is one.
            made: keys that the memory has made of what left.
        """


@dataclasses.dataclass
class Masked(Route):
    """The base model's kernel, or one that takes a mask per query and key.

    Attributes:
        mask: as the kernel takes it, or boolean (B or 1, 1, n, T) with `boolean`; None if every key is visible.
    """

    kernel: str
    mask: Any
    boolean: bool

    def attend(self, call: AttentionCall, passed: Passed | None, made: MemoryKeys | None) -> Attended:
        key, value, mask = call.key, call.value, self.mask
        if passed is not None:
            mask = more_keys.with_more_masks(mask, key.shape[2], passed.near)
            key, value = more_keys.with_more_keys(key, value, passed.near)
        if passed is not None and passed.far is not None:
            # One softmax over keys that meet the query in two ways: each has numbers of its own to meet.
            P, far = call.query.shape[-1], passed.far
            query = torch.cat([call.query, passed.far_query(call.query)], dim=-1)
            call = dataclasses.replace(call, query=query, kwargs=call.kwargs | {"scaling": call.scaling})
            more = Seen(F.pad(far.key, (P, 0)), far.value, far.visible)
            mask = more_keys.with_more_masks(mask, key.shape[2], more)
            key, value = more_keys.with_more_keys(F.pad(key, (0, P)), value, more)
        if made is None:
            return self._run(call, key, value, mask)
        return together([self._piece(call, key, value, mask, more) for more in made.pieces])

    def _piece(
        self, call: AttentionCall, key: Tensor, value: Tensor, mask: Tensor | None, more: SeenKeys
    ) -> tuple[Tensor, Tensor | None]:
        """Some of the queries, which see more keys."""
        some = slice(more.first, more.last)
        call = dataclasses.replace(call, query=call.query[:, :, some])
        mask = None if mask is None else mask[:, :, some]
        own = more_keys.of_all_heads(more, key.shape[1])
        if missing := key.shape[-1] - own.key.shape[-1]:  # a far tier's numbers
            own = dataclasses.replace(own, key=F.pad(own.key, (0, missing)))
        known, whole = self._latest.get(more.first, (None, None))
        if known is None or known is not more.visible:
            whole = more_keys.with_more_masks(mask, key.shape[2], own)
            assert whole is not None
            if more.bias is not None:
                whole = more_keys.with_bias(whole, more.bias, own.key.shape[2], call.query.dtype)
            if whole.shape[1] == 1 and more.heads is None:
                whole = more_keys.aligned(more_keys.as_added(whole, self.kernel, call.query.dtype))
                self._latest[more.first] = more.visible, whole
        return self._run(call, *more_keys.with_more_keys(key, value, own), whole)

    @cached_property
    def _latest(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Of each piece what a memory let all heads see, and the mask with it: the next layer's may be the same."""
        return {}

    def _run(self, call: AttentionCall, key: Tensor, value: Tensor, mask: Any) -> tuple[Tensor, Tensor | None]:
        if self.boolean and mask is not None and mask.shape[1] > 1:
            return self._per_head(call, key, value, mask)
        if self.boolean:
            mask = more_keys.as_kernel_mask(mask, self.kernel, call.query.dtype)
        run = kernel_function(self.kernel, call.module)
        return run(call.module, call.query, key, value, mask, **call.kwargs)

    def _per_head(self, call: AttentionCall, key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """With a mask (B or 1, Hkv, n, T), of which kernels want a copy per query head: some queries at a time."""
        run, groups, results = kernel_function(self.kernel, call.module), call.query.shape[1] // mask.shape[1], []
        for query, part in zip(call.query.split(QUERIES, dim=2), mask.split(QUERIES, dim=2), strict=True):
            own = more_keys.as_kernel_mask(part.repeat_interleave(groups, dim=1), self.kernel, query.dtype)
            results.append(run(call.module, query, key, value, own, **call.kwargs))
        return together(results)


@dataclasses.dataclass
class Windowed(Route):
    """Dense kernels over the parts of a chunk; see `ahn.attend.windowed`."""

    view: Visibility
    tier_in_order: ClassVar[bool] = True

    def attend(self, call: AttentionCall, passed: Passed | None, made: MemoryKeys | None) -> Attended:
        tier, more = _bands(call, passed), more_keys.parts_of_memory(call.query, call.key.shape[1], made, call.scaling)
        out = windowed.attend(call.query, call.key, call.value, self.view, call.scaling, tier, more)
        return out.transpose(1, 2), None


@dataclasses.dataclass
class Spanned(Route):
    """One kernel for each of window and tier, which knows when each key is seen; see `ahn.attend.spans`.

    Where the window is short `Windowed` would start dozens of small kernels a layer, each for little work.
    """

    view: Visibility
    tier_in_order: ClassVar[bool] = True

    def attend(self, call: AttentionCall, passed: Passed | None, made: MemoryKeys | None) -> Attended:
        parts = [spans.part(call.query, call.key, call.value, self._window, call.scaling)]
        parts += [self._band(band, call.scaling) for band in _bands(call, passed)]
        parts += more_keys.parts_of_memory(call.query, call.key.shape[1], made, call.scaling)
        return merge(parts).transpose(1, 2), None

    @cached_property
    def _window(self) -> Columns:
        return Columns(self.view.until, self.view.length)

    def _band(self, band: windowed.Band, scaling: float) -> Part:
        missing, key, value = -band.held, band.key, band.value
        if missing > 0:  # columns that nobody sees: there are as many as queries at least
            key, value = (F.pad(x, (0, 0, missing, 0)) for x in (key, value))
        kind = key.shape[2], missing, band.width
        if kind not in self._columns:
            columns = Columns.of_band(max(band.held, 0), self.view.length, band.width, key.device)
            columns.until[..., : max(missing, 0)].zero_()
            self._columns[kind] = columns
        return spans.part(band.query, key, value, self._columns[kind], scaling)

    @cached_property
    def _columns(self) -> dict[tuple[int, int, int], Columns]:
        return {}


@dataclasses.dataclass
class SpanRoute(Route):
    """Kernels that know when each key is seen, with gradients; see `ahn.attend.spans`."""

    view: Visibility

    def attend(self, call: AttentionCall, passed: Passed | None, made: MemoryKeys | None) -> Attended:
        out = spans.attend(call.query, call.key, call.value, self._columns, call.scaling)
        return out.transpose(1, 2), None

    def with_memory(self, call: AttentionCall) -> AttentionCall:
        """The same call, with gradients of what the memory takes added to attention's in place."""
        view = self.view
        evicted = view.sinks, view.sinks + view.evicted
        query, of_query = spans.WithPart.apply(call.query, view.length - view.evicted, view.length)
        key, of_key = spans.WithPart.apply(call.key, *evicted)
        value, of_value = spans.WithPart.apply(call.value, *evicted)
        return dataclasses.replace(call, query=query, key=key, value=value, of_memory=(of_query, of_key, of_value))

    @cached_property
    def _columns(self) -> Columns:
        return Columns(self.view.until, self.view.length)


@dataclasses.dataclass
class WholeTier(Route):
    """A single query that sees everything that is held, exactly or in the tier; see `ahn.cache.tier.attend`."""

    tier_in_order: ClassVar[bool] = True
    tier_raw: ClassVar[bool] = True

    def attend(self, call: AttentionCall, passed: Passed | None, made: MemoryKeys | None) -> Attended:
        assert passed is not None
        out = tier.attend(call.query, call.key, call.value, passed, call.scaling)
        return out.transpose(1, 2), None


def choose(
    view: Visibility,
    tier_view: TierView | None,
    kernel: str,
    base_mask: LazyMask | None,
    query: Tensor,
    kwargs: dict[str, Any],
    cached: bool,
    memory_keys: bool,
) -> Route:
    """The fastest way that is right.

    Args:
        kernel: the base model's own attention implementation.
        base_mask: None where the view is of a part of a forward.
        query: of any layer that is like this one.
        kwargs: of the attention function.
        cached: the forward has a cache.
        memory_keys: the memory has keys that exact attention sees.
    """
    ahead = None if base_mask is None else base_mask.ahead(query.device)
    # "eager" is asked for where its weights are wanted.
    parts = kernel != "eager" and not own_scores(kwargs) and ahead is None
    if parts and cached and _short(view, query):
        return Spanned(view)
    if parts and windowed.applies(view, query) and (tier_view is None or tier_view.banded):
        return Windowed(view)
    plain = parts and not memory_keys
    if plain and not cached and _spans_apply(view, query, kwargs):
        return SpanRoute(view)
    if base_mask is not None and not (view.evicted or view.rolled or view.moved) and base_mask.covers(view):
        # Nothing has left the window: exactly the base model, with its own mask.
        return Masked(kernel, base_mask.resolve(kernel, query.device), boolean=False)
    mask = view.held_mask if cached else view.mask
    if ahead is not None:
        assert mask is not None  # several queries
        mask = mask | F.pad(ahead, (mask.shape[-1] - view.length, 0))
    single = plain and view.length == 1 and mask is None and view.evicted > 0
    if single and tier_view is not None and tier_view.full and windowed.supported(query):
        return WholeTier()
    return Masked(dense_mask_kernel(kernel, kwargs), mask, boolean=True)


def _short(view: Visibility, query: Tensor) -> bool:
    """Whether this is a chunk after others, or over the window's edge, for which `Spanned` is right and the faster way.

    It is where dense kernels would have little to do, or know no float32.
    """
    inference = not torch.is_grad_enabled() and not torch.is_autocast_enabled(query.device.type)
    fits = inference and view.length > 1 and not (view.padded or view.moved) and spans.supported(query)
    return fits and view.seen + view.evicted > 0 and (view.window < SHORT or not windowed.supported(query))


def _bands(call: AttentionCall, passed: Passed | None) -> list[windowed.Band]:
    """The tier as queries see it that are in the order of the text."""
    if passed is None:
        return []
    bands = [windowed.Band(call.query, passed.near.key, passed.near.value, passed.view.near)]
    if passed.far is not None:
        width = passed.view.capacity - passed.view.near
        bands.append(windowed.Band(passed.far_query(call.query), passed.far.key, passed.far.value, width))
    return bands


def _spans_apply(view: Visibility, query: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether kernels that know spans can do this forward without a cache: the student's while it learns."""
    unpadded = view.evicted > 0 and not view.padded and not view.moved and not view.quantized
    return unpadded and not kwargs.get("dropout") and spans.supported(query)


def kernel_function(kernel: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """transformers' attention function of that name; "eager" lives in the module's own modeling file."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(kernel, eager)


def dense_mask_kernel(kernel: str, kwargs: dict[str, Any]) -> str:
    """A kernel that takes a mask per query and key and computes what the base model's own one does."""
    if kernel in _DENSE_MASK_KERNELS:
        return kernel
    return "eager" if own_scores(kwargs) else "sdpa"


def own_scores(kwargs: dict[str, Any]) -> bool:
    """Learned sinks (GPT-OSS) or a soft cap (Gemma 2), which flash kernels know and others ignore."""
    return kwargs.get("s_aux") is not None or kwargs.get("softcap") is not None


def together(results: list[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    """Of queries that follow each other: outputs (B, n, H, P), and weights (B, H, n, T) where all have as many keys."""
    outputs, weights = zip(*results, strict=True)
    known = [x for x in weights if x is not None]
    same = len(known) == len(weights) and len({x.shape[-1] for x in known}) == 1
    return torch.cat(outputs, dim=1), torch.cat(known, dim=2) if same else None
