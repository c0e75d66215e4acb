"""Captured steps of several tokens of one conversation: guesses that are checked, and turns of a few tokens.

What is read waits beside the fixed slots (`ahn.ops.step.several`), so that `crop` only counts. When no place is left
there, or nobody may take anything out any more, another graph puts it into the slots and into the memory.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ahn import private
from ahn.cache import waiting
from ahn.cache.conversation import AHNCache
from ahn.cache.progress import Progress, new_columns
from ahn.config import AHNConfig
from ahn.decode import runner
from ahn.decode.layer import SeveralForward
from ahn.decode.runner import StepCache
from ahn.decode.twin import states_lent, twin_of
from ahn.layout.anchors import anchor_moves
from ahn.memory import RecurrentMemory
from ahn.memory.retained_tokens import RetainedTokens
from ahn.ops import scan
from ahn.ops.step.several import settle
from ahn.wrappers import decoder_of

SIZES = (8, 16, 32, 64)
"""Tokens of a step; fewer take as long, and what is beyond them is not counted."""
_KNOWN = {"input_ids", "attention_mask", "position_ids", "logits_to_keep", "cache_position"}


def forward(model: PreTrainedModel, kwargs: dict[str, Any]) -> CausalLMOutputWithPast | None:
    """A step of one token for every row, or of several of a single row; None where no graph can do it."""
    cache, ids = kwargs.get(private.CACHE), kwargs.get("input_ids")
    if not isinstance(cache, AHNCache) or not isinstance(ids, Tensor) or ids.dim() != 2:
        return None
    if ids.shape[1] == 1 and not cache.progress.recording:
        steps: SeveralSteps | None = cache.several
        if steps is not None and cache.progress.beside and steps.fits(model, cache):
            steps.settle(cache)
        return runner.forward(model, kwargs)
    pieces = _pieces(model, cache, ids.shape[1])
    steps = _prepared(model, cache, pieces, ids, kwargs)
    if steps is None:
        return None
    progress, places, logits = cache.progress, kwargs.get("position_ids"), list[Tensor]()
    for start, stop in pieces:
        cache.place_sinks(model._ahn.rotation)
        own = None if places is None else places[:, start:stop]
        logits.append(steps.read(model, cache, ids[:, start:stop], own))
        progress.finish_several(stop - start, progress.beside + stop - start, cache.config.lossless)
        if not progress.recording:
            steps.settle(cache)
    found = logits[0] if len(logits) == 1 else torch.cat(logits, dim=1)
    return CausalLMOutputWithPast(logits=_wanted(found, kwargs.get("logits_to_keep", 0)), **{private.CACHE: cache})


def prepare(model: PreTrainedModel, cache: AHNCache, sizes: tuple[int, ...] = SIZES) -> bool:
    """Let short turns of a conversation of one row be read in captured steps, if they can be; else only guesses are.

    It takes seconds, which a conversation of a few turns never gets back.

    Args:
        sizes: tokens of the steps, some of `SIZES`: each is captured when a turn first needs it.
    """
    if cache.rows != 1 or cache.progress.padding is not None or not possible(model, cache):
        return False
    cache.several = SeveralSteps(model, cache, sizes)
    return True


def possible(model: PreTrainedModel, cache: AHNCache) -> bool:
    """Whether there are such steps of a conversation like this one."""
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    return runner.on_gpu(ids) and _can_capture(model, cache, ids)


def _prepared(
    model: PreTrainedModel, cache: AHNCache, pieces: list[tuple[int, int]], ids: Tensor, kwargs: dict[str, Any]
) -> SeveralSteps | None:
    """Steps with a place for the new tokens; None where they have to be read in an ordinary forward."""
    progress, (rows, length) = cache.progress, ids.shape
    steps: SeveralSteps | None = cache.several
    if steps is None and not progress.recording:
        return None
    if rows != 1 or not 0 < length <= SIZES[-1] or not runner.on_gpu(ids) or not runner.plain(model, kwargs):
        return None
    if any(isinstance(x, Tensor) and name not in _KNOWN for name, x in kwargs.items()):
        return None
    places = kwargs.get("position_ids")
    if progress.padding is not None or (places is not None and places.shape != ids.shape):
        return None
    new = new_columns(kwargs.get("attention_mask"), cache.seen, length)
    if new is not None and not bool(new.all()):
        return None
    if steps is None or not steps.fits(model, cache):
        steps = cache.several = None
        if not progress.recording or not _can_capture(model, cache, ids):
            return None
        if max(progress.waiting, progress.beside) + _size(length, SIZES) > _places(cache.config):
            return None
        cache.check_batch(rows)
        steps = cache.several = SeveralSteps(model, cache)
    if progress.beside and not steps.have_place(pieces, progress) and not progress.recorded:
        steps.settle(cache)
    return steps if steps.have_place(pieces, progress) else None


def _places(config: AHNConfig) -> int:
    """G: as many as a step reads, or as few as leave the window at once."""
    return max((size for size in SIZES if size <= config.window), default=0)


def _size(length: int, sizes: tuple[int, ...]) -> int:
    return next((size for size in sizes if size >= length), sizes[-1])


def _pieces(model: PreTrainedModel, cache: AHNCache, length: int) -> list[tuple[int, int]]:
    """New tokens (start, stop) that see the sinks in one place."""
    reach, seen, cuts = cache.config.reach, cache.seen, [0, length]
    if reach and model._ahn.rotation is not None:
        cuts[1:1] = [move - seen for move in anchor_moves(seen, seen + length - 1, reach)]
    return list(itertools.pairwise(cuts))


def _can_capture(model: PreTrainedModel, cache: AHNCache, ids: Tensor) -> bool:
    config: AHNConfig = cache.config
    if config.quantized or not _places(config):
        return False
    if not runner.can_capture(model, cache, ids):
        return False
    memory = decoder_of(model).layers[0].ahn.fn
    if isinstance(memory, RetainedTokens):
        return False
    keys = next(iter(cache.memory_layers.values())).keys
    return not keys.is_cuda or not isinstance(memory, RecurrentMemory) or scan.has_kernel(keys)


def _wanted(logits: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """Of logits (1, n, V), as transformers' models choose them."""
    return logits[:, logits_to_keep] if isinstance(logits_to_keep, Tensor) else logits[:, -logits_to_keep:]


