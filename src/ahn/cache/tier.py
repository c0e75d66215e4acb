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

import torch
from torch import Tensor

from ahn.attend import windowed
from ahn.attend.merge import merge
from ahn.attend.parts import Part
from ahn.layout.evicted import Evicted
from ahn.layout.slots import gather
from ahn.layout.state import TierRing, TierState, WindowState
from ahn.layout.tier import TierView
from ahn.ops.quantize import BITS, code_bytes, decode, encode, precise, rotate, turned


@dataclasses.dataclass
class Passed:
    """What the tier makes of the tokens that leave the window in one forward.

    Attributes:
        key, value: (B, Hkv, T, P) what the queries see of the tier, decoded; or `turned`.
        visible: (B or 1, 1, n, T) which query sees which of them; None if all do.
        evicted: the m' tokens that leave the tier, decoded; the last m' queries read after each was written.
        state: of the tier after the forward.
    """

    key: Tensor
    value: Tensor
    visible: Tensor | None
    evicted: Evicted
    state: TierState


@torch.no_grad()
def push(
    view: TierView,
    state: TierState | None,
    evicted: Evicted,
    keys: Tensor,
    values: Tensor,
    in_order: bool = False,
    turn: bool = True,
) -> Passed:
    """Take the tokens that leave the window, give those that leave the tier.

    Args:
        state: before; None before the first token left.
        evicted: from the window, m tokens; zeros for padding.
        keys, values: (B, Hkv, T, P) in columns, all that the forward holds exactly.
        in_order: give the decoded tokens in the order of the text (there is no padding), without `visible`.
        turn: without, keys and values are given as `attend` takes them, neither rotated back nor with their offsets.
    """
    dtype = evicted.key.dtype
    new = TierState(
        _encoded(evicted.key, _offset(view, None if state is None else state.keys, keys), unbiased=True),
        _encoded(evicted.value, _offset(view, None if state is None else state.values, values), unbiased=False),
        {name: gate.to(dtype) for name, gate in evicted.gates.items()},
    )
    before = [] if state is None else [state]
    both = new.over_tokens(lambda x, old: view.before(old, x), *before) if view.held else new
    after = new.over_tokens(lambda x, old=None: view.put(old, x), *before)
    gone = both.over_tokens(lambda x: gather(x, view.sources))
    shown = after if view.steps else both
    if in_order:
        shown = both.over_tokens(lambda x: gather(x, view.in_order))
    give = _decoded if turn else _turned
    return Passed(
        key=give(shown.keys, dtype),
        value=give(shown.values, dtype),
        visible=None if in_order else view.visible,
        evicted=Evicted(
            _decoded(gone.keys, dtype),
            _decoded(gone.values, dtype),
            {name: gate.float() for name, gate in gone.gates.items()},
        ),
        state=after,
    )


def _encoded(x: Tensor, offset: Tensor, unbiased: bool) -> TierRing:
    """Keys or values (B, Hkv, m, P) that leave the window, less their offset."""
    return TierRing(*encode(x.to(precise(x.dtype)) - offset.unsqueeze(2), unbiased), offset)


def _decoded(ring: TierRing, dtype: torch.dtype) -> Tensor:
    return (decode(ring.codes, ring.scales, dtype) + ring.offset.unsqueeze(2)).to(dtype)


def _turned(ring: TierRing, dtype: torch.dtype) -> Tensor:
    return turned(ring.codes, ring.scales, dtype)


def attend(query: Tensor, keys: Tensor, values: Tensor, passed: Passed, scaling: float) -> Tensor:
    """A single query a row over all keys that are held exactly and all of the tier, which `push` has not turned.

    The rotation is orthogonal: turning the query, and in the end the result, is as good as turning every key and value.
    What the keys' offset adds to a score is the same for all of them.

    Args:
        query: (B, Hq, 1, P); keys, values: (B, Hkv, T, P).
    """
    run, kind = windowed.kernel_of_one(query), precise(query.dtype)
    groups = query.shape[1] // keys.shape[1]
    key_offset, value_offset = (
        ring.offset.to(kind).repeat_interleave(groups, dim=1).unsqueeze(2)
        for ring in (passed.state.keys, passed.state.values)
    )
    out, score = run(rotate(query.to(kind)).to(query.dtype), passed.key, passed.value, False, scaling)
    score = score + scaling * (query * key_offset).sum(-1)
    out = (rotate(out.to(kind)) + value_offset).to(query.dtype)
    return merge([Part(*run(query, keys, values, False, scaling)), Part(out, score)])


def empty(capacity: int, window: WindowState) -> TierState:
    """The tier of a layer before anything left its window; captured steps need its tensors from the start."""
    B, heads, _, P = window.keys.shape

    def ring() -> TierRing:
        return TierRing(
            codes=window.keys.new_zeros(B, heads, capacity, code_bytes(P, BITS), dtype=torch.uint8),
            scales=window.keys.new_zeros(B, heads, capacity, dtype=torch.bfloat16),
            offset=window.keys.new_zeros(B, heads, P, dtype=torch.float32),
        )

    gates = {name: gate.new_zeros(B, gate.shape[1], capacity) for name, gate in window.gates.items()}
    return TierState(ring(), ring(), gates)


def nbytes(capacity: int, kv_heads: int, head_dim: int) -> int:
    """Bytes of one layer and sequence: codes, scales and offsets (the waiting gates not counted)."""
    token = 2 * kv_heads * (code_bytes(head_dim, BITS) + torch.bfloat16.itemsize)
    return capacity * token + 2 * kv_heads * head_dim * torch.float32.itemsize


def _offset(view: TierView, ring: TierRing | None, x: Tensor) -> Tensor:
    """(B, Hkv, P) float32 of keys or values x: the row's, zeros before its first token leaves the window."""
    old = None if ring is None else ring.offset
    if view.first_window is not None:
        slots, rows = view.first_window
        mean = gather(x, slots).to(precise(x.dtype)).mean(2).float()
        return mean if rows is None else torch.where(rows, mean, torch.zeros_like(mean) if old is None else old)
    return x.new_zeros(x.shape[0], x.shape[1], x.shape[3], dtype=torch.float32) if old is None else old
