"""Attention over sinks, window and the learned exact slots of `ahn.memory.slots`.

Each key is seen by the queries of one interval: sinks for ever, any other token while it is in the window and, if it
gets a slot, until a more important one takes it.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ahn.ops import retention, spans
from ahn.ops.spans import FOR_EVER
from ahn.visibility import Visibility

if TYPE_CHECKING:
    from ahn.attention import Evicted
    from ahn.memory.slots import ExactSlots

NEVER = -1


@dataclasses.dataclass
class Held:
    """What the C slots of each key/value head hold, by descending priority.

    Attributes:
        keys, values: (B, Hkv, C, P).
        score, priority: (B, Hkv, C) float32, -inf for a free slot.
    """

    keys: Tensor
    values: Tensor
    score: Tensor
    priority: Tensor

    @classmethod
    def of(cls, state: dict[str, Tensor], key: Tensor, capacity: int) -> Held:
        """The slots in a memory's state; free ones before anything has left the window."""
        if "slot_keys" in state:
            return cls(state["slot_keys"], state["slot_values"], state["slot_score"], state["slot_priority"])
        B, H, _, P = key.shape
        empty, none = key.new_zeros(B, H, capacity, P), torch.full((B, H, capacity), float("-inf"), device=key.device)
        return cls(empty, empty, none, none)

    def state(self) -> dict[str, Tensor]:
        """As part of a memory's state."""
        return {f"slot_{name}": x for name, x in vars(self).items()}

    def after(self, new: Held, kept: Tensor) -> Held:
        """The slots once m tokens have arrived, of which `kept` (B, Hkv, C), indices into old and new, are held."""
        where = kept[..., None].expand(-1, -1, -1, self.keys.shape[-1])
        pairs = {name: torch.cat([x, getattr(new, name)], dim=2) for name, x in vars(self).items()}
        return Held(**{name: x.gather(2, where if x.dim() == 4 else kept) for name, x in pairs.items()})


def attend(
    memory: ExactSlots,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    left: Evicted,
    view: Visibility,
    step_mask: Tensor | None,
    state: dict[str, Tensor],
    cached: bool,
    scaling: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Attention of one layer's n new tokens, and the state with the slots after them.

    Args:
        query: (B, Hq, n, P); key, value: (B, Hkv, T, P) of sinks, window and new tokens.
        left: the tokens that leave the window.
        step_mask: for n = 1, what of key is visible, (B or 1, 1, 1, T); None: everything.
        state: of the memory before this forward.
        cached: there is a cache, so that slots may hold something already, and go on afterwards.

    Returns:
        (B, Hq, n, P) and the state.
    """
    score = memory.importance(left.gates["importance"], key.shape[1])
    arriving = Held(left.key, left.value, score, memory.priority(score, view.evicted_positions))
    held = Held.of(state, key, memory.slot_count(view.window))
    old_ends, ends, kept = retention.dropped_at(held.priority, arriving.priority)
    after = held.after(arriving, kept) if cached else held
    if view.length == 1:
        out = _step(query, key, value, after, step_mask, scaling)
    else:
        out = _chunk(query, key, value, held if cached else None, score, old_ends, ends, view, scaling)
    return out, (state | after.state() if cached else state)


def _step(query: Tensor, key: Tensor, value: Tensor, held: Held, mask: Tensor | None, scaling: float) -> Tensor:
    """One query, which sees every slot that holds something."""
    B, _, T, _ = key.shape
    groups = query.shape[1] // key.shape[1]
    seen = torch.zeros(1, 1, 1, T, device=key.device) if mask is None else torch.where(mask, 0.0, float("-inf"))
    faded = F.logsigmoid(held.score)[:, :, None].repeat_interleave(groups, dim=1)
    scores = torch.cat([faded, seen.expand(B, query.shape[1], 1, T)], dim=-1).to(query.dtype)
    keys, values = torch.cat([held.keys, key], dim=2), torch.cat([held.values, value], dim=2)
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=scores, scale=scaling, enable_gqa=groups > 1)


def _chunk(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    held: Held | None,
    score: Tensor,
    old_ends: Tensor,
    ends: Tensor,
    view: Visibility,
    scaling: float,
) -> Tensor:
    """Many queries; `old_ends`, `ends` say with which evicted token each slot's token is dropped."""
    (B, H, m), T = score.shape, key.shape[2]
    tail, S = view.length - m, view.sinks  # the query with which the first token leaves; where it lies in `key`
    arrival = torch.arange(m, device=key.device)

    def last_query(dropped: Tensor, got_a_slot: Tensor) -> Tensor:
        return torch.where(got_a_slot, torch.where(dropped < m, tail + dropped, FOR_EVER), NEVER)

    until = view.until.expand(B, H, T).clone()
    got_a_slot = ends > arrival  # not padding, and not a row's sinks behind its padding
    until[:, :, S : S + m] = torch.maximum(until[:, :, S : S + m], last_query(ends, got_a_slot).int())
    bias = torch.zeros(B, H, T, device=key.device)
    bias[:, :, S : S + m] = F.logsigmoid(score.masked_fill(~got_a_slot, 0)) * got_a_slot
    biased_from = torch.full((1, 1, T), FOR_EVER, dtype=torch.int32, device=key.device)
    biased_from[..., S : S + m] = tail + arrival
    if held is not None:
        key, value = torch.cat([held.keys, key], dim=2), torch.cat([held.values, value], dim=2)
        until = torch.cat([last_query(old_ends, held.score > float("-inf")).int(), until], dim=2)
        bias = torch.cat([F.logsigmoid(held.score), bias], dim=2)
        biased_from = F.pad(biased_from, (held.score.shape[2], 0))
    return spans.attend(query, key, value, until, scaling, bias, biased_from)
