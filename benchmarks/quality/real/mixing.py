"""Attention that sees sinks and window exactly, and in one of several ways tokens that left the window.

Such tokens together get the share of the attention that the base's own softmax gives them: out = (1 - share) near +
share read. So ways differ only in what is read. Plain torch in float32, for Llama's layers (separate projections, one
table of RoPE, one kind of attention); scores of a few hundred queries exist at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from ahn import ops
from ahn.memory.base import l2_norm, rms_norm

CHUNK = 512
"""Queries whose scores exist at once."""
RIDGE = 1e-4
"""Of a state in hindsight, as a share of the mean square of its queries."""


@dataclasses.dataclass(frozen=True)
class Way:
    """What becomes of tokens that left the window.

    Attributes:
        tokens: those that are read: "none", "all", "fact" or "passage".
        store: "softmax", "lossless", "delta" or "hindsight".
        turned: keys and queries of the read are those after RoPE.
        norm: of a lossless read: "scaled", or "normalised" by the sum of its weights.
        every: a state in hindsight is fitted anew for so many queries; 0: one for all.
        predicted: numbers found, prose and code won back, in %.
    """

    tokens: str
    store: str = "softmax"
    turned: bool = True
    norm: str = ""
    every: int = 0
    predicted: tuple[int | None, int | None, int | None] = (None, None, None)

    @property
    def scaled(self) -> bool:
        return self.norm == "scaled" or self.store == "delta"


class Mixer:
    """The attention of one forward over texts of unequal length, padded at their end.

    Args:
        lengths: (B,) tokens of each text.
        places: (B, n) the tokens that are read, -1 where there are fewer; None for all.
        scales: of each layer (Hq,), for ways that are scaled.
        sums: if given, such a way reads by softmax, and of each layer (2, Hq) what scales follow from is added here.
    """

    def __init__(
        self,
        way: Way,
        window: int,
        sinks: int,
        lengths: Tensor,
        places: Tensor | None,
        scales: Sequence[Tensor] = (),
        sums: list[Tensor] | None = None,
    ) -> None:
        self.way, self.window, self.sinks, self.lengths = way, window, sinks, lengths
        self.places, self.scales, self.sums = places, scales, sums

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, turned: tuple[Tensor, Tensor]) -> Tensor:
        """Attention (B, Hq, N, P) in float32.

        Args:
            q, k, v: (B, H, N, P) in float32, before RoPE.
            turned: q and k after RoPE.
        """
        way = self.way
        near, near_mass = self.attended(*turned, v, near=True)
        if way.tokens == "none":
            return near
        read, far_mass = self.attended(*turned, v, near=False)
        share = (far_mass - near_mass).sigmoid().unsqueeze(-1)
        a, b = turned if way.turned else (q, k)
        if way.store == "softmax" and not way.turned:
            read, _ = self.attended(a, b, v, near=False)
        elif way.store == "hindsight":
            read = self.hindsight(a, read, share)
        elif way.store != "softmax":
            linear = self.delta(a, b, v) if way.store == "delta" else self.lossless(a, b, v)
            if way.scaled and self.sums is not None:
                weight = (share * self.real(share)).square()
                sums = [(weight * linear * x).sum((0, 2, 3)) for x in (read, linear)]
                self.sums.append(torch.stack(sums))
            else:
                read = linear * self.scales[layer][:, None, None] if way.scaled else linear
        return near + share * (read - near)

    def real(self, x: Tensor) -> Tensor:
        """(B, 1, N, 1) 1 for a text's own tokens, 0 behind its end."""
        return (torch.arange(x.shape[2], device=x.device) < self.lengths[:, None])[:, None, :, None].float()

    def attended(self, q: Tensor, k: Tensor, v: Tensor, near: bool) -> tuple[Tensor, Tensor]:
        """Attention (B, Hq, N, P) to sinks and window, or to what is read of the others, and log-sum-exp (B, Hq, N)."""
        N, reads, masses = q.shape[2], [], []
        if not near and self.places is not None:
            k, v = self.picked(k), self.picked(v)
        for start in range(0, N, CHUNK):
            stop = min(start + CHUNK, N)
            t = torch.arange(start, stop, device=q.device)[:, None]
            if near:
                first = max(self.sinks, start - self.window + 1)
                every = torch.arange(stop, device=q.device)
                at = torch.cat([every[: self.sinks], every[first:]])
                seen, columns = (at <= t) & ((at < self.sinks) | (at > t - self.window)), at
            elif self.places is None:
                columns = torch.arange(self.sinks, max(self.sinks, stop - self.window), device=q.device)
                seen = columns <= t - self.window
            else:
                columns = torch.arange(self.places.shape[1], device=q.device)
                at = self.places[:, None, None, None]
                seen = (at >= self.sinks) & (at <= t - self.window)
            read, mass = softmax_read(q[:, :, start:stop], k[:, :, columns], v[:, :, columns], seen)
            reads.append(read)
            masses.append(mass)
        return torch.cat(reads, dim=2), torch.cat(masses, dim=2)

    def picked(self, x: Tensor) -> Tensor:
        """(B, H, n, P) of x (B, H, N, P) at `places`; what there is instead of no token is never seen."""
        assert self.places is not None
        return x.gather(2, self.places.clamp_min(0)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))

    def lossless(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """S q (B, Hq, N, P), or that by the sum of the weights of values in it."""
        S, z = self.lossless_state(k, v)
        queries = q.unflatten(1, (k.shape[1], -1))
        read = (queries @ S[:, :, None]).flatten(1, 2)
        if self.way.norm == "normalised":
            total = (queries @ z[:, :, None, :, None]).flatten(1, 2)
            read = read / torch.where(total.abs() < 1e-6, 1e-6, total)
        # No mix of values is longer than the longest of them. This only helps: without it few reads decide the scales.
        longest = self.picked(v).norm(dim=-1).amax(-1).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        return read * (longest[..., None, None] / read.norm(dim=-1, keepdim=True).clamp_min(1e-9)).clamp_max(1)

    def lossless_state(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """S (B, Hkv, P, P) with kᵀ S = vᵀ for each token at `places`, and z (B, Hkv, P) with kᵀ z = 1."""
        assert self.places is not None
        here = (self.places >= self.sinks)[:, None, :, None].double()
        keys, values = self.picked(k).double() * here, self.picked(v).double() * here
        gram = keys @ keys.mT
        # Equal tokens have equal keys and values in the first layer; the trace keeps that solvable.
        small = 1e-9 * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp_min(1e-9)
        inverse = torch.linalg.solve(gram + small * torch.eye(gram.shape[-1], device=k.device), keys)
        return (inverse.mT @ values).float(), (inverse * here).sum(2).float()

    def delta(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What DeltaNet reads (B, Hq, N, P): token t - window is written before query t reads."""
        B, H, N, P = k.shape
        written = torch.zeros(B, N, device=k.device)
        if self.places is None:
            written[:, self.sinks :] = 1
        else:
            written.scatter_reduce_(1, self.places.clamp_min(0), (self.places >= self.sinks).float(), "amax")
        late = [F.pad(x, (0, 0, self.window, 0))[:, :, :N] for x in (l2_norm(k), v)]
        beta = F.pad(written, (self.window, 0))[:, None, :N].expand(-1, H, -1)
        state = torch.zeros(B, H, P, P, device=k.device)
        read, _ = ops.delta_rule(l2_norm(q) * P**-0.5, late[0], late[1], beta, None, state)
        return rms_norm(read, torch.ones(P, device=k.device))

    def hindsight(self, q: Tensor, read: Tensor, share: Tensor) -> Tensor:
        """S q (B, Hq, N, P) with the S that comes nearest to the softmax read where that has weight."""
        N, every = q.shape[2], self.way.every or q.shape[2]
        parts = (F.pad(x, (0, 0, 0, -N % every)).unflatten(2, (-1, every)) for x in (q, read, share * self.real(q)))
        x, y, weight = parts
        x, y = x * weight, y * weight
        squares = (x.mT @ x).double()
        small = RIDGE * squares.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] + 1e-9
        S = torch.linalg.solve(squares + small * torch.eye(q.shape[3], device=q.device), (x.mT @ y).double())
        found = F.pad(q, (0, 0, 0, -N % every)).unflatten(2, (-1, every)) @ S.float()
        return found.flatten(2, 3)[:, :, :N]


def softmax_read(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of q (B, Hq, n, P) to k, v (B, Hkv, m, P): reads, 0 where nothing is seen, and log-sum-exp (B, Hq, n).

    Args:
        seen: (n, m), or (B, 1, 1, n, m).
    """
    B, Hq, n, P = q.shape
    if not k.shape[2]:
        return torch.zeros_like(q), q.new_full((B, Hq, n), float("-inf"))
    rows = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3) * P**-0.5
    scores = (rows @ k.mT).unflatten(2, (-1, n)).masked_fill_(~seen, float("-inf"))
    mass = scores.logsumexp(-1, keepdim=True)
    weights = scores.sub_(mass.clamp_min(-1e30)).exp_()
    return (weights.flatten(2, 3) @ v).unflatten(2, (-1, n)).flatten(1, 2), mass.squeeze(-1).flatten(1, 2)


@torch.no_grad()
def read(model: PreTrainedModel, ids: Tensor, mixer: Mixer, until: int | None = None) -> Tensor:
    """Hidden states (B, N, D) after the last norm, or what the attention of layer `until` gets, of ids (B, N)."""
    decoder = model.get_decoder()
    x = decoder.embed_tokens(ids)
    rope = decoder.rotary_emb(x.float(), torch.arange(ids.shape[1], device=ids.device)[None])
    for number, layer in enumerate(decoder.layers):
        inputs, own = layer.input_layernorm(x), layer.self_attn
        if number == until:
            return inputs
        parts = (part(inputs).unflatten(-1, (-1, own.head_dim)) for part in (own.q_proj, own.k_proj, own.v_proj))
        q, k, v = (part.transpose(1, 2).float() for part in parts)
        out = mixer(number, q, k, v, apply_rotary_pos_emb(q, k, *rope))
        x = x + own.o_proj(out.transpose(1, 2).flatten(2).to(x.dtype))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return decoder.norm(x)
