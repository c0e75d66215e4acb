"""The specification in float64, one token at a time, without any code of the package: what the tests compare with.

Everything is a plain function of plain tensors, so that gradients can be taken and finite differences formed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Mapping[str, Tensor]


# -- memories (docs/spec.md, section 3): one state per head, written with one token's gates, read with another's -------


def _unit(x: Tensor) -> Tensor:
    return x / torch.sqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _heads(o: Tensor, weight: Tensor) -> Tensor:
    return torch.stack([o[:, h] @ weight[h] for h in range(weight.shape[0])], dim=1)


def delta_write(w: Weights, S: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    """S (B, H, P, P) after one token: k, v (B, H, P), its attention input x (B, D). With `a_proj`: GatedDeltaNet."""
    k = _unit(k)
    beta = torch.sigmoid(x @ w["b_proj.weight"].T)
    if "a_proj.weight" in w:
        decay = -torch.exp(w["A_log"]) * F.softplus(x @ w["a_proj.weight"].T + w["dt_bias"])
        S = torch.exp(decay)[..., None, None] * S
    u = beta[..., None] * (v - (S.mT @ k[..., None])[..., 0])
    return S + k[..., :, None] * u[..., None, :]


def delta_read(w: Weights, S: Tensor, q: Tensor, x: Tensor) -> Tensor:
    """(B, H, P) that a query q (B, H, P) with attention input x (B, D) adds to its attention."""
    o = (S.mT @ (_unit(q) / math.sqrt(q.shape[-1]))[..., None])[..., 0]
    gamma = (x @ w["g_proj.weight"].T)[..., None]
    return _heads(_rms(o, w["o_norm.weight"], 1e-5) * gamma * torch.sigmoid(gamma), w["o_proj.weight"])


def _shares(x: Tensor, route: Tensor) -> Tensor:
    """softmax(16 x̂ A): x (B, H, P), one matrix A (P, R) a head, to (B, H, R)."""
    return torch.softmax(torch.stack([16 * _unit(x[:, h]) @ route[h] for h in range(len(route))], 1), -1)


def routed_write(w: Weights, S: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    """S (B, Hkv, R, P, P), of keys and values that are not repeated; one zero matrix a head to begin with."""
    k = k + _heads(k, w["k_map.weight"])
    share, states = _shares(k, w["k_route"]), S.unbind(2) if S.dim() == 5 else [S] * w["k_route"].shape[-1]
    beta = torch.sigmoid(x @ w["b_proj.weight"].T)[..., None] * share
    k, after = _unit(k), []
    for r, state in enumerate(states):
        u = beta[..., r, None] * (v - (state.mT @ k[..., None])[..., 0])
        after.append(state + k[..., :, None] * u[..., None, :])
    return torch.stack(after, 2)


def routed_read(w: Weights, S: Tensor, q: Tensor, x: Tensor) -> Tensor:
    q = q + _heads(q, w["q_map.weight"])
    S = S.repeat_interleave(q.shape[1] // S.shape[1], 1)
    together = (S * _shares(q, w["q_route"])[..., None, None]).sum(2)
    return delta_read(w, together, q, x)


def mamba_write(w: Weights, S: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    """As `delta_write`. The state is (P_key, P_value), the transpose of the specification's."""
    step = F.softplus(x @ w["dt_proj.weight"].T + w["dt_proj.bias"] + w["dt_bias"])
    decay = torch.exp(-torch.exp(w["A_log"]) * step)
    return decay[..., None, None] * S + F.normalize(k, dim=-1)[..., :, None] * (step[..., None] * v)[..., None, :]


def mamba_read(w: Weights, S: Tensor, q: Tensor, x: Tensor) -> Tensor:
    o = (S.mT @ F.normalize(q, dim=-1)[..., None])[..., 0]
    gated = o * F.silu(x @ w["g_proj.weight"].T + w["g_proj.bias"])[..., None]
    return _heads(_rms(gated.flatten(1), w["norm.weight"], 1e-5).view_as(o), w["o_proj.weight"])


MEMORIES = {
    "GatedDeltaNet": (delta_write, delta_read),
    "DeltaNet": (delta_write, delta_read),
    "Mamba2": (mamba_write, mamba_read),
    "RoutedDeltaNet": (routed_write, routed_read),
}


# -- a Qwen2 or Qwen3 decoder whose every attention layer has a memory -------------------------------------------------


def _project(x: Tensor, w: Weights, name: str, heads: int) -> Tensor:
    """(B, L, D) to (B, heads, L, P)."""
    y = x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros((), dtype=x.dtype))
    return y.unflatten(-1, (heads, -1)).transpose(1, 2)


