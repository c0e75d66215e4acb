"""Retained tokens: of all that left the window, those that later queries will look at most are kept as tokens.

A small scorer says of every token, per key head, how much queries beyond the window will look at it; it learns that
from the base model's own full attention (`ahn.training`). Attention sees the tokens with the highest scores beside
sinks and window, in one softmax. A state of the same size as a recurrent one can give back what was said, word for
word, as long as the right tokens were kept.

A row's tokens leave the window one after the other. They gather in a block of G; when it is full, the M highest-scored
of the tokens kept before and those of the block stay (of equal scores the older), and the rest is forgotten for good.
So a query sees the best M of all that had left up to the last full block, and whatever left since.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ahn.memory.base import INIT_STD, Memory, MemoryKeys
from ahn.shape import DEFAULT_SLOTS

if TYPE_CHECKING:
    from ahn.layout.evicted import Evicted
    from ahn.layout.rotation import Anchored
    from ahn.layout.visibility import Visibility

WIDTH = 128
"""Hidden units of the scorer."""
SHARE = 8
"""One of so many slots belongs to the block that is filling."""
NEVER = torch.iinfo(torch.int32).max


class Scorer(nn.Module):
    """A linear map and a small network side by side: attention input (B, n, D) to scores (B, Hkv, n), as logits."""

    def __init__(self, hidden_size: int, kv_heads: int) -> None:
        super().__init__()
        self.direct = nn.Linear(hidden_size, kv_heads, bias=False)
        self.inner = nn.Linear(hidden_size, WIDTH)
        self.outer = nn.Linear(WIDTH, kv_heads)

    def forward(self, x: Tensor) -> Tensor:
        """In the scorer's own precision."""
        x = x.to(self.direct.weight.dtype)
        return (self.direct(x) + self.outer(nn.functional.silu(self.inner(x)))).transpose(1, 2)


class RetainedTokens(Memory):
    """Keeps `slots` tokens per key head: M with the highest scores, and a block of G = slots / 8.

    State: `keys`, `values` (B, Hkv, M + G, P) in the model's precision, keys as before RoPE where the base's rotation
    is known; `scores` (B, Hkv, M + G) bfloat16; `positions` (B, Hkv, M + G) int32, -1 for an empty slot. The first M
    slots are in the order of the text; the token at position p, the k-th that left, is the (k mod G)-th of its block.
    """

    name = "retained"
    published_name = "RetainedTokens"
    closed_gates = {"score": float("-inf")}  # noqa: RUF012  (a constant of the class)
    moves_keys = True

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        head_dim: int,
        kv_heads: int | None = None,
        q_proj: bool = False,
        slots: int = DEFAULT_SLOTS,
    ) -> None:
        super().__init__(hidden_size, heads, head_dim, kv_heads, slots=slots)
        self.scorer = Scorer(hidden_size, self.kv_heads)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initial values for training: scores of about zero."""
        for module in self.scorer.children():
            assert isinstance(module, nn.Linear)
            nn.init.normal_(module.weight, std=INIT_STD)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    @property
    def block(self) -> int:
        """G."""
        return max(1, self.slots // SHARE)

    @property
    def kept(self) -> int:
        """M."""
        return self.slots - self.block

    @property
    def write_heads(self) -> int:
        return self.kv_heads

    def slot_count(self, window: int) -> int:
        return self.slots

    def logits(self, x: Tensor) -> Tensor:
        """How much queries beyond the window will look at tokens with attention input x (B, n, D): (B, Hkv, n)."""
        return self.scorer(x).float()

    def write_gates(self, x: Tensor) -> dict[str, Tensor]:
        # Rounded to what a score has where it waits, so that every way to read a text compares the same numbers.
        return {"score": self.logits(x).bfloat16().float()}

    def slot_bytes(self, width: int) -> int:
        return 2 * self.head_dim * width + torch.bfloat16.itemsize + torch.int32.itemsize

    def empty_slots(self, key: Tensor, window: int) -> dict[str, Tensor]:
        B, heads, _, P = key.shape
        keys = key.new_zeros(B, heads, self.slots, P)
        scores = torch.zeros(B, heads, self.slots, dtype=torch.bfloat16, device=key.device)
        positions = torch.full_like(scores, -1, dtype=torch.int32)
        return {"keys": keys, "values": keys.clone(), "scores": scores, "positions": positions}

    def extra_keys(
        self, left: Evicted, view: Visibility, state: dict[str, Tensor], anchored: Anchored | None = None
    ) -> MemoryKeys | None:
        if view.evicted == 0 and not state:
            return None
        state = state or self.empty_slots(left.key, view.window)
        passage = _Passage(view, left.key.shape[0], self.kept, self.block)
        new = passage.positions[:, None].expand(-1, left.key.shape[1], -1)
        key = left.key if anchored is None else anchored.rotation.undo(left.key, new.clamp_min(0))
        tokens = {"keys": key, "values": left.value, "scores": left.gates["score"], "positions": new}
        both = {name: torch.cat([held, tokens[name].to(held.dtype)], dim=2) for name, held in state.items()}
        with torch.no_grad():
            kept, forgotten = passage.choose(both["scores"], both["positions"])
            visible = passage.visible(both["positions"], forgotten)
        shown = both["keys"], both["values"], visible
        if anchored is not None:
            shown = _placed(*shown, both["positions"].clamp_min(0), anchored)
        return MemoryKeys(*shown, passage.after(both, kept))


def _placed(
    keys: Tensor, values: Tensor, visible: Tensor, positions: Tensor, anchored: Anchored
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys turned to where the queries see them, once per place of an anchor, their values, and who sees them."""
    if len(anchored.spans) == 1:
        return anchored.turn(keys, positions, 0), values, visible
    parts = []
    for first, last in anchored.spans:
        own = torch.zeros_like(visible)
        own[:, :, first:last] = visible[:, :, first:last]
        seen = own.flatten(0, 2).any(0).nonzero()[:, 0]
        turned = anchored.turn(keys[:, :, seen], positions[:, :, seen], first)
        parts.append((turned, values[:, :, seen], own[:, :, :, seen]))
    placed, held, shown = zip(*parts, strict=True)
    return torch.cat(placed, 2), torch.cat(held, 2), torch.cat(shown, 3)


