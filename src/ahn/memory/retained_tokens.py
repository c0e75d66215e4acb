"""Retained tokens: of all that left the window, those that later queries will look at most are kept as tokens.

A small scorer says of every token, per key head, how much queries beyond the window will look at it; it learns that
from the base model's own full attention (`ahn.training`). Attention sees the tokens with the highest scores beside
sinks and window, in one softmax. A state of the same size as a recurrent one can give back what was said, word for
word, as long as the right tokens were kept.

Few heads of a model are those that find what was said long ago. With `AHNConfig.slot_heads` these alone keep tokens,
several times as many for as many bytes; the others see sinks and window.

A row's tokens leave the window one after the other. They gather in a block of G; when it is full, the M highest-scored
of the tokens kept before and those of the block stay (of equal scores the older), and the rest is forgotten for good
(`ahn.layout.blocks`). So a query sees the best M of all that had left up to the last full block, and whatever left
since: that exactly, the others exactly or at a few bits per number.

With `AHNConfig.passage` so many tokens next to each other stay or go together, in all heads of a layer, by the mean of
their scores: text that hangs together, as the base has always seen it.

With `AHNConfig.score_layer` there is one score a token, which that layer's scorer gives, and all heads of all layers
keep the same tokens: what hangs together across layers is found together. It learns from the heads that find. Layers
before it can know the score, for it is wanted only when its token leaves the window: no forward has more new tokens
than the window, and after each the scores of its tokens are put beside every layer's window (`AHNCache.finish`).

The base never saw so many salient tokens at once as the best M of a text that is much longer than what it was trained
on: its attention to them grows with the text, and its predictions get worse. So beyond the trained length they weigh
together what as large a share of a text of the trained length would (`ahn.layout.blocks.TextPiece.bias`). Passages need
none of that.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from ahn.errors import AHNError
from ahn.layout.anchored import Anchored
from ahn.layout.blocks import Fates, TextPiece, TokenBlocks
from ahn.layout.evicted import Evicted
from ahn.layout.slots import Picked
from ahn.layout.visibility import Visibility
from ahn.memory.base import INIT_STD, Memory, MemoryKeys, SeenKeys
from ahn.memory.kept import Kept
from ahn.shape import EXACT

WIDTH = 32
"""Hidden units of the scorer."""
BLOCK, SHARE = 128, 8
"""Slots of the block that is filling: so many, or one of so many if there are fewer than 1 024."""


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


@dataclasses.dataclass(frozen=True, eq=False)
class ShownPiece:
    """Some queries of a forward, and the tokens that they may see.

    Attributes:
        text: the queries.
        places: (B, h, U) of the tokens; h is 1 where all heads see the same.
        at: (B, h, U) the positions at which they are seen.
        visible: (B, h, n, C') as in `SeenKeys`.
    """

    text: TextPiece
    places: Tensor
    at: Tensor
    visible: Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Choice:
    """What becomes of the tokens in a forward.

    Attributes:
        stay: those that are kept afterwards.
        after: the state's `scores` and `positions` afterwards.
        seen: those of all pieces, one behind the other.
        at: (B, h, U) the positions at which these are seen, (B, U) where one score is for all heads.
    """

    stay: Picked
    after: dict[str, Tensor]
    seen: Picked
    at: Tensor
    pieces: list[ShownPiece]


class RetainedTokens(Memory):
    """Keeps `slots` tokens per key head: M with the highest scores, at a few bits per number, and a block of G exactly.

    State: of the M that are kept `keys`, `values` and what else `Kept` needs of them; of the block that is filling
    `block_keys`, `block_values` (B, Hkv, G, P); of all `scores` (B, Hkv, M + G) bfloat16 and `positions` int32, -1 for
    an empty slot. Here and below Hkv are the key heads that keep tokens; a layer in which none does has no state. Keys
    are as before RoPE where the base's rotation is known. The M are in the order of the text; the token at position p,
    the k-th that left, is the (k mod G)-th of its block.
    """

    name = "retained"
    published_name = "RetainedTokens"
    closed_gates = {"score": float("-inf")}  # noqa: RUF012  (a constant of the class)
    moves_keys = keeps_tokens = True
    heads_apart = True

    def __init__(self, *sizes: Any, **options: Any) -> None:
        super().__init__(*sizes, **options)
        scored = {"own": len(self.slot_heads), "made": 1, "given": 0}[self.scores]
        self.scorer = Scorer(self.hidden_size, scored) if scored else None
        self._chosen: dict[torch.device, Tensor] = {}
        if self.block % self.passage or self.kept % self.passage:
            raise AHNError(
                f"passage={self.passage} must divide the {self.block} tokens of a block and the {self.kept} that are "
                f"kept beside it, of slots={self.slots}. A power of two up to 128 fits slots of 8 times as many, or of "
                "a multiple of that."
            )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initial values for training: scores of about zero."""
        for module in () if self.scorer is None else self.scorer.children():
            assert isinstance(module, nn.Linear)
            nn.init.normal_(module.weight, std=INIT_STD)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    @property
    def block(self) -> int:
        """G."""
        return min(BLOCK, max(1, self.slots // SHARE))

    @property
    def kept(self) -> int:
        """M."""
        return self.slots - self.block

    @property
    def write_heads(self) -> int:
        return self.kv_heads

    def slot_count(self, window: int) -> int:
        return self.slots if self.slot_heads else 0

    def chosen(self, device: torch.device) -> Tensor | None:
        """The numbers of the key heads that keep tokens, (h,); None for all."""
        if len(self.slot_heads) == self.kv_heads:
            return None
        if device not in self._chosen:
            self._chosen[device] = torch.tensor(self.slot_heads, dtype=torch.long, device=device)
        return self._chosen[device]

    def places(self, device: torch.device) -> Tensor | None:
        """(Hkv,) int32 where among the heads that keep tokens each key head is, -1 for others; None where all do."""
        chosen = self.chosen(device)
        if chosen is None:
            return None
        places = torch.full((self.kv_heads,), -1, dtype=torch.int32, device=device)
        return places.index_copy_(0, chosen, torch.arange(len(chosen), dtype=torch.int32, device=device))

    def logits(self, x: Tensor) -> Tensor:
        """How much queries beyond the window will look at tokens with attention input x (B, n, D): (B, Hkv, n).

        (B, 1, n) where one score is for all heads.
        """
        if self.scorer is None:
            return x.new_zeros(x.shape[0], 0, x.shape[1], dtype=torch.float32)
        logits: Tensor = self.scorer(x).float()
        return logits

    def write_gates(self, x: Tensor) -> dict[str, Tensor]:
        """As for every memory. Zeros where no head keeps tokens, and where scores are given: later, by the cache."""
        # Of all key heads, as gates are: what waits in the window does not depend on the layer.
        every = len(x), self.kv_heads, x.shape[1]
        if self.scorer is None:
            return {"score": torch.zeros(every, device=x.device)}
        scores = self.logits(x)
        if self.passage > 1:
            scores = scores.sigmoid().mean(1, keepdim=True)
        chosen = None if self.scores == "made" else self.chosen(x.device)
        heads = self.kv_heads if chosen is None else len(chosen)
        if scores.shape[1] < heads:
            scores = scores.expand(-1, heads, -1)
        # Rounded to what a score has where it waits, so that every way to read a text compares the same numbers.
        scores = scores.bfloat16().float()
        return {"score": scores if chosen is None else scores.new_zeros(every).index_copy(1, chosen, scores)}

    def slot_bytes(self, window: int, width: int) -> int:
        dtype = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[width]
        key = torch.empty(1, self.kv_heads, 0, self.head_dim, dtype=dtype, device="meta")
        return sum(x.nbytes for x in self.empty_slots(key, window).values())

    def empty_slots(self, key: Tensor, window: int) -> dict[str, Tensor]:
        if not self.slot_heads:
            return {}
        key = self._own(key)
        B, heads, _, P = key.shape
        scores = key.new_zeros(B, heads, self.slots, dtype=torch.bfloat16)
        state = {"scores": scores, "positions": torch.full_like(scores, -1, dtype=torch.int32)}
        for name, bits in zip(("key", "value"), self.bits, strict=True):
            state |= Kept.empty(key, self.kept, bits).tensors(name)
            state[f"block_{name}s"] = key.new_zeros(B, heads, self.block, P)
        return state

    def extra_keys(
        self, left: Evicted, view: Visibility, state: dict[str, Tensor], anchored: Anchored | None = None
    ) -> MemoryKeys | None:
        if not self.slot_heads or (view.evicted == 0 and not state):
            return None
        state = state or self.empty_slots(left.key, view.window)
        gates = {name: self._own(gate) for name, gate in left.gates.items()}
        left = Evicted(self._own(left.key), self._own(left.value), gates)
        blocks = TokenBlocks.of(view, left.key.shape[0], self.kept, self.block, self.passage)
        choice = self._choice(blocks, state, left.gates["score"], anchored)
        key = left.key if anchored is None else anchored.undo(left.key, blocks.turned)
        keys, later_keys = self._tokens("key", key, blocks, state, choice.stay)
        values, later_values = self._tokens("value", left.value, blocks, state, choice.stay)
        after = choice.after
        if self.scores != "own":  # each layer writes its own in place
            after = {name: x.repeat(1, len(self.slot_heads), 1) for name, x in after.items()}
        return MemoryKeys(self._seen(choice, keys, values, anchored), after | later_keys | later_values)

    def _choice(
        self, blocks: TokenBlocks, state: dict[str, Tensor], score: Tensor, anchored: Anchored | None
    ) -> Choice:
        """Who stays and who is seen: each layer's own, or, where one scores for all heads, the first's once a forward.

        Layers that do not turn keys see the same tokens, none of them elsewhere.
        """
        if self.scores == "own":
            return self._chosen_by(blocks, state, score, anchored)
        shared, key = blocks.view.shared, (RetainedTokens, len(score), anchored is None)
        if key not in shared:
            first = {name: state[name][:, :1] for name in ("scores", "positions")}
            shared[key] = self._chosen_by(blocks, first, score[:, :1], anchored)
        found: Choice = shared[key]
        return found

    @torch.no_grad()
    def _chosen_by(
        self, blocks: TokenBlocks, state: dict[str, Tensor], score: Tensor, anchored: Anchored | None
    ) -> Choice:
        """By the scores (B, h, m) of those that leave and those in the state, of all heads or of one for all."""
        new = blocks.positions[:, None].expand(-1, score.shape[1], -1)
        scores, positions = (
            torch.cat([state[name], x.to(state[name].dtype)], dim=2)
            for name, x in (("scores", score), ("positions", new))
        )
        scores = blocks.by_passage(scores)
        fates = blocks.fates(scores, positions)
        stay = blocks.staying(fates, blocks.most)
        after = {"scores": blocks.after(scores, stay, 0), "positions": blocks.after(positions, stay, -1)}
        behind = self.block + blocks.view.evicted if self._coded and blocks.most else 0
        spans = ((0, blocks.view.length),) if anchored is None else anchored.spans
        pieces = [self._piece(blocks, fates, piece, behind, anchored) for piece in blocks.pieces(spans)]
        places, at = (torch.cat(x, dim=2) for x in zip(*((piece.places, piece.at) for piece in pieces), strict=True))
        return Choice(Picked(stay), after, Picked(places), at if self.scores == "own" else at[:, 0], pieces)

    def _piece(
        self, blocks: TokenBlocks, fates: Fates, piece: TextPiece, behind: int, anchored: Anchored | None
    ) -> ShownPiece:
        """What some of the queries see.

        Args:
            behind: how far exact tokens are behind their codes in `_tokens`.
        """
        places = self._places(blocks, fates, piece, behind)
        own = torch.where(places < blocks.slots + blocks.view.evicted, places, places - behind) if behind else places
        positions, forgotten = fates.positions.gather(2, own), fates.forgotten.gather(2, own)
        visible = self._visible(piece, positions, forgotten)
        if anchored is None:
            return ShownPiece(piece, places, positions, visible)
        phases = anchored.phases(piece.first, piece.last)
        at = [positions.clamp_min(0).maximum(phase.anchor[:, None, None]) for phase in phases]
        if len(phases) > 1:  # the same tokens as often, each time for other queries
            own_phase = [phase.queries[:, None, :, None] for phase in phases if phase.queries is not None]
            visible = torch.cat([visible & queries for queries in own_phase], dim=3)
        return ShownPiece(piece, places.repeat(1, 1, len(phases)), torch.cat(at, dim=2), visible)

    def _own(self, x: Tensor) -> Tensor:
        """Of x (B, Hkv, m, ...) for all key heads that of those which keep tokens."""
        chosen = self.chosen(x.device)
        return x if chosen is None else x.index_select(1, chosen)

    @property
    def _coded(self) -> bool:
        return self.bits != (EXACT, EXACT)

    def _tokens(
        self, name: str, new: Tensor, blocks: TokenBlocks, state: dict[str, Tensor], stay: Picked
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Keys or values in all places, and as they are kept afterwards.

        Where tokens are coded, those of a block are seen exactly, and later, if they are kept, from their codes: both
        stand side by side, (B, Hkv, M [+ G + m] + G + m, P), the codes first.
        """
        held = Kept.of(state, name)
        exact = torch.cat([state[f"block_{name}s"].to(new.dtype), new], dim=2)
        all_kept = held.joined(exact, blocks, unbiased=name == "key") if blocks.most or not self._coded else held
        shown = all_kept.decoded(new.dtype)
        if self._coded:
            shown = torch.cat([shown, exact], dim=2)
        later = all_kept.take(stay) if blocks.most else held
        return shown, later.tensors(name) | {f"block_{name}s": blocks.block_after(exact)}

    def _seen(self, choice: Choice, keys: Tensor, values: Tensor, anchored: Anchored | None) -> list[SeenKeys]:
        """What each piece of the queries sees, of keys and values that `_tokens` gave."""
        keys, values = choice.seen.of(keys), choice.seen.of(values)
        if anchored is not None:
            keys = anchored.turn(keys, choice.at)
        heads, sizes = self.chosen(keys.device), [piece.places.shape[2] for piece in choice.pieces]
        split = zip(choice.pieces, keys.split(sizes, dim=2), values.split(sizes, dim=2), strict=True)
        return [SeenKeys(x.text.first, x.text.last, k, v, x.visible, x.text.bias, heads) for x, k, v in split]

    def _places(self, blocks: TokenBlocks, fates: Fates, piece: TextPiece, behind: int) -> Tensor:
        """(B, Hkv, M [+ coded] + T) where in `_tokens` the keys are that a piece may see, first those that it does."""
        stayed = blocks.lasting(fates, piece.full)
        own = [piece.places[: piece.coded], piece.places + behind] if self._coded else [piece.places]
        return torch.cat([stayed, *(x.expand(*stayed.shape[:2], -1) for x in own)], dim=2)

    def _visible(self, piece: TextPiece, positions: Tensor, forgotten: Tensor) -> Tensor:
        """Which of the piece's queries sees which of `_places`, after those that all see."""
        M, coded, first = self.kept, piece.coded, piece.certain
        heads = *forgotten.shape[:2], -1, -1
        kept = piece.kept(positions[:, :, first:M], forgotten[:, :, first:M])
        after, filling = piece.after(forgotten[:, :, M : M + coded]), piece.filling.expand(heads)
        if self._coded:
            return torch.cat([kept, after, filling], dim=3)
        return torch.cat([kept, after | filling[..., :coded], filling[..., coded:]], dim=3)
