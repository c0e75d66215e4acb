"""Ways to look at far tokens, on a text that was read once with sinks and window alone.

`Reader.read` keeps keys from before RoPE and values of every token and layer; `Reader.look` then runs the last tokens
of the text, which see sinks, window, and what is far in the way that a `Look` says. So hidden states of the text are
the same for all looks, and a look costs a forward over few tokens. Plain torch, one text at a time, scores in float32.

It is for Llama's layers (separate projections, no biases, RoPE of one table, one kind of attention).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ahn.memory.retained_tokens import Scorer

TRAINED = 8192
"""Tokens of a text to which `Look.bias` and a `Look.sharp` of "log" refer."""
BLOCK = 64
"""Consecutive tokens that are chosen together."""
POOLED = 3
"""Tokens on either side whose scores count for a token where tokens are chosen by what looked at them."""


@dataclasses.dataclass(frozen=True)
class Look:
    """How the last tokens of a text see what is far.

    Attributes:
        place: "one": all at one distance, whichever query looks; "block": in a block behind the window, in their order,
            several tokens at one position where there are more than fit; "true": where they are, at most so far away.
        distance: that distance, the block's length, or the farthest.
        heads: so many key heads see them, the first of an order; the others see sinks and window.
        sharp: far scores are multiplied by it; "log": by log n / log `TRAINED` for n far tokens.
        steady: the far tokens' common weight (log-sum-exp of their scores) stays as without `sharp` and `top`.
        bias: far scores are lowered by it times log(n / `TRAINED`), if n is more.
        top: each query sees so many far tokens a key head, those with its highest scores; 0 for all.
        choice: which far tokens there are: "all"; "score": the `slots` best of each key head by the scorers of retained
            tokens; "oracle": as "score", the place of the fact always among them. The others choose whole blocks, and
            the block that is filling is there besides: "head blocks": each key head by its own scores; "layer blocks":
            each layer by those of its heads, added up; "blocks": all by those of the first `finders` heads;
            "blocks so far": each layer by those of them up to this layer; "learned": all by the one learned score that
            the input of `layer` gives; "found": all those that the queries asked for `asked` look at most, in the first
            `finders` heads.
        slots: tokens that are chosen.
        finders: key heads that choose.
        layer: layers before it see sinks and window alone, and of "blocks" only finding heads up to it choose; 0: all.
        tail: tokens before the reply that look already; those before them were read with sinks and window alone,
        reading: unless all of the text is read with this look.
    """

    place: str = "block"
    distance: int = 1024
    heads: int = 90
    sharp: float | str = 1.0
    steady: bool = False
    bias: float = 0.0
    top: int = 0
    choice: str = "all"
    slots: int = 0
    finders: int = 0
    layer: int = 0
    tail: int = 96
    reading: bool = False

    @property
    def name(self) -> str:
        """What is not a default, in words; two looks that differ have two names."""
        parts = [f"{self.place} {self.distance}", f"{self.heads} heads"]
        parts += [f"sharp {self.sharp}"] if self.sharp != 1 else []
        parts += ["steady"] if self.steady else []
        parts += [f"bias {self.bias:g}"] if self.bias else []
        parts += [f"top {self.top}"] if self.top else []
        parts += [f"{self.choice} {self.slots}"] if self.choice != "all" else []
        parts += [f"by {self.finders}"] if self.finders else []
        parts += [f"from layer {self.layer}"] if self.layer else []
        parts += [f"tail {self.tail}"] if self.tail != Look.tail else []
        parts += ["while reading"] if self.reading else []
        return ", ".join(parts)


@dataclasses.dataclass(frozen=True)
class Memory:
    """What reading a text of n tokens leaves by layer: keys before RoPE and values (Hkv, n, P), scores (Hkv, n).

    Attributes:
        learned: (1, n) the learned scores of those layers that have any.
    """

    keys: list[Tensor]
    values: list[Tensor]
    scores: list[Tensor]
    learned: Mapping[int, Tensor] = dataclasses.field(default_factory=dict)

    def before(self, n: int) -> Memory:
        """The first n tokens of it."""
        parts = ([x[:, :n] for x in part] for part in (self.keys, self.values, self.scores))
        return Memory(*parts, {number: x[:, :n] for number, x in self.learned.items()})


def blocks_of(ratings: Tensor, choice: str) -> Tensor:
    """(H, n // `BLOCK`) of ratings (H, n) those of whole blocks: their sums; of what queries look at the best."""
    whole = ratings[:, : ratings.shape[1] // BLOCK * BLOCK].unflatten(1, (-1, BLOCK))
    return whole.amax(2) if choice == "found" else whole.sum(2)


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a look found.

    Attributes:
        logits: (count, V) float32 of the places.
        shares: what share of their attention goes to the fact, mean over the places, by (layer, key head); of a key
            head the query head that gives most.
        held: whether all of the fact is among the tokens that this head can see.
    """

    logits: Tensor
    shares: Mapping[tuple[int, int], float]
    held: Mapping[tuple[int, int], bool]


class Reader:
    """A base model that reads with S sinks and a window of W.

    Args:
        order: (layer, key head), those first that find what is far.
        scorers: of retained tokens, by layer; none: choices by score cannot be asked for.
        learned: scorers of one score a token for all heads, by the layer whose input they score.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        window: int,
        sinks: int,
        order: Sequence[tuple[int, int]],
        scorers: Sequence[Scorer] = (),
        learned: Mapping[int, Scorer] | None = None,
    ) -> None:
        self.model, self.decoder, self.window, self.sinks = model, model.get_decoder(), window, sinks
        self.order, self.scorers, self.learned = list(order), scorers, learned or {}
        text = model.config
        self.heads, self.kv_heads = text.num_attention_heads, text.num_key_value_heads
        self.head_dim = text.head_dim or text.hidden_size // self.heads
        self.device = model.device

    # -- reading ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def read(self, ids: Tensor, look: Look | None = None) -> Memory:
        """Read a text ids (n,) with sinks and window, and what is far besides if there is a look."""
        memory = Memory([], [], [])
        for number, inputs, k, v in self.layers(ids, look):
            memory.keys.append(k)
            memory.values.append(v)
            if self.scorers:
                memory.scores.append(self.scored(self.scorers[number], inputs))
            if number in self.learned:
                memory.learned[number] = self.scored(self.learned[number], inputs)
        return memory

    @torch.no_grad()
    def layers(self, ids: Tensor, look: Look | None = None) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """While a text ids (n,) is read, of each layer: number, input (n, D), keys before RoPE and values (Hkv, n, P).

        What comes after the last layer that is taken is not worked out.
        """
        x = self.decoder.embed_tokens(ids.to(self.device))
        for number, layer in enumerate(self.decoder.layers):
            inputs = layer.input_layernorm(x)
            q, k, v = self._project(layer, inputs)
            yield number, inputs, k, v
            out = self._windowed(q, k, v) if look is None else self._looking(number, look, q, k, v)
            x = self._after(layer, x, out)

    @torch.no_grad()
    def scored(self, scorer: Scorer, inputs: Tensor) -> Tensor:
        """(H, n) float32 of a layer's input (n, D)."""
        return scorer(inputs[None])[0].float()

    def _project(self, layer: torch.nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (Hq, n, P), keys and values (Hkv, n, P) before RoPE."""
        attention = layer.self_attn
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        q, k, v = (part(inputs).unflatten(-1, (-1, self.head_dim)).transpose(0, 1) for part in parts)
        return q, k, v

    def _after(self, layer: torch.nn.Module, x: Tensor, out: Tensor) -> Tensor:
        """Hidden states (n, D) after a layer whose attention gave (Hq, n, P)."""
        x = x + layer.self_attn.o_proj(out.transpose(0, 1).flatten(1).to(x.dtype))
        return x + layer.mlp(layer.post_attention_layernorm(x))

    def turn(self, x: Tensor, positions: Tensor) -> Tensor:
        """x (..., T, P) from before RoPE to positions (T,) or (..., T), in float32 and back."""
        cos, sin = self.decoder.rotary_emb(x.float(), positions.reshape(1, -1).to(self.device))
        cos, sin = (y.view(*positions.shape, self.head_dim) for y in (cos, sin))
        first, second = x.float().chunk(2, dim=-1)
        return (x.float() * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)

    def _windowed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention (Hq, n, P) to sinks and exactly the last W tokens, in blocks of W queries.

        A query of a block sees sinks just before what the block sees of the window, and so never far away.
        """
        S, W, n = self.sinks, self.window, q.shape[1]
        blocks = max(0, math.ceil((n - S) / W))
        own = torch.arange(W, device=self.device)
        sinks = torch.arange(S, device=self.device)
        first = F.scaled_dot_product_attention(
            self.turn(q[:, :S], sinks), self._repeat(self.turn(k[:, :S], sinks)), self._repeat(v[:, :S]), is_causal=True
        )
        if not blocks:
            return first
        pad = S + blocks * W - n

        def cut(x: Tensor, before: int) -> Tensor:
            """(blocks, H, W, P): each block, or the one before it."""
            x = F.pad(x[:, S:], (0, 0, before * W, pad))[:, : blocks * W]
            return x.unflatten(1, (blocks, W)).transpose(0, 1)

        spread = (blocks, -1, -1, -1)
        near_sinks = self.turn(k[:, :S], sinks).expand(spread).clone()
        near_sinks[0] = self.turn(k[:, :S], sinks + W)  # the first block has no block before it
        keys = [near_sinks, self.turn(cut(k, 1), own + S), self.turn(cut(k, 0), own + S + W)]
        values = [v[:, :S].expand(spread), cut(v, 1), cut(v, 0)]
        distance = own[:, None] - own
        seen = torch.cat([torch.ones(W, S, device=self.device, dtype=torch.bool), distance < 0, distance >= 0], dim=1)
        mask = seen.expand(blocks, 1, W, -1).clone()
        mask[0, :, :, S : S + W] = False
        queries = self.turn(cut(q, 0), own + S + W)
        out = []
        for some in torch.arange(blocks, device=self.device).split(32):
            key, value = (self._repeat(torch.cat([x[some] for x in part], dim=2)) for part in (keys, values))
            out.append(F.scaled_dot_product_attention(queries[some], key, value, attn_mask=mask[some]))
        rest = torch.cat(out).transpose(0, 1).flatten(1, 2)[:, : n - S]
        return torch.cat([first, rest], dim=1)

    def _repeat(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self.heads // self.kv_heads, dim=-3)

    def _looking(self, number: int, look: Look, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention (Hq, n, P) to sinks, window, and far tokens as a look says, in blocks of W queries."""
        exact = self.sinks + self.window
        out = [self._windowed(q[:, :exact], k[:, :exact], v[:, :exact])]
        for start in range(exact, q.shape[1], self.window):
            stop = min(start + self.window, q.shape[1])
            out.append(self._attend(number, look, q[:, start:stop], k[:, :stop], v[:, :stop], None, None)[0])
        return torch.cat(out, dim=1)

    # -- looking ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def look(
        self, look: Look | None, ids: Tensor, memory: Memory, places: Tensor, asked: int, fact: slice | None = None
    ) -> Seen:
        """Run the last tokens of a text ids (N,), all behind what `memory` has read.

        Args:
            places: tokens of the text that are to be predicted, each from those before it.
            asked: the queries before this number choose, where a look's choice is "found".
            fact: where in the text the fact is; only tokens of what has been read.
        """
        start = memory.keys[0].shape[1]
        assert len(ids) > asked > start > self.sinks + self.window
        choice = None if look is None else self._choice(look, ids, memory, asked, fact)
        x = self.decoder.embed_tokens(ids[start:].to(self.device))
        shares: dict[tuple[int, int], float] = {}
        held: dict[tuple[int, int], bool] = {}
        for number, layer in enumerate(self.decoder.layers):
            q, k, v = self._project(layer, layer.input_layernorm(x))
            keys, values = torch.cat([memory.keys[number], k], dim=1), torch.cat([memory.values[number], v], dim=1)
            chosen = None if choice is None else choice[number]
            out, far, at = self._attend(number, look, q, keys, values, chosen, places - start)
            if far is not None and fact is not None:
                wanted = ((at >= fact.start - self.sinks) & (at < fact.stop - self.sinks)).expand(self.kv_heads, -1)
                share, whole = (far * wanted[:, None]).sum(-1).amax(1).tolist(), wanted.sum(1).tolist()
                for head in self._looking_heads(number, look.heads):
                    shares[number, head] = share[head]
                    held[number, head] = whole[head] == fact.stop - fact.start
            x = self._after(layer, x, out)
        logits = self.model.lm_head(self.decoder.norm(x[places.to(self.device) - start - 1])).float()
        return Seen(logits, shares, held)

    def _looking_heads(self, number: int, count: int) -> list[int]:
        return sorted(head for layer, head in self.order[:count] if layer == number)

    def _attend(
        self,
        number: int,
        look: Look | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        choice: Tensor | None,
        wanted: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Attention of the last T of n tokens to themselves, sinks, the W tokens before them, and what is far.

        Args:
            q: (Hq, T, P); k, v: (Hkv, n, P); all before RoPE.
            choice: (Hkv or 1, m) far tokens that there are, counted from the first behind the sinks; None for all.
            wanted: probabilities of far tokens are wanted of the queries before these, numbers among the T.

        Returns:
            (Hq, T, P) float32; probabilities (Hkv, Hq / Hkv, m) of the far tokens, mean of the wanted queries, 0 for
            heads that do not look, or None; and (Hkv or 1, m) which these tokens are.
        """
        S, W, T = self.sinks, self.window, q.shape[1]
        start, group, scale = k.shape[1] - T, self.heads // self.kv_heads, self.head_dim**-0.5
        near = slice(start - W, None)
        own = torch.arange(S + W + T, device=self.device)
        query = self.turn(q, own[S + W :]).unflatten(0, (self.kv_heads, group)).float()
        key, value = (torch.cat([x[:, :S], x[:, near]], dim=1) for x in (k, v))
        scores = query @ self.turn(key, own)[:, None].float().mT * scale
        scores = scores.masked_fill(own > own[S + W :, None], float("-inf"))
        value = value[:, None].float()
        heads = [] if look is None else self._looking_heads(number, look.heads)
        at = torch.arange(start - W - S, device=self.device)[None] if choice is None else choice
        if look is None or not heads or not at.numel():
            return (scores.softmax(-1) @ value).flatten(0, 1), None, at
        far_key, far_value = (x[:, S : start - W] for x in (k, v))
        at_heads = at.expand(self.kv_heads, -1)[heads]
        if choice is None:
            far_key, far_value = far_key[heads], far_value[heads]
        else:
            index = at_heads[..., None].expand(-1, -1, self.head_dim)
            far_key, far_value = far_key[heads].gather(1, index), far_value[heads].gather(1, index)
        far = self._far_scores(look, q.unflatten(0, (self.kv_heads, group))[heads], far_key, at_heads, start)
        total = torch.cat([far, scores[heads]], dim=-1).softmax(-1)
        m = far.shape[-1]
        out = scores.softmax(-1) @ value
        out[heads] = total[..., :m] @ far_value[:, None].float() + total[..., m:] @ value[heads]
        found = None
        if wanted is not None:
            found = total.new_zeros(self.kv_heads, group, m)
            found[heads] = total[:, :, wanted.to(self.device) - 1, :m].mean(2)
        return out.flatten(0, 1), found, at

    def _far_scores(self, look: Look, q: Tensor, k: Tensor, at: Tensor, start: int) -> Tensor:
        """(h, Hq / Hkv, T, m) of queries (h, Hq / Hkv, T, P) and far keys (h, m, P), before RoPE; at: (h, m)."""
        S, W, n, T, m = self.sinks, self.window, start - self.window - self.sinks, q.shape[2], k.shape[1]
        if look.place == "one":
            query, key = self.turn(q, torch.full((T,), look.distance, device=self.device)), k
        else:
            if look.place == "block":  # the last of them stands just before the window
                order = torch.arange(m, device=self.device)
                back = W + (m - 1 - order) * min(m, look.distance) // m
            else:
                back = (start - S - at).clamp_max(look.distance)
            query = self.turn(q, torch.arange(T, device=self.device) + S + W)
            key = self.turn(k, S + W - back)
        scores = query.float() @ key[:, None].float().mT * self.head_dim**-0.5
        if look.top or look.steady:
            weight = scores.logsumexp(-1, keepdim=True) if look.steady else None
            if 0 < look.top < m:
                scores = scores.masked_fill(scores < scores.topk(look.top, dim=-1).values[..., -1:], float("-inf"))
        sharp = max(1.0, math.log(n) / math.log(TRAINED)) if look.sharp == "log" else float(look.sharp)
        scores = scores * sharp if sharp != 1 else scores
        if look.steady:
            scores = scores + (weight - scores.logsumexp(-1, keepdim=True))
        return scores - look.bias * max(0.0, math.log(n / TRAINED)) if look.bias else scores

    # -- choosing -----------------------------------------------------------------------------------------------------

    def _choice(self, look: Look, ids: Tensor, memory: Memory, asked: int, fact: slice | None) -> list[Tensor] | None:
        """Per layer (Hkv or 1, m) the far tokens that there are, in their order, counted from the first; None: all."""
        n = memory.keys[0].shape[1] - self.window - self.sinks
        count = min(look.slots, n)
        if look.choice == "all" or count == n:
            return None
        if look.choice == "found":
            ratings: list[Tensor | None] = [self._looked_at(look, ids, memory, asked)[None]] * len(memory.keys)
        else:
            ratings = self.ratings(look, memory)
        found = []
        for rating in ratings:
            if rating is None:
                found.append(torch.empty(1, 0, dtype=torch.long, device=self.device))
            elif look.choice in ("score", "oracle"):
                if look.choice == "oracle" and fact is not None:
                    rating = rating.clone()
                    rating[:, fact.start - self.sinks : fact.stop - self.sinks] = float("inf")
                found.append(rating.topk(count, dim=1).indices.sort(dim=1).values)
            else:
                best = blocks_of(rating, look.choice).topk(max(1, count // BLOCK), dim=1).indices.sort(dim=1).values
                at = (best[..., None] * BLOCK + torch.arange(BLOCK, device=self.device)).flatten(1)
                filling = torch.arange(n // BLOCK * BLOCK, n, device=self.device)
                found.append(torch.cat([at, filling.expand(len(at), -1)], dim=1))
        return found

    def ratings(self, look: Look, memory: Memory) -> list[Tensor | None]:
        """Per layer (Hkv or 1, n) by what a look chooses that does not ask the question; None: it sees none."""
        far = slice(self.sinks, memory.scores[0].shape[1] - self.window)
        layers = range(len(memory.scores))
        scores = [x[:, far] for x in memory.scores]
        if look.choice in ("score", "oracle"):
            return list(scores)
        if look.choice == "learned":
            shared = memory.learned[look.layer][:, far].sigmoid()
            return [shared if number >= look.layer else None for number in layers]
        if look.choice == "head blocks":
            return [x.sigmoid() for x in scores]
        if look.choice == "layer blocks":
            return [x.sigmoid().sum(0, keepdim=True) for x in scores]
        found: list[Tensor | None] = []
        for number in layers:
            last = number if look.choice == "blocks so far" else look.layer or len(layers)
            chances = [scores[layer][head].sigmoid() for layer, head in self.order[: look.finders] if layer <= last]
            found.append(sum(chances)[None] if chances and number >= look.layer else None)
        return found

    def _looked_at(self, look: Look, ids: Tensor, memory: Memory, asked: int) -> Tensor:
        """(n,) how much the tokens that ask look at each far token, in the heads that find."""
        start = memory.keys[0].shape[1]
        far = dataclasses.replace(look, choice="all", heads=look.finders, slots=0, top=0)
        places = torch.arange(start + 1, asked + 1)
        x = self.decoder.embed_tokens(ids[start:asked].to(self.device))
        ratings = x.new_zeros(start - self.window - self.sinks, dtype=torch.float32)
        for number, layer in enumerate(
            self.decoder.layers[: 1 + max(layer for layer, _ in self.order[: look.finders])]
        ):
            q, k, v = self._project(layer, layer.input_layernorm(x))
            keys, values = torch.cat([memory.keys[number], k], dim=1), torch.cat([memory.values[number], v], dim=1)
            out, shares, _ = self._attend(number, far, q, keys, values, None, places - start)
            if shares is not None:
                ratings += shares.sum((0, 1))
            x = self._after(layer, x, out)
        return F.avg_pool1d(ratings[None], 2 * POOLED + 1, 1, POOLED, count_include_pad=False)[0]