def _rotate(x: Tensor, theta: float, nearest: int = 0) -> Tensor:
    """Rotary embedding of x (B, H, L, P): pairs (i, i + P/2). What stands before `nearest` is moved there."""
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, dtype=x.dtype) / half)
    angle = torch.arange(x.shape[2], dtype=x.dtype).clamp_min(nearest)[:, None] * frequency
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)


def _attend(q: Tensor, k: Tensor, v: Tensor, positions: list[int]) -> Tensor:
    """One query q (B, H, P) over the keys at `positions`."""
    scores = (k[:, :, positions] @ q[..., None])[..., 0] / math.sqrt(q.shape[-1])
    return (torch.softmax(scores, -1)[..., None, :] @ v[:, :, positions])[..., 0, :]


# -- retained tokens: per key head the tokens with the highest scores, seen beside sinks and window --------------------


def scores(w: Weights, x: Tensor, together: bool = False) -> Tensor:
    """x (B, L, D) to (B, Hkv, L), rounded to bfloat16; `together`: heads have the mean of their logits' sigmoids.

    (B, 1, L) where one layer scores for all heads of all layers.
    """
    hidden = F.silu(x @ w["scorer.inner.weight"].T + w["scorer.inner.bias"])
    logits = x @ w["scorer.direct.weight"].T + hidden @ w["scorer.outer.weight"].T + w["scorer.outer.bias"]
    if together:
        logits = torch.sigmoid(logits).mean(-1, keepdim=True).expand_as(logits)
    return logits.transpose(1, 2).bfloat16().to(x.dtype)


