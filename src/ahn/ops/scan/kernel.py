"""Write many tokens and read after each, in three Triton kernels with fixed settings: nothing is tuned at first use.

Tokens go in chunks of C = 64 (the WY form of arXiv 2406.06484, section 3, with decay as in 2412.06464; see
`ahn.ops.scan.chunked`): what a chunk writes as a function of the state before it, for all chunks at once; the states,
one chunk after the other; the reads, for all chunks at once, through norm, gate and projection where one head suffices.
Keys and values are taken as the model has them: not repeated for query heads, not normalised. Gradients are in
`ahn.ops.scan.gradients`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ahn.ops.rule import StepRead, StepRule

CHUNK = 64
# Of a state or its gradient, for one program. With 16, Triton 3.6 made a kernel for H100s that ended in illegal
# accesses (P = 64) or had wrong results (P = 16), while its interpreter finds nothing; the same script ran clean with
# 32. ptxas before 13.1 is known to make such code of products on Hopper (flash-linear-attention PR 1262 and
# triton-lang/triton issue 11366). `test_many_heads_on_a_gpu` is there to find it.
STATE_COLUMNS = 32
# A single chunk is no constant of the kernels that go through chunks: without its loop, ptxas 12.8 addresses a factor
# of the second product by a register that it never set, and the state is wrong.
LOOPS = {"do_not_specialize": ("chunks",)}
STATES = {"num_warps": 4, "num_stages": 2}
# A program waits for one product after the other: with 168 registers per thread, three of them share a multiprocessor.
SOLVE = READS = {"num_warps": 4} | ({"maxnreg": 168} if torch.version.cuda else {})
READS_OF_SEVERAL = {"num_warps": 8}  # Of several states; four warps of a head of 128 spill registers.


@dataclasses.dataclass
class Written:
    """What writing leaves behind, all but the last state in the keys' type.

    Attributes:
        written: (B, S, N · C, P) what each token adds to each of S states, N chunks of C tokens.
        states: (B, S, N, P, P) before each chunk.
        state: (B, S, P, P) float32 after the last one.
        from_k: (B, S, N · C, P), inverse: (B, S, N · C, C); kept for gradients of a delta rule only.
    """

    written: Tensor
    states: Tensor
    state: Tensor
    from_k: Tensor | None
    inverse: Tensor | None


@triton.jit
def unit_rows(x, eps):
    x = x.to(tl.float32)
    return x * tl.rsqrt(tl.sum(x * x, 1) + eps)[:, None]


@triton.jit
def shared_out(x, share, row, t, r, tokens, STATES: tl.constexpr):
    """What the state r of a head's gets of x (C, width), tokens t of the query head `row` of the batch."""
    if STATES > 1:
        part = tl.load(share + (row * tokens + t) * STATES + r, mask=t < tokens, other=0.0)
        x = (x.to(tl.float32) * part[:, None]).to(x.dtype)
    return x


