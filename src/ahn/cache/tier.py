"""Tokens at a few bits per number: between the exact window and the memory, the next C tokens back are seen from codes.

A token that leaves the window is encoded (`ahn.ops.quantize`), attended to like any other key for C more tokens, and
only then written into the memory, as what its codes decode to. A token's codes depend on it alone, so the result does
not depend on how a text is cut into chunks.

Keys are encoded as they are before RoPE, where the base model's RoPE can be undone: it turns pairs of channels by every
angle, and of channels that differ as much as a real model's (arXiv 2401.18079) the codes then keep far less. They are
turned again when they are seen, at their own positions or, from farther than the base model looks well, at a distance
that it knows. Otherwise, and in files from before, they are encoded as they are rotated: for a padded row to have the
codes of the row alone, its tokens then need the same `position_ids`, as `generate` gives them.

A row keeps its C tokens in a ring: position p lies in slot (p - S) mod C, so nothing moves and padding takes no place.
Keys and values are encoded without the mean of the row's first window, positions S to S + W: key biases and other
directions that all tokens share would take up most of the codes' range (cf. KIVI, arXiv 2402.02750).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from ahn.attend import windowed
from ahn.attend.merge import merge
from ahn.attend.part import Part
from ahn.layout.evicted import Evicted
from ahn.layout.slots import gather
from ahn.layout.state import TierRing, TierState, WindowState
from ahn.layout.tier import TierView
from ahn.ops.basis import Basis
from ahn.ops.quantize import code_bytes, decode, decode_rotated, encode, precise, rotate


@dataclasses.dataclass
class Seen:
    """Keys and values (B, Hkv, T, P), in the place where queries see them.

    Attributes:
        visible: (B or 1, 1, n, T) which query sees which of them; None if all do, or where that follows from their
            order: of tokens in the order of the text each query sees as many, up to its own.
    """

    key: Tensor
    value: Tensor
    visible: Tensor | None = None


@dataclasses.dataclass
class Passed:
    """What the tier makes of the tokens that leave the window in one forward.

    Attributes:
        near: what queries see of the tier at its own distance, decoded; or, with `raw`, as `attend` takes it.
        far: what they see at the distance `reach`, keys before RoPE; None if nothing is so far.
        state: of the tier after the forward.
        evicted: the m' tokens that leave the tier, decoded; the last m' queries read after each was written.
        view: of the forward.
        raw: keys and values are neither rotated back nor with their offsets.
    """

    near: Seen
    far: Seen | None
    state: TierState
    evicted: Evicted
    view: TierView
    raw: bool = False

    def far_query(self, query: Tensor) -> Tensor:
        """Queries (B, Hq, n, P) turned to where they see keys before RoPE at the distance `reach`."""
        assert self.view.rotation is not None
        return self.view.rotation.away(query, self.view.view.query_positions, self.view.far, self.view.known)


@torch.no_grad()
def push(
    view: TierView,
    state: TierState | None,
    evicted: Evicted,
    keys: Tensor,
    values: Tensor,
    bits: tuple[int, int],
    in_order: bool = False,
    raw: bool = False,
    basis: Basis | None = None,
) -> Passed:
    """Take the tokens that leave the window, give those that leave the tier.

    Args:
        view: says too whether, and how, keys are turned.
        state: before; None before the first token left.
        evicted: from the window, m tokens; zeros for padding.
        keys, values: (B, Hkv, T, P) in columns, all that the forward holds exactly.
        bits: per number of keys and of values.
        in_order: give tokens in the order of the text (there is no padding), without masks.
        raw: give keys and values as `attend` takes them, unless keys have to be turned or have a basis.
        basis: in which keys are coded, if not in that of the Hadamard rotation.
    """
    dtype = evicted.key.dtype
    new = TierState(
        _encoded(_undone(view, evicted.key, view.new), _key_offset(view, state, keys), True, bits[0], basis),
        _encoded(evicted.value, _offset(view, None if state is None else state.values, values), False, bits[1]),
        {name: gate.to(dtype) for name, gate in evicted.gates.items()},
    )
    before = [] if state is None else [state]
    both = new.over_tokens(lambda x, old: view.before(old, x), *before) if view.held else new
    after = new.over_tokens(lambda x, old=None: view.put(old, x), *before)
    gone = both.over_tokens(lambda x: gather(x, view.sources))
    shown = after if view.steps else both
    raw = raw and view.rotation is None and basis is None
    if in_order and not raw:  # raw ones are all seen alike
        shown = shown.over_tokens(lambda x: gather(x, view.in_order))
    near, far = _seen(view, shown, dtype, in_order, raw, basis)
    left = Evicted(
        _turned(view, _decoded(gone.keys, dtype, basis), view.gone).to(dtype),
        _decoded(gone.values, dtype).to(dtype),
        {name: gate.float() for name, gate in gone.gates.items()},
    )
    return Passed(near, far, after, left, view, raw)


def _seen(
    view: TierView, shown: TierState, dtype: torch.dtype, in_order: bool, raw: bool, basis: Basis | None
) -> tuple[Seen, Seen | None]:
    """What queries see of these tokens: near, and far."""
    if raw:
        return Seen(*(decode_rotated(x.codes, x.scales, dtype, x.bits) for x in (shown.keys, shown.values))), None
    key, value = _decoded(shown.keys, dtype, basis), _decoded(shown.values, dtype).to(dtype)
    if not (view.any_far and in_order):
        turned = _turned(view, key, view.positions_near(in_order, 0))
        near = Seen(turned.to(dtype), value, None if in_order else view.visible)
        if not view.any_far:
            return near, None
        return near, Seen(key.to(dtype), value, view.visible_far)
    last = key.shape[2] - view.near  # so many are far for the last query
    first = last if view.steps else max(0, last - view.view.length)  # one more than are far for the first
    turned = _turned(view, key[:, :, first:], view.positions_near(in_order, first))
    near = Seen(turned.to(dtype), value[:, :, first:])
    return near, Seen(key[:, :, :last].to(dtype), value[:, :, :last])


def _encoded(x: Tensor, offset: Tensor, unbiased: bool, bits: int, basis: Basis | None = None) -> TierRing:
    """Keys or values (B, Hkv, m, P) that leave the window, less their offset."""
    x = x.to(precise(x.dtype)) - offset.unsqueeze(2)
    return TierRing(*(encode(x, unbiased, bits) if basis is None else basis.encode(x)), offset)


def _decoded(ring: TierRing, dtype: torch.dtype, basis: Basis | None = None) -> Tensor:
    """(B, Hkv, T, P), float32 at least: keys may still have to be turned, and are rounded once."""
    if basis is None:
        return decode(ring.codes, ring.scales, dtype, ring.bits) + ring.offset.unsqueeze(2)
    return basis.decode(ring.codes, ring.scales, dtype) + ring.offset.unsqueeze(2)


def _undone(view: TierView, key: Tensor, positions: Tensor) -> Tensor:
    """Keys as they are encoded: from where they stand to before RoPE, or as they are."""
    return key if view.rotation is None else view.rotation.undo(key.to(precise(key.dtype)), positions, view.known)


def _turned(view: TierView, key: Tensor, positions: Tensor) -> Tensor:
    """The inverse of `_undone`."""
    return key if view.rotation is None else view.rotation.turn(key, positions, view.known)


def attend(query: Tensor, keys: Tensor, values: Tensor, passed: Passed, scaling: float) -> Tensor:
    """A single query per row over all keys held exactly and all of the tier, which `push` gave raw if it could.

    The Hadamard rotation is orthogonal: turning the query by it, and in the end the result, is as good as turning every
    key and value. What the keys' offset adds to a score is the same for all of them. Keys before RoPE are turned each
    by its own angle, and so have to be decoded.

    Args:
        query: (B, Hq, 1, P); keys, values: (B, Hkv, T, P).
    """
    run = windowed.kernel_of_one(query)
    exact = Part(*run(query, keys, values, False, scaling))
    near, far = passed.near, passed.far
    if passed.raw:
        return merge([exact, _raw_part(query, passed, scaling)])
    parts = [exact, Part(*run(query, near.key, near.value, False, scaling))]
    if far is not None:
        parts.append(Part(*run(passed.far_query(query), far.key, far.value, False, scaling)))
    return merge(parts)


def _raw_part(query: Tensor, passed: Passed, scaling: float) -> Part:
    run, kind, near = windowed.kernel_of_one(query), precise(query.dtype), passed.near
    groups = query.shape[1] // near.key.shape[1]
    key_offset, value_offset = (
        ring.offset.to(kind).repeat_interleave(groups, dim=1).unsqueeze(2)
        for ring in (passed.state.keys, passed.state.values)
    )
    out, score = run(rotate(query.to(kind)).to(query.dtype), near.key, near.value, False, scaling)
    score = score + scaling * (query * key_offset).sum(-1)
    return Part((rotate(out.to(kind)) + value_offset).to(query.dtype), score)


def empty(capacity: int, window: WindowState, bits: tuple[int, int]) -> TierState:
    """The tier of a layer before anything left its window; captured steps need its tensors from the start."""
    B, heads, _, P = window.keys.shape

    def ring(bits: int) -> TierRing:
        return TierRing(
            codes=window.keys.new_zeros(B, heads, capacity, code_bytes(P, bits), dtype=torch.uint8),
            scales=window.keys.new_zeros(B, heads, capacity, dtype=torch.bfloat16),
            offset=window.keys.new_zeros(B, heads, P, dtype=torch.float32),
        )

    gates = {name: gate.new_zeros(B, gate.shape[1], capacity) for name, gate in window.gates.items()}
    return TierState(ring(bits[0]), ring(bits[1]), gates)


def nbytes(capacity: int, kv_heads: int, head_dim: int, bits: tuple[int, int]) -> int:
    """Bytes of one layer and sequence: codes, scales and offsets (the waiting gates not counted).

    Args:
        bits: per number of keys and of values.
    """
    token = kv_heads * sum(code_bytes(head_dim, one) + torch.bfloat16.itemsize for one in bits)
    return capacity * token + 2 * kv_heads * head_dim * torch.float32.itemsize


def _key_offset(view: TierView, state: TierState | None, keys: Tensor) -> Tensor:
    """`_offset` of keys as they are encoded."""
    return _offset(view, None if state is None else state.keys, keys, lambda x: _undone(view, x, view.first_positions))


def _offset(
    view: TierView, ring: TierRing | None, x: Tensor, change: Callable[[Tensor], Tensor] = lambda x: x
) -> Tensor:
    """(B, Hkv, P) float32 of keys or values x, changed: the row's, zeros before its first token leaves the window."""
    old = None if ring is None else ring.offset
    if view.first_window is not None:
        slots, rows = view.first_window
        first = change(gather(x, slots))
        mean = first.to(precise(x.dtype)).mean(2).float()
        return mean if rows is None else torch.where(rows, mean, torch.zeros_like(mean) if old is None else old)
    return x.new_zeros(x.shape[0], x.shape[1], x.shape[3], dtype=torch.float32) if old is None else old