def retained(score: list[float], left: list[int], slots: int, passage: int = 1) -> list[int]:
    """Which of the tokens at positions `left`, in the order in which they left the window, one head still sees.

    What left up to the last full block is sorted as a whole, once: the package goes from block to block. The tokens of
    a passage have their mean score, rounded to bfloat16.
    """
    block = min(128, max(1, slots // 8))
    full = len(left) - len(left) % block
    score = list(score)
    for start in range(0, full, passage):
        places = left[start : start + passage]
        mean = torch.tensor([score[place] for place in places]).mean().bfloat16().item()
        for place in places:
            score[place] = mean
    best = sorted(left[:full], key=lambda position: (-score[position], position))
    return sorted(best[: slots - block]) + left[full:]


def anchor(t: int, reach: int) -> int:
    """Where a query at position t sees what is too far away: it moves on by a power of two when it is `reach` back."""
    step, place = 1, 0
    while 2 * step <= reach // 4:
        step *= 2
    while reach and t - place >= reach:
        place += step
    return place


def _attend_retained(
    q: Tensor,
    k: Tensor,
    moved: Tensor,
    v: Tensor,
    score: Tensor,
    exact: list[int],
    left: list[int],
    case: Mapping[str, Any],
) -> Tensor:
    """One query q (B, H, P) over exact tokens, with keys k, and retained ones, with keys `moved`; (B, H, L, P)."""
    length, k, v = k.shape[2], torch.cat([k, moved], 2), torch.cat([v, v], 2)
    out = torch.empty_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            stay = retained(score[b, h].tolist(), left, case["slots"], case.get("passage", 1))
            seen = exact + [length + position for position in stay]
            out[b, h] = _attend(q[b, h][None, None], k[b, h][None, None], v[b, h][None, None], seen)[0, 0]
    return out


def _part(w: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): x for name, x in w.items() if name.startswith(prefix)}


def _mixer(
    case: Mapping[str, Any],
    w: Weights,
    x: Tensor,
    window: int,
    sinks: int,
    states_at: list[int],
    score: Tensor | None = None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Attention plus memory of one layer with input x (B, L, D): output (B, L, D), keys, states after `states_at`.

    Retained tokens are kept by `score` (B, Hkv or 1, L); none where it is None.
    """
    attention, memory, router = _part(w, "self_attn."), _part(w, "ahn.fn."), _part(w, "ahn_router.")
    heads, kv_heads = case["num_attention_heads"], case["num_key_value_heads"]
    q = own_q = _project(x, attention, "q_proj", heads)
    keys = _project(x, attention, "k_proj", kv_heads)
    if "q_norm.weight" in attention:
        q = _rms(q, attention["q_norm.weight"], case["rms_norm_eps"])
        keys = _rms(keys, attention["k_norm.weight"], case["rms_norm_eps"])
    raw_keys = keys
    q, keys = _rotate(q, case["rope_theta"]), _rotate(keys, case["rope_theta"])
    memory_q = q
    if "q_proj.weight" in memory:  # of the base's q before its norm and RoPE
        memory_q = _rotate(torch.einsum("bhlp,hpr->bhlr", own_q, memory["q_proj.weight"]), case["rope_theta"])
    k = keys.repeat_interleave(heads // kv_heads, 1)
    values = _project(x, attention, "v_proj", kv_heads)
    v = values.repeat_interleave(heads // kv_heads, 1)
    score = None if score is None else score.expand(-1, kv_heads, -1).repeat_interleave(heads // kv_heads, 1)
    write, read = MEMORIES.get(case["ahn"], (None, None))
    written_k, written_v = (keys, values) if write is routed_write else (k, v)
    B, _, L, P = q.shape
    S, outputs, states = torch.zeros(B, written_k.shape[1], P, P, dtype=x.dtype), [], {}
    for t in range(L):
        seen = sorted(set(range(min(sinks, t + 1))) | set(range(max(0, t - window + 1), t + 1)))
        leaves = t - window
        if score is not None:
            left = list(range(sinks, leaves + 1))
            moved = _rotate(raw_keys, case["rope_theta"], anchor(t, case.get("near", 0)))
            moved = moved.repeat_interleave(heads // kv_heads, 1)
            y = _attend_retained(q[:, :, t], k, moved, v, score, seen, left, case)
        else:
            y = _attend(q[:, :, t], k, v, seen)
        if write is not None and read is not None and leaves >= sinks:
            S = write(memory, S, written_k[:, :, leaves], written_v[:, :, leaves], x[:, leaves])
            r = read(memory, S, memory_q[:, :, t], x[:, t])
            if router:
                written = leaves - sinks + 1
                r = r * torch.sigmoid(router["alpha"] * math.log(written / window) + router["beta"])[:, None]
            y = y + r
        outputs.append(y.flatten(1))
        states[t + 1] = S
    out = torch.stack(outputs, 1) @ attention["o_proj.weight"].T
    return out, keys, [states[t] for t in states_at]


def decoder(
    case: Mapping[str, Any], w: Weights, ids: Tensor, window: int, sinks: int, states_at: tuple[int, ...] = ()
) -> tuple[Tensor, list[Tensor], list[list[Tensor]]]:
    """Logits (B, L, V), each layer's keys (B, Hkv, L, P) after RoPE, each layer's states after so many tokens.

    Args:
        case: sizes, as in `case.json`.
        w: base and AHN weights in float64, in transformers' and published names.
        ids: (B, L) token ids.
        window, sinks: W and S; a window of L or more is full attention.
    """
    *found, own = _read(case, w, ids, window, sinks, states_at, None)
    while case.get("score_layer") is not None:
        # What a token sees hangs on scores of tokens that left before: each reading has them right for W tokens more.
        before, (*found, own) = own, _read(case, w, ids, window, sinks, states_at, own)
        if torch.equal(own, before):
            break
    logits, keys, states = found
    return logits, keys, states


def _read(
    case: Mapping[str, Any],
    w: Weights,
    ids: Tensor,
    window: int,
    sinks: int,
    states_at: tuple[int, ...],
    given: Tensor | None,
) -> tuple[Tensor, list[Tensor], list[list[Tensor]], Tensor | None]:
    """`decoder` where the scores of one layer are `given` to all, and what that layer's scores are then."""
    eps = case["rms_norm_eps"]
    hidden = w["model.embed_tokens.weight"][ids]
    all_keys, all_states = [], []
    own, first = None, case.get("score_layer")
    for i in range(case["num_hidden_layers"]):
        layer = _part(w, f"model.layers.{i}.")
        x = _rms(hidden, layer["input_layernorm.weight"], eps)
        if case["ahn"] == "RetainedTokens" and first in (None, i):
            own = scores(_part(layer, "ahn.fn."), x, case.get("passage", 1) > 1)
        y, keys, states = _mixer(case, layer, x, window, sinks, list(states_at), own if first is None else given)
        hidden = hidden + y
        x = _rms(hidden, layer["post_attention_layernorm.weight"], eps)
        gated = F.silu(x @ layer["mlp.gate_proj.weight"].T) * (x @ layer["mlp.up_proj.weight"].T)
        hidden = hidden + gated @ layer["mlp.down_proj.weight"].T
        all_keys.append(keys)
        all_states.append(states)
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return _rms(hidden, w["model.norm.weight"], eps) @ head.T, all_keys, all_states, own