class SeveralSteps:
    """Graphs over the buffers of one cache: one for each number of tokens that was asked for, and one that settles.

    Attributes:
        places: G, beside the slots.
        start, held: (1,) tokens in the slots and beside them, as the graphs are told.
        graphs: how to repeat a step of so many tokens, its ids and positions (1, N), and its logits (1, N, V).
    """

    def __init__(self, model: PreTrainedModel, cache: AHNCache, sizes: tuple[int, ...] = SIZES) -> None:
        # Held for the same reasons as a `Runner` holds them.
        self.adapter, self.attention = model._ahn, decoder_of(model).layers[0].self_attn
        self.weight = self.attention.o_proj.weight.detach()
        self.places = _places(cache.config)
        self.sizes = tuple(size for size in sizes if size <= self.places)
        device = model.get_output_embeddings().weight.device
        with torch.inference_mode(False):
            self.start, self.held = (torch.zeros(1, dtype=torch.long, device=device) for _ in range(2))
            waiting.enter_slots(cache, self.places)
        states = runner.states_of(cache).values()
        self.rings = [
            (weakref.ref(state.window.keys), weakref.ref(state.beside.keys)) for state in states if state.beside
        ]
        self.memories = [state.memory for state in states]
        self.graphs: dict[int, tuple[Callable[[], None], Tensor, Tensor, Tensor]] = {}
        self._settle = self._capture_settling(model, cache)  # while nothing is held there is nothing to do

    def fits(self, model: PreTrainedModel, cache: AHNCache) -> bool:
        """Still the same weights, and the same buffers in the same order."""
        moved = self.attention.o_proj.weight.data_ptr() != self.weight.data_ptr()
        if model._ahn is not self.adapter or moved or cache.rows != 1:
            return False
        states = list(runner.states_of(cache).values())
        if not all(state.window.in_slots and state.beside is not None for state in states):
            return False
        found = [(state.window.keys, state.beside.keys) for state in states if state.beside is not None]
        return len(found) == len(self.rings) and all(
            keys is own() and beside is own_beside()
            for (keys, beside), (own, own_beside) in zip(found, self.rings, strict=True)
        )

    def size(self, length: int) -> int:
        """Of the step that reads so many tokens: one that is there already, if it is not too large."""
        wanted = _size(length, self.sizes)
        return min((size for size in self.graphs if wanted <= size <= 2 * wanted), default=wanted)

    def have_place(self, pieces: list[tuple[int, int]], progress: Progress) -> bool:
        """Whether these steps, one after the other, have a place for what they read."""
        beside = [progress.beside + (start if progress.recording else 0) for start, _ in pieces]
        fit = (n + self.size(stop - start) <= self.places for n, (start, stop) in zip(beside, pieces, strict=True))
        return all(stop - start <= self.sizes[-1] for start, stop in pieces) and all(fit)

    def read(self, model: PreTrainedModel, cache: AHNCache, ids: Tensor, position_ids: Tensor | None) -> Tensor:
        """Logits (1, n, V) of new tokens, for which there is a place."""
        size, length = self.size(ids.shape[1]), ids.shape[1]
        self._catch_up(cache)
        if size not in self.graphs:
            self.graphs[size] = self._capture(model, cache, size)
        replay, own_ids, own_positions, logits = self.graphs[size]
        own_ids[:, :length].copy_(ids)
        if position_ids is None:
            torch.arange(cache.seen, cache.seen + size, out=own_positions[0])
        else:
            own_positions[:, :length].copy_(position_ids)
        replay()
        return logits[:, :length].clone()

    @torch.no_grad()
    def settle(self, cache: AHNCache) -> None:
        """Put what lies beside the slots into them, and what that replaces into the memory."""
        self._catch_up(cache)
        self._settle()
        cache.progress.finish_several(0, 0, cache.config.lossless)

    def _catch_up(self, cache: AHNCache) -> None:
        """Take over how much was read, and memories that an ordinary step has put in the place of the graphs' own."""
        progress = cache.progress
        self.start.fill_(progress.seen - progress.beside)
        self.held.fill_(progress.beside)
        runner.take_over(cache, self.memories)

    @torch.inference_mode(False)
    def _capture(
        self, model: PreTrainedModel, cache: AHNCache, size: int
    ) -> tuple[Callable[[], None], Tensor, Tensor, Tensor]:
        ids, positions = (torch.zeros(1, size, dtype=torch.long, device=self.start.device) for _ in range(2))
        config, states, twin = cache.config, runner.states_of(cache), twin_of(model)
        step = SeveralForward(self.start, self.held, config.sinks, config.window)
        inputs = {"input_ids": ids, "position_ids": positions, private.CACHE: StepCache()}

        def once() -> Tensor:
            with torch.no_grad(), states_lent(twin, states, {}, {}):
                logits: Tensor = type(model).forward(twin, **inputs, use_cache=True, ahn_forward=step).logits
            return logits

        replay, logits = runner.capture(twin, once)
        return replay, ids, positions, logits

    def _capture_settling(self, model: PreTrainedModel, cache: AHNCache) -> Callable[[], None]:
        states, sinks, layers = runner.states_of(cache), cache.config.sinks, decoder_of(model).layers
        memories = {index: layers[index].ahn.fn for index in states}
        ruled = {index: fn for index, fn in memories.items() if isinstance(fn, RecurrentMemory)}

        def once() -> Tensor:
            with torch.no_grad():
                for index, state in states.items():
                    memory = ruled.get(index)
                    rule, routes = (None, None) if memory is None else (memory.step_rule(), memory.routes)
                    settle(self.start, self.held, state, sinks, rule, routes)
            return self.start

        return runner.capture(twin_of(model), once)[0]