@dataclasses.dataclass
class _Passage:
    """One forward's way through the blocks, in *places*: M + G slots first, then the m tokens that leave now.

    Args:
        rows: B.
        kept, block: M and G.
    """

    view: Visibility
    rows: int
    kept: int
    block: int

    @property
    def slots(self) -> int:
        return self.kept + self.block

    def _left(self, lengths: Tensor) -> Tensor:
        """(B,) tokens that have left the window of rows of these lengths."""
        return (lengths - self.view.window - self.view.sinks).clamp_min(0).expand(self.rows)

    @cached_property
    def before(self) -> Tensor:
        """(B,) tokens of each row that left in earlier forwards."""
        return self._left(self.view.lengths_before)

    @cached_property
    def later(self) -> Tensor:
        """(B,) tokens of each row that have left after this forward."""
        return self._left(self.view.lengths_after)

    @cached_property
    def numbers(self) -> Tensor:
        """(B, m) how many tokens of its row left before each that leaves now; padding has those of tokens long gone."""
        first = self.view.length - self.view.evicted
        numbers = self.view.query_positions[:, first:] - self.view.window - self.view.sinks
        return numbers.expand(self.rows, -1)

    @cached_property
    def positions(self) -> Tensor:
        """(B, m) positions of the tokens that leave now, -1 for padding."""
        real = self.numbers >= self.before[:, None]
        return torch.where(real, self.numbers + self.view.sinks, -1)

    def _places(self, block: Tensor) -> tuple[Tensor, Tensor]:
        """Of the tokens of each row's block (B,) of that number: their numbers and places, (B, G)."""
        numbers = block[:, None] * self.block + torch.arange(self.block, device=block.device)
        new = self.slots + numbers - self.numbers[:, :1] if self.view.evicted else numbers
        held = numbers < self.before[:, None]
        places = torch.where(held, self.kept + numbers % self.block, new)
        return numbers, places.clamp(0, self.slots + self.view.evicted - 1)

    @property
    def _most_blocks(self) -> int:
        """At most so many blocks are filled in a row."""
        view = self.view
        if view.padded:
            return -(-view.evicted // self.block)
        first, last = (max(0, columns - view.lossless) // self.block for columns in (view.seen, view.total))
        return last - first

    def choose(self, scores: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Who stays.

        Args:
            scores, positions: (B, Hkv, M + G + m) of all places.

        Returns:
            The places of the M tokens that are kept in the end (B, Hkv, M), in the order of the text, and per place
            the number of the block from which on it is forgotten (B, Hkv, M + G + m).
        """
        B, heads, _ = scores.shape
        scores = scores.float().masked_fill(positions < 0, float("-inf"))
        forgotten = torch.full_like(positions, NEVER, dtype=torch.long)
        kept = torch.arange(self.kept, device=scores.device).expand(B, heads, -1)
        for block in range(self._most_blocks):
            full = self.before // self.block + block
            _, places = self._places(full)
            both = torch.cat([kept, places[:, None].expand(-1, heads, -1)], dim=2)
            order = scores.gather(2, both).argsort(dim=2, descending=True, stable=True)
            lost = both.gather(2, order[:, :, self.kept :])
            stay = both.gather(2, order[:, :, : self.kept].sort(dim=2).values)
            filled = (full < self.later // self.block)[:, None, None]
            gone = torch.where(filled, full[:, None, None] + 1, NEVER).expand_as(lost)
            forgotten = forgotten.scatter_reduce(2, lost, gone, "amin")
            kept = torch.where(filled, stay, kept)
        return kept, forgotten

    def visible(self, positions: Tensor, forgotten: Tensor) -> Tensor:
        """(B, Hkv, n, M + G + m) which query sees which place: what has left by then and is not forgotten."""
        left = (self.view.query_positions - self.view.window - self.view.sinks + 1)[:, None, :, None]
        number = torch.where(positions < 0, NEVER, positions - self.view.sinks)[:, :, None]
        blocks = torch.div(left, self.block, rounding_mode="floor")
        return (number < left) & (blocks < forgotten[:, :, None])

    def after(self, tokens: dict[str, Tensor], kept: Tensor) -> dict[str, Tensor]:
        """The state after this forward, of the tokens in all places, each (B, Hkv, M + G + m, ...)."""
        numbers, places = self._places(self.later // self.block)
        places = torch.cat([kept, places[:, None].expand(-1, kept.shape[1], -1)], dim=2)
        filling = (numbers < self.later[:, None])[:, None].expand(-1, kept.shape[1], -1)
        used = (tokens["positions"].gather(2, places) >= 0) & torch.cat([torch.ones_like(kept).bool(), filling], 2)
        state = {}
        for name, x in tokens.items():
            index, fits = (y.reshape(*y.shape, *[1] * (x.dim() - 3)) for y in (places, used))
            taken = x.gather(2, index.expand(*places.shape, *x.shape[3:]))
            state[name] = taken.masked_fill(~fits, -1 if name == "positions" else 0)
        return state
