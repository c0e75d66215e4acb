"""Tokens at two bits a number: between the exact window and the memory, the next C tokens back are seen from codes.

A token that leaves the window is encoded (`ahn.ops.quantize`), attended to like any other key for C more tokens, and
only then written into the memory, as what its codes decode to. A token's codes depend on it alone, so the result does
not depend on how a text is cut into chunks. Keys are encoded as they are rotated: for a padded row to have the codes of
the row alone, its tokens need the same `position_ids`, as `generate` gives them.

A row keeps its C tokens in a ring: position p lies in slot (p - S) mod C, so nothing moves and padding takes no place.
Keys and values are encoded without the mean of the row's first window, positions S to S + W: key biases and other
directions that all tokens share would take up most of the codes' range (cf. KIVI, arXiv 2402.02750).
"""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ahn import bands
from ahn.ops.merge import Part, merge
from ahn.ops.quantize import PER_BYTE, decode, encode, precise, rotate, turned
from ahn.slots import gather

if TYPE_CHECKING:
    from ahn.evicted import Evicted
    from ahn.visibility import Visibility

PREFIX = "quantized."
"""Of the tier's tensors among those of a layer's state."""
GATES = "gates."


@dataclasses.dataclass
class TierView:
    """One forward's view of the tier: which slots hold which positions, and who sees them; the same for all layers.

    Args:
        view: of a forward; in the attributes below tokens leave the window in it.
    """

    view: Visibility

    @property
    def capacity(self) -> int:
        """C, the slots of the ring."""
        return self.view.quantized

    @property
    def held(self) -> bool:
        """Tokens left the window before; else there is no ring yet."""
        return self.view.rolled

    @property
    def steps(self) -> bool:
        """One token at a time: the query sees the ring as it is after the push."""
        return self.held and self.view.length == 1

    @cached_property
    def new(self) -> Tensor:
        """(B or 1, m) positions of the tokens that leave the window, those of padding included."""
        return self.view.query_positions[:, self.view.length - self.view.evicted :] - self.view.window

    def _slots(self, positions: Tensor) -> Tensor:
        return (positions - self.view.sinks) % self.capacity

    def _ring(self, read: Tensor) -> Tensor:
        """(B or 1, C) positions in the ring when each row has read (B or 1,) tokens; -1 for none."""
        slots = torch.arange(self.capacity, device=read.device)
        newest = read[:, None] - self.view.window - 1
        positions = newest - (newest - self.view.sinks - slots) % self.capacity
        return torch.where(positions >= self.view.sinks, positions, -1)

    @cached_property
    def targets(self) -> Tensor:
        """(B or 1, m) the slot that each leaving token takes; C for what takes none: padding, and what soon leaves."""
        kept = self.new >= self.view.read_after[:, None] - self.view.window - self.capacity
        if self.view.writable is not None:
            kept = kept & self.view.writable
        return torch.where(kept, self._slots(self.new), self.capacity)

    def put(self, ring: Tensor | None, new: Tensor) -> Tensor:
        """The ring after, of one tensor: new (B, H, m, ...) in a copy of what was before, (B, H, C, ...)."""
        capacity = self.capacity
        if not self.view.padded:  # all but the last C take none
            empty = (*new.shape[:2], capacity, *new.shape[3:])
            copy = new.new_zeros(empty) if ring is None else ring.clone()
            return copy.index_copy_(2, self.targets[0, -capacity:], new[:, :, -capacity:])
        spare = new.new_zeros(*new.shape[:2], capacity + 1 if ring is None else 1, *new.shape[3:])
        grown = spare if ring is None else torch.cat([ring, spare], dim=2)
        index = self.targets[:, None].expand(new.shape[0], new.shape[1], -1)
        index = index.reshape(*index.shape, *[1] * (new.dim() - 3)).expand_as(new)
        return grown.scatter(2, index, new)[:, :, :capacity].contiguous()

    @cached_property
    def visible(self) -> Tensor | None:
        """(B or 1, 1, n, C + m) whether a query sees a token of [ring before | leaving], or (B or 1, 1, 1, C) of the
        ring after a single one; None if all are seen."""
        if self.steps:
            ring = self._ring(self.view.read_after)
            full = not self.view.padded and self.view.total >= self.view.delayed.lossless
            return None if full else (ring >= 0)[:, None, None, :]
        new = self.new if self.view.writable is None else self.new.masked_fill(~self.view.writable, -1)
        new = new.masked_fill(new < self.view.sinks, -1)
        keys = torch.cat([self._ring(self.view.read_before), new], dim=1) if self.held else new
        newest = self.view.query_positions[:, :, None] - self.view.window
        keys = keys[:, None, :]
        return ((keys >= 0) & (keys <= newest) & (keys > newest - self.capacity))[:, None]

    @cached_property
    def sources(self) -> Tensor:
        """(B or 1, m') where in [ring before | leaving] the tokens are that leave the tier, in order."""
        later = self.view.delayed
        positions = later.query_positions[:, later.length - later.evicted :] - later.window
        first = self.view.read_before[:, None] - self.view.window  # of those that leave the window now
        ring = self.capacity if self.held else 0
        new = ring + positions - self.new[:, :1]
        found = torch.where(positions < first, self._slots(positions), new) if self.held else new
        return found.clamp(0, ring + (0 if self.steps else self.view.evicted) - 1)

    def before(self, ring: Tensor, new: Tensor) -> Tensor:
        """[ring before | leaving] of one tensor (B, H, C + m, ...); of a single token the ring says enough."""
        return ring if self.steps else torch.cat([ring, new], dim=2)

    @cached_property
    def in_order(self) -> Tensor:
        """(1, e + m) where in [ring before | leaving] the tokens are, the oldest first; only without padding."""
        view = self.view
        new = torch.arange(view.evicted, device=view.device)
        if not self.held:
            return new[None]
        newest = view.seen - view.window  # the first position that is not in the ring
        ring = torch.arange(max(view.sinks, newest - self.capacity), newest, device=view.device)
        return torch.cat([self._slots(ring), self.capacity + new])[None]

    @cached_property
    def first_window(self) -> tuple[Tensor, Tensor | None] | None:
        """For rows from which the first token leaves: the key slots (B or 1, W) of positions S to S + W, and which rows
        those are, (B, 1, 1) or None for all. None if it is no row's first."""
        view = self.view
        if not view.begins:
            return None
        offset = 0 if not view.rolled else view.sinks + view.window - view.seen
        pads = (view.total - view.read_after)[:, None]
        slots = torch.arange(view.sinks, view.sinks + view.window, device=pads.device) + pads + offset
        rows = None if not view.padded else view.beginning[:, None, None]
        return slots.clamp(0, view.cached + view.length - 1), rows