@triton.jit
def _solve(
    key, value, write, decay, from_k, from_v, faded, fading, inverse, tokens,
    kb, kh, kt, vb, vh, vt, l2_eps,
    HEADS: tl.constexpr, READERS: tl.constexpr, STATES: tl.constexpr, GROUPS: tl.constexpr, VALUE_GROUPS: tl.constexpr,
    P: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`from_v - from_k S` is what a chunk adds to the state S, for all of a chunk's keys: the inverse of I + A.

    What `_states` would otherwise work out between two chunks is prepared here, where no chunk waits for another:
    `faded`, the keys as the chunk's last token finds them, and `fading`, what is left of the state then.
    """
    row = tl.program_id(1).to(tl.int64)
    b, h = row // HEADS, row % HEADS
    i, p = tl.arange(0, C), tl.arange(0, P)
    t = tl.program_id(0) * C + i
    real = t < tokens
    keys = key + b * kb + h // GROUPS * kh + t[:, None] * kt + p[None, :]
    to = row * tl.num_programs(0) * C * P + t[:, None] * P + p[None, :]
    dtype = key.dtype.element_ty
    beta = tl.load(write + row * tokens + t, mask=real, other=0.0)
    k = unit_rows(tl.load(keys, mask=real[:, None], other=0.0), l2_eps)
    below = i[:, None] > i[None, :]
    A = tl.dot((k * beta[:, None]).to(dtype), tl.trans(k).to(dtype), input_precision=PRECISION)
    entering = beta
    if DECAY:
        g = tl.load(decay + row * tokens + t, mask=real, other=0.0)
        G, total = tl.cumsum(g, 0), tl.sum(g, 0)
        A *= tl.exp(tl.where(below, G[:, None] - G[None, :], 0.0))
        k *= tl.exp(total - G)[:, None]
        entering *= tl.exp(G)
        tl.store(fading + row * tl.num_programs(0) + tl.program_id(0), tl.exp(total))
    tl.store(faded + to, k)
    # Neighbouring diagonal blocks of the inverse join to [[T1, 0], [-T2 A21 T1, T2]]: forward substitution in blocks.
    # With unit keys and gates up to 1, no entry of T or of T2 A21 exceeds 1 (contractions stand between two tokens);
    # there float16 has the precision of tf32, at twice its speed.
    exact = tl.float32 if dtype == tl.float32 else tl.float16
    # From `size` to below 2 · size where one of two neighbouring blocks meets the other.
    apart = i[:, None] ^ i[None, :]
    A = tl.where(below, A, 0.0)
    T = tl.where(apart == 0, 1.0, tl.where(apart == 1, -A, 0.0))
    size = 2
    while size < C:
        before = T.to(exact)
        corner = tl.where((apart >= size) & (apart < 2 * size), A, 0.0).to(exact)
        through = tl.dot(before, corner, input_precision=PRECISION)
        T -= tl.dot(through.to(exact), before, input_precision=PRECISION)
        size *= 2
    M = T.to(dtype)
    if KEEP:
        tl.store(inverse + (row * tl.num_programs(0) * C + t)[:, None] * C + i[None, :], M)
    values = value + b * vb + h // VALUE_GROUPS * vh + t[:, None] * vt + p[None, :]
    v = tl.load(values, mask=real[:, None], other=0.0)
    tl.store(from_v + to, tl.dot(M, (v.to(tl.float32) * beta[:, None]).to(dtype), input_precision=PRECISION))
    # Loaded again: held all the while, keys would leave registers for one program per multiprocessor.
    k = unit_rows(tl.load(keys, mask=real[:, None], other=0.0), l2_eps)
    tl.store(from_k + to, tl.dot(M, (k * entering[:, None]).to(dtype), input_precision=PRECISION))


@triton.jit(**LOOPS)
def _states(
    key, value, write, decay, from_k, from_v, faded, fading, state, states, tokens, chunks,
    kb, kh, kt, vb, vh, vt, l2_eps,
    HEADS: tl.constexpr, READERS: tl.constexpr, STATES: tl.constexpr, GROUPS: tl.constexpr, VALUE_GROUPS: tl.constexpr,
    P: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr, DELTA: tl.constexpr, DECAY: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The state before each chunk, and what each chunk writes (into `from_v`); some columns of one head's state."""
    row = tl.program_id(1).to(tl.int64)
    b, h = row // HEADS, row % HEADS
    i, p, c = tl.arange(0, C), tl.arange(0, P), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    tile = p[:, None] * P + c[None, :]
    key += b * kb + h // GROUPS * kh
    value += b * vb + h // VALUE_GROUPS * vh
    S = tl.load(state + row * P * P + tile)
    dtype = key.dtype.element_ty
    for chunk in range(chunks):
        at = row * chunks + chunk
        tl.store(states + at * P * P + tile, S.to(dtype))
        new = (at * C + i)[:, None] * P + c[None, :]
        whole = (at * C + i)[:, None] * P + p[None, :]
        if DELTA:
            k = tl.load(faded + whole)
            w = tl.load(from_k + whole)
            u = tl.load(from_v + new).to(tl.float32) - tl.dot(w, S.to(dtype), input_precision=PRECISION)
            if DECAY:
                S *= tl.load(fading + at)
        else:
            t = chunk * C + i
            real = t < tokens
            k = unit_rows(tl.load(key + t[:, None] * kt + p[None, :], mask=real[:, None], other=0.0), l2_eps)
            v = tl.load(value + t[:, None] * vt + c[None, :], mask=real[:, None], other=0.0).to(tl.float32)
            u = v * tl.load(write + row * tokens + t, mask=real, other=0.0)[:, None]
            if DECAY:
                g = tl.load(decay + row * tokens + t, mask=real, other=0.0)
                total = tl.sum(g, 0)
                k *= tl.exp(total - tl.cumsum(g, 0))[:, None]
                S *= tl.exp(total)
            k = k.to(dtype)
        tl.store(from_v + new, u)
        S = tl.dot(tl.trans(k), u.to(dtype), S, input_precision=PRECISION)
    tl.store(state + row * P * P + tile, S)


@triton.jit
def _reads(
    query, key, decay, written, states, share, gamma, weight, norm, o_proj, out, tokens,
    qb, qh, qt, kb, kh, kt, l2_eps, scale, norm_eps,
    HEADS: tl.constexpr, READERS: tl.constexpr, STATES: tl.constexpr, GROUPS: tl.constexpr, VALUE_GROUPS: tl.constexpr,
    P: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr, FINISH: tl.constexpr, ROUTER: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Reads of one chunk and query head, (B, m, Hq, P); with FINISH through norm, gate, projection and router."""
    row = tl.program_id(1).to(tl.int64)
    b, h = row // READERS, row % READERS
    first = h // (READERS * STATES // HEADS) * STATES
    i, p = tl.arange(0, C), tl.arange(0, P)
    t = tl.program_id(0) * C + i
    real = t < tokens
    q = tl.load(query + b * qb + h * qh + t[:, None] * qt + p[None, :], mask=real[:, None], other=0.0)
    k = tl.load(key + b * kb + first // GROUPS * kh + t[:, None] * kt + p[None, :], mask=real[:, None], other=0.0)
    dtype = k.dtype
    q = (unit_rows(q, l2_eps) * scale).to(dtype)
    local = tl.dot(q, tl.trans(unit_rows(k, l2_eps).to(dtype)), input_precision=PRECISION)
    seen = i[:, None] >= i[None, :]
    o = tl.zeros([C, P], tl.float32)
    for r in tl.range(STATES, num_stages=1):
        at = (b * HEADS + first + r) * tl.num_programs(0) + tl.program_id(0)
        S = tl.load(states + at * P * P + p[:, None] * P + p[None, :])
        o = tl.dot(shared_out(q, share, row, t, r, tokens, STATES), S, o, input_precision=PRECISION)
        if DECAY:  # then there is one state per head
            G = tl.cumsum(tl.load(decay + row * tokens + t, mask=real, other=0.0), 0)
            local *= tl.exp(tl.where(seen, G[:, None] - G[None, :], 0.0))
            o *= tl.exp(G)[:, None]
        u = tl.load(written + (at * C + i)[:, None] * P + p[None, :])
        weights = shared_out(tl.where(seen, local, 0.0), share, row, t, r, tokens, STATES).to(dtype)
        o = tl.dot(weights, u, o, input_precision=PRECISION)
    if FINISH:
        gate = tl.load(gamma + row * tokens + t, mask=real, other=0.0)
        o *= (tl.rsqrt(tl.sum(o * o, 1) / P + norm_eps) * gate * tl.sigmoid(gate))[:, None]
        o *= tl.load(norm + p).to(tl.float32)[None, :]
        projection = tl.load(o_proj + h * P * P + p[:, None] * P + p[None, :])
        o = tl.dot(o.to(projection.dtype), projection, input_precision=PRECISION)
        if ROUTER:
            o *= tl.load(weight + row * tokens + t, mask=real, other=0.0)[:, None]
    to = ((b * tokens + t)[:, None] * READERS + h) * P + p[None, :]
    tl.store(out + to, o, mask=real[:, None])


def write_all(
    key: Tensor,
    value: Tensor,
    write: Tensor,
    decay: Tensor | None,
    state: Tensor,
    rule: StepRule,
    sizes: dict[str, Any],
    keep: bool = False,
) -> Written:
    """Write m tokens in order; arguments as in `scan`, gates contiguous. `keep` what only gradients need."""
    B, HEADS, tokens = write.shape
    P = key.shape[3]
    chunks = triton.cdiv(tokens, CHUNK)
    state = state.clone(memory_format=torch.contiguous_format)
    written = key.new_empty(B, HEADS, chunks * CHUNK, P)
    states = key.new_empty(B, HEADS, chunks, P, P)
    strides = *key.stride()[:3], *value.stride()[:3]
    from_k, faded, fading, inverse = None, None, None, None
    if rule.delta:
        from_k, faded = torch.empty_like(written), torch.empty_like(written)
        fading = state.new_empty(B, HEADS, chunks)
        inverse = written.new_empty(B, HEADS, chunks * CHUNK, CHUNK) if keep else None
        _solve[chunks, B * HEADS](
            key, value, write, decay, from_k, written, faded, fading, inverse, tokens, *strides, rule.l2_eps,
            KEEP=keep, **sizes, **SOLVE,
        )  # fmt: skip
    columns = min(STATE_COLUMNS, P)
    _states[P // columns, B * HEADS](
        key, value, write, decay, from_k, written, faded, fading, state, states, tokens, chunks, *strides, rule.l2_eps,
        COLUMNS=columns, DELTA=rule.delta, **sizes, **STATES,
    )  # fmt: skip
    return Written(written, states, state, from_k if keep else None, inverse)


def read_raw(
    query: Tensor,
    key: Tensor,
    decay: Tensor | None,
    share: Tensor | None,
    done: Written,
    rule: StepRule,
    sizes: dict[str, Any],
    read: StepRead | None = None,
) -> Tensor:
    """The reads of `scan`, (B, Hq, m, P)."""
    B, HEADS, tokens, P = query.shape
    chunks = triton.cdiv(tokens, CHUNK)
    finish = read is not None
    out = torch.empty(B, tokens, HEADS, P, dtype=query.dtype, device=query.device)
    gamma, weight = (None, None) if read is None else (read.gamma.contiguous(), read.weight)
    if weight is not None:
        weight = weight.expand(B, HEADS, tokens).contiguous()
    _reads[chunks, B * HEADS](
        query, key, decay, done.written, done.states, share, gamma, weight,
        None if read is None else read.norm, None if read is None else read.o_proj, out, tokens,
        *query.stride()[:3], *key.stride()[:3], rule.l2_eps, rule.scale, rule.norm_eps,
        FINISH=finish, ROUTER=weight is not None, **sizes, **(READS if share is None else READS_OF_SEVERAL),
    )  # fmt: skip
    return out.transpose(1, 2)


def kernel_sizes(
    query: Tensor, key: Tensor, value: Tensor, write: Tensor, decay: Tensor | None, share: Tensor | None
) -> dict[str, Any]:
    """What every kernel is compiled for. There are as many states (HEADS) as write gates; keys and values of fewer
    heads belong to as many of them as follow one another. Of the READERS, query heads, equally many in a row read
    STATES in a row."""
    HEADS, READERS, P = write.shape[1], query.shape[1], query.shape[3]
    return {
        "HEADS": HEADS, "READERS": READERS, "STATES": 1 if share is None else share.shape[3],
        "GROUPS": HEADS // key.shape[1], "VALUE_GROUPS": HEADS // value.shape[1], "P": P, "C": CHUNK,
        "DECAY": decay is not None, "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
    }  # fmt: skip


def scan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    write: Tensor,
    decay: Tensor | None,
    state: Tensor,
    rule: StepRule,
    read: StepRead | None,
    share: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Write m tokens in order; query i reads after token i was written.

    Args:
        query: (B, Hq, m, P) of the memory, after RoPE.
        key, value: (B, Hkv, m, P) of the same type as the query.
        write, decay: (B, Hq, m) float32 gates; with shares (B, Hkv · R, m), and no decay.
        state: (B, Hq, P, P) float32 before the first write; with shares (B, Hkv · R, P, P).
        share: (B, Hq, m, R) float32, what each query takes of the R states of its key head; None where each query head
            has a state of its own.
        read: with gamma (B, Hq, m) and weight (B or 1, Hq, m), where `rule.across_heads` is False: the read is finished
            here. Its `query` is not used.

    Returns:
        The finished or the raw read (B, Hq, m, P) in the query's type, laid out as (B, m, Hq, P), and the state after
        the last write.
    """
    write = write.contiguous()
    decay, share = (None if x is None else x.contiguous() for x in (decay, share))
    sizes = kernel_sizes(query, key, value, write, decay, share)
    done = write_all(key, value, write, decay, state, rule, sizes)
    return read_raw(query, key, decay, share, done, rule, sizes, read), done.state
