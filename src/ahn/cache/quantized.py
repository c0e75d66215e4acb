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
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ahn.attend import windowed
from ahn.attend.merge import merge
from ahn.attend.parts import Part
from ahn.layout.slots import gather
from ahn.layout.tier import TierView
from ahn.ops.quantize import PER_BYTE, decode, encode, precise, rotate, turned

if TYPE_CHECKING:
    from ahn.layout.evicted import Evicted

PREFIX = "quantized."
"""Of the tier's tensors among those of a layer's state."""
GATES = "gates."


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
    run, kind = windowed.kernel_of_one(query), precise(query.dtype)
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