@dataclasses.dataclass
class Passed:
    """What the tier makes of the tokens that leave the window in one forward.

    Attributes:
        key, value: (B, Hkv, T, P) what the queries see of the tier, decoded; or `turned`.
        visible: (B or 1, 1, n, T) which query sees which of them; None if all do.
        left: the m' tokens that leave the tier, decoded; the last m' queries read after each was written.
        state: the tier's tensors after the forward.
    """

    key: Tensor
    value: Tensor
    visible: Tensor | None
    left: Evicted
    state: dict[str, Tensor]

    @property
    def offsets(self) -> tuple[Tensor, Tensor]:
        """(B, Hkv, P) float32 what was taken from all keys and values before they were encoded."""
        return self.state["key_offset"], self.state["value_offset"]


def split(state: dict[str, Tensor] | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A layer's state: the memory's own tensors, and the tier's without their prefix."""
    state = state or {}
    own = {name: x for name, x in state.items() if not name.startswith(PREFIX)}
    return own, {name.removeprefix(PREFIX): x for name, x in state.items() if name.startswith(PREFIX)}


@torch.no_grad()
def push(
    tier: TierView,
    state: dict[str, Tensor],
    left: Evicted,
    keys: Tensor,
    values: Tensor,
    in_order: bool = False,
    turn: bool = True,
) -> Passed:
    """Take the tokens that leave the window, give those that leave the tier.

    Args:
        state: the tier's tensors before; empty before the first token left.
        left: m tokens; zeros for padding.
        keys, values: (B, Hkv, T, P) in columns, all that the forward holds exactly.
        in_order: give the decoded tokens in the order of the text (there is no padding), without `visible`.
        turn: without, keys and values are given as `attend` takes them, neither rotated back nor with their offsets.
    """
    dtype = left.key.dtype
    offsets = _offsets(tier, state, keys, values)
    new: dict[str, Tensor] = {}
    for kind, x in (("key", left.key), ("value", left.value)):
        offset = offsets[f"{kind}_offset"].unsqueeze(2)
        codes, scales = encode(x.to(precise(dtype)) - offset, unbiased=kind == "key")
        new |= {f"{kind}s": codes, f"{kind}_scales": scales}
    new |= {GATES + name: gate.to(dtype) for name, gate in left.gates.items()}
    both = {name: x if not tier.held else tier.before(state[name], x) for name, x in new.items()}
    after = {name: tier.put(state.get(name), x) for name, x in new.items()}

    def decoded(kind: str, codes: dict[str, Tensor], turn: bool = True) -> Tensor:
        if not turn:
            return turned(codes[f"{kind}s"], codes[f"{kind}_scales"], dtype)
        x = decode(codes[f"{kind}s"], codes[f"{kind}_scales"], dtype)
        return (x + offsets[f"{kind}_offset"].unsqueeze(2)).to(dtype)

    leaving = {name: gather(x, tier.sources) for name, x in both.items()}
    gates = {name.removeprefix(GATES): x.float() for name, x in leaving.items() if name.startswith(GATES)}
    seen = after if tier.steps else both
    if in_order:
        seen = {name: gather(x, tier.in_order) for name, x in both.items()}
    return Passed(
        key=decoded("key", seen, turn),
        value=decoded("value", seen, turn),
        visible=None if in_order else tier.visible,
        left=dataclasses.replace(left, key=decoded("key", leaving), value=decoded("value", leaving), gates=gates),
        state=after | offsets,
    )


def attend(query: Tensor, keys: Tensor, values: Tensor, passed: Passed, scaling: float) -> Tensor:
    """A single query a row over all keys that are held exactly and all of the tier, which `push` has not turned.

    The rotation is orthogonal: turning the query, and in the end the result, is as good as turning every key and value.
    What the keys' offset adds to a score is the same for all of them.

    Args:
        query: (B, Hq, 1, P); keys, values: (B, Hkv, T, P).
    """
    run, kind = bands.kernel_of_one(query), precise(query.dtype)
    groups = query.shape[1] // keys.shape[1]
    key_offset, value_offset = (x.to(kind).repeat_interleave(groups, dim=1).unsqueeze(2) for x in passed.offsets)
    out, score = run(rotate(query.to(kind)).to(query.dtype), passed.key, passed.value, False, scaling)
    score = score + scaling * (query * key_offset).sum(-1)
    out = (rotate(out.to(kind)) + value_offset).to(query.dtype)
    return merge([Part(*run(query, keys, values, False, scaling)), Part(out, score)])


def with_tier(
    state: dict[str, Tensor] | None, capacity: int, keys: Tensor, gates: dict[str, Tensor]
) -> dict[str, Tensor]:
    """A layer's state with the tier's tensors, which captured steps need before the first token leaves the window.

    Args:
        keys: (B, Hkv, T, P) of the layer; gates: (B, Hq, T) each.
    """
    state = state or {}
    if f"{PREFIX}keys" in state:
        return state
    B, heads, _, P = keys.shape
    tier: dict[str, Tensor] = {}
    for kind in ("key", "value"):
        tier[f"{kind}s"] = keys.new_zeros(B, heads, capacity, P // PER_BYTE, dtype=torch.uint8)
        tier[f"{kind}_scales"] = keys.new_zeros(B, heads, capacity, dtype=torch.bfloat16)
        tier[f"{kind}_offset"] = keys.new_zeros(B, heads, P, dtype=torch.float32)
    tier |= {GATES + name: gate.new_zeros(B, gate.shape[1], capacity) for name, gate in gates.items()}
    return state | prefixed(tier)


def prefixed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tier's tensors as a layer's state names them."""
    return {PREFIX + name: x for name, x in state.items()}


def nbytes(capacity: int, kv_heads: int, head_dim: int) -> int:
    """Bytes of one layer and sequence: codes, scales and offsets (the waiting gates not counted)."""
    token = 2 * kv_heads * (head_dim // PER_BYTE + torch.bfloat16.itemsize)
    return capacity * token + 2 * kv_heads * head_dim * torch.float32.itemsize


def _offsets(tier: TierView, state: dict[str, Tensor], keys: Tensor, values: Tensor) -> dict[str, Tensor]:
    """Key and value offsets (B, Hkv, P) float32: the row's, zeros before its first token leaves the window."""
    found: dict[str, Tensor] = {}
    for name, x in (("key_offset", keys), ("value_offset", values)):
        old = state.get(name)
        if tier.first_window is not None:
            slots, rows = tier.first_window
            window = gather(x, slots)
            mean = window.to(precise(x.dtype)).mean(2).float()
            zeros = torch.zeros_like(mean)
            old = mean if rows is None else torch.where(rows, mean, zeros if old is None else old)
        elif old is None:
            old = x.new_zeros(x.shape[0], x.shape[1], x.shape[3], dtype=torch.float32)
        found[name] = old
    return found
