"""Kernels for gradients of `ahn.ops.scan.kernel`'s scan; `ahn.ops.scan.gradients` calls them, in this order.

Of one chunk, with L and A the products of queries and keys with earlier keys, weighed by the decay between them
(`ahn.ops.scan.chunked`), T = (I + A)⁻¹, and S the state before it:

    (I + A) u = r = β (v - exp(G) k S)      o = exp(G) q S + L u      S' = exp(Gₑ) S + (exp(Gₑ - G) k)ᵀ u

the gradients of states and writes go backwards through the chunks, one after the other,

    du = Lᵀ do + exp(Gₑ - G) k dS'          dS = exp(Gₑ) dS' + (exp(G) q)ᵀ do - (T β exp(G) k)ᵀ du

and everything else follows for all chunks at once from dr = Tᵀ du and dA = -dr uᵀ. Where several queries read a state,
do is that of each times its share, and products with it are sums over them.

No result of a product is transposed on its way into the next one: Triton 3.4 to 3.7.0 miscompile that on Hopper
(flash-linear-attention issues 640 and 984; its gated backward refuses to run there). What is needed both ways round is
multiplied twice, or goes through memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ahn.ops.scan.kernel import LOOPS, shared_out, unit_rows


@triton.jit
def _rows(base, real, t, stride, p):
    return tl.load(base + t[:, None] * stride + p[None, :], mask=real[:, None], other=0.0)


@triton.jit
def _through_norm(x, grad, eps, scale):
    """Gradient of x, of the same rows' gradient after `unit_rows(x) * scale`."""
    r = tl.rsqrt(tl.sum(x * x, 1) + eps)[:, None]
    unit = x * r
    return (grad - unit * tl.sum(unit * grad, 1)[:, None]) * (r * scale)


@triton.jit
def local_writes(
    query, key, decay, share, grad, grad_written, tokens,
    qb, qh, qt, kb, kh, kt, gb, gh, gt, l2_eps, scale,
    HEADS: tl.constexpr, READERS: tl.constexpr, STATES: tl.constexpr, GROUPS: tl.constexpr, VALUE_GROUPS: tl.constexpr,
    P: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Lᵀ do: what a chunk's own reads ask of its writes."""
    row = tl.program_id(1).to(tl.int64)
    b, h = row // HEADS, row % HEADS
    i, p = tl.arange(0, C), tl.arange(0, P)
    t = tl.program_id(0) * C + i
    real = t < tokens
    dtype = key.dtype.element_ty
    k = unit_rows(_rows(key + b * kb + h // GROUPS * kh, real, t, kt, p), l2_eps).to(dtype)
    later = i[:, None] <= i[None, :]
    asked = tl.zeros([C, P], tl.float32)
    readers: tl.constexpr = READERS * STATES // HEADS
    for g in tl.range(readers, num_stages=1):
        reader = h // STATES * readers + g
        q = unit_rows(_rows(query + b * qb + reader * qh, real, t, qt, p), l2_eps) * scale
        local = tl.dot(k, tl.trans(q.to(dtype)), input_precision=PRECISION)
        if DECAY:  # then each state has one reader
            G = tl.cumsum(tl.load(decay + row * tokens + t, mask=real, other=0.0), 0)
            local *= tl.exp(tl.where(later, G[None, :] - G[:, None], 0.0))
        local = tl.where(later, local, 0.0)
        do = _rows(grad + b * gb + reader * gh, real, t, gt, p).to(dtype)
        do = shared_out(do, share, b * READERS + reader, t, h % STATES, tokens, STATES)
        asked = tl.dot(local.to(dtype), do, asked, input_precision=PRECISION)
    to = (row * tl.num_programs(0) + tl.program_id(0)) * C
    tl.store(grad_written + (to + i)[:, None] * P + p[None, :], asked)


@triton.jit(**LOOPS)
def states_backward(
    query, key, decay, share, from_k, grad, grad_written, grad_states, grad_state, tokens, chunks,
    qb, qh, qt, kb, kh, kt, gb, gh, gt, l2_eps, scale,
    HEADS: tl.constexpr, READERS: tl.constexpr, STATES: tl.constexpr, GROUPS: tl.constexpr, VALUE_GROUPS: tl.constexpr,
    P: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr, DELTA: tl.constexpr, DECAY: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of the state after each chunk, and of what each chunk writes; some columns of one head's state."""
    row = tl.program_id(1).to(tl.int64)
    b, h = row // HEADS, row % HEADS
    i, p, c = tl.arange(0, C), tl.arange(0, P), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    tile = p[:, None] * P + c[None, :]
    readers: tl.constexpr = READERS * STATES // HEADS
    first = h // STATES * readers
    query += b * qb + first * qh
    key += b * kb + h // GROUPS * kh
    grad += b * gb + first * gh
    dtype = key.dtype.element_ty
    dS = tl.load(grad_state + row * P * P + tile)
    for n in range(chunks):
        chunk = chunks - 1 - n
        at = row * chunks + chunk
        tl.store(grad_states + at * P * P + tile, dS.to(dtype))
        t = chunk * C + i
        real = t < tokens
        k = unit_rows(_rows(key, real, t, kt, p), l2_eps)
        new = (at * C + i)[:, None] * P + c[None, :]
        before = dS.to(dtype)
        if DECAY:
            fading = tl.load(decay + row * tokens + t, mask=real, other=0.0)
            G, total = tl.cumsum(fading, 0), tl.sum(fading, 0)
            k *= tl.exp(total - G)[:, None]
            dS *= tl.exp(total)
        du = tl.load(grad_written + new).to(tl.float32) + tl.dot(k.to(dtype), before, input_precision=PRECISION)
        tl.store(grad_written + new, du)
        for g in range(readers):
            q = unit_rows(_rows(query + g * qh, real, t, qt, p), l2_eps) * scale
            do = _rows(grad + g * gh, real, t, gt, c).to(dtype)
            do = shared_out(do, share, b * READERS + first + g, t, h % STATES, tokens, STATES)
            if DECAY:
                q *= tl.exp(G)[:, None]
            dS += tl.dot(tl.trans(q.to(dtype)), do, input_precision=PRECISION)
        if DELTA:
            w = tl.load(from_k + (at * C + i)[:, None] * P + p[None, :])
            dS -= tl.dot(tl.trans(w), du.to(dtype), input_precision=PRECISION)
    tl.store(grad_state + row * P * P + tile, dS)


@triton.jit
def queries_backward(
    query, key, decay, share, inverse, written, states, grad, grad_written, grad_query, grad_share, from_reads, tokens,
    qb, qh, qt, kb, kh, kt, gb, gh, gt, tb, th, tt, l2_eps, scale,
    HEADS: tl.constexpr, READERS: tl.constexpr, STATES: tl.constexpr, GROUPS: tl.constexpr, VALUE_GROUPS: tl.constexpr,
    P: tl.constexpr, C: tl.constexpr, DELTA: tl.constexpr, DECAY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of one query head, the gradients of its shares, what reads of the state ask of G; dr in the place of du."""
    row = tl.program_id(1).to(tl.int64)
    b, h = row // READERS, row % READERS
    readers: tl.constexpr = READERS * STATES // HEADS
    first = h // readers * STATES
    i, p = tl.arange(0, C), tl.arange(0, P)
    t = tl.program_id(0) * C + i
    real = t < tokens
    dtype = key.dtype.element_ty
    do = _rows(grad + b * gb + h * gh, real, t, gt, p).to(dtype)
    seen = i[:, None] >= i[None, :]
    q = _rows(query + b * qb + h * qh, real, t, qt, p).to(tl.float32)
    k = unit_rows(_rows(key + b * kb + first // GROUPS * kh, real, t, kt, p), l2_eps).to(dtype)
    dq = tl.zeros([C, P], tl.float32)
    for r in tl.range(STATES, num_stages=1):
        at = (b * HEADS + first + r) * tl.num_programs(0) + tl.program_id(0)
        own = (at * C + i)[:, None] * P + p[None, :]
        S = tl.load(states + at * P * P + p[:, None] * P + p[None, :])
        asked = tl.dot(do, tl.trans(S), input_precision=PRECISION)
        local = tl.dot(do, tl.trans(tl.load(written + own)), input_precision=PRECISION)
        if DECAY:
            G = tl.cumsum(tl.load(decay + row * tokens + t, mask=real, other=0.0), 0)
            asked *= tl.exp(G)[:, None]
            tl.store(from_reads + row * tokens + t, tl.sum(asked * unit_rows(q, l2_eps), 1) * scale, mask=real)
            local *= tl.exp(tl.where(seen, G[:, None] - G[None, :], 0.0))
        local = tl.where(seen, local, 0.0)
        asked = tl.dot(local.to(dtype), k, asked, input_precision=PRECISION)
        if STATES > 1:  # what state r gives times do is what it asks of q̂ times q̂
            part = (row * tokens + t) * STATES + r
            tl.store(grad_share + part, tl.sum(asked * unit_rows(q, l2_eps), 1) * scale, mask=real)
            asked *= tl.load(share + part, mask=real, other=0.0)[:, None]
        dq += asked
        if DELTA and h % readers == 0:  # one of a state's readers
            T = tl.load(inverse + (at * C + i)[None, :] * C + i[:, None])  # transposed
            dr = tl.dot(T, tl.load(grad_written + own), input_precision=PRECISION)
            tl.debug_barrier()  # no thread stores before all have read
            tl.store(grad_written + own, dr)
    dq = _through_norm(q, dq, l2_eps, scale)
    tl.store(grad_query + b * tb + h * th + t[:, None] * tt + p[None, :], dq, mask=real[:, None])


@triton.jit
def through_states(
    key, value, write, decay, written, states, grad_written, grad_states, from_reads,
    grad_key, grad_value, grad_write, grad_decay, tokens,
    kb, kh, kt, vb, vh, vt, l2_eps,
    HEADS: tl.constexpr, READERS: tl.constexpr, STATES: tl.constexpr, GROUPS: tl.constexpr, VALUE_GROUPS: tl.constexpr,
    P: tl.constexpr, C: tl.constexpr, DELTA: tl.constexpr, DECAY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dv, and the parts of dk, dβ and dG that come from the states before and after a chunk."""
    row = tl.program_id(1).to(tl.int64)
    b, h = row // HEADS, row % HEADS
    i, p = tl.arange(0, C), tl.arange(0, P)
    t = tl.program_id(0) * C + i
    real = t < tokens
    at = row * tl.num_programs(0) + tl.program_id(0)
    own = (at * C + i)[:, None] * P + p[None, :]
    tile = at * P * P + p[:, None] * P + p[None, :]
    gates = row * tokens + t
    to = gates[:, None] * P + p[None, :]
    dtype = key.dtype.element_ty
    beta = tl.load(write + gates, mask=real, other=0.0)
    k = unit_rows(_rows(key + b * kb + h // GROUPS * kh, real, t, kt, p), l2_eps)
    dk = tl.dot(tl.load(written + own), tl.trans(tl.load(grad_states + tile)), input_precision=PRECISION)
    dG, G = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    if DECAY:
        g = tl.load(decay + gates, mask=real, other=0.0)
        G, total = tl.cumsum(g, 0), tl.sum(g, 0)
        dk *= tl.exp(total - G)[:, None]
        kept = tl.sum(dk * k, 1)
        common = tl.zeros([C // 4, P], tl.float32)
        for first in range(0, P, C // 4):  # two whole states in float32 would not fit the registers
            part = at * P * P + (first + tl.arange(0, C // 4))[:, None] * P + p[None, :]
            common += tl.load(states + part).to(tl.float32) * tl.load(grad_states + part).to(tl.float32)
        # The gradient of Gₑ, the last token's.
        whole = tl.sum(kept, 0) + tl.exp(total) * tl.sum(tl.sum(common, 1), 0)
        last = (t == tokens - 1) | (real & (i == C - 1))
        dG = tl.load(from_reads + gates, mask=real, other=0.0) - kept + tl.where(last, whole, 0.0)
    v = _rows(value + b * vb + h // VALUE_GROUPS * vh, real, t, vt, p).to(tl.float32)
    dr = tl.load(grad_written + own)
    if DELTA:
        S = tl.load(states + tile)
        subtracted = tl.dot(dr, tl.trans(S), input_precision=PRECISION) * (beta * tl.exp(G))[:, None]
        dk -= subtracted
        dG -= tl.sum(subtracted * k, 1)
        v -= tl.dot(k.to(dtype), S, input_precision=PRECISION) * tl.exp(G)[:, None]
    tl.store(grad_key + to, dk, mask=real[:, None])
    dr = dr.to(tl.float32)
    tl.store(grad_write + gates, tl.sum(dr * v, 1), mask=real)
    tl.store(grad_value + to, dr * beta[:, None], mask=real[:, None])
    if DECAY:
        tl.store(grad_decay + gates, dG, mask=real)


@triton.jit
def keys_backward(
    query, key, write, decay, share, written, grad, grad_written, grad_key, grad_write, grad_decay, tokens,
    qb, qh, qt, kb, kh, kt, gb, gh, gt, l2_eps, scale,
    HEADS: tl.constexpr, READERS: tl.constexpr, STATES: tl.constexpr, GROUPS: tl.constexpr, VALUE_GROUPS: tl.constexpr,
    P: tl.constexpr, C: tl.constexpr, DELTA: tl.constexpr, DECAY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk of one state and the gradients of its gates: what `through_states` found, and the chunk's own part.

    In products of two tokens row j stands for the earlier one, which column i looks at.
    """
    row = tl.program_id(1).to(tl.int64)
    b, h = row // HEADS, row % HEADS
    i, p = tl.arange(0, C), tl.arange(0, P)
    t = tl.program_id(0) * C + i
    real = t < tokens
    own = ((row * tl.num_programs(0) + tl.program_id(0)) * C + i)[:, None] * P + p[None, :]
    gates = row * tokens + t
    to = gates[:, None] * P + p[None, :]
    dtype = key.dtype.element_ty
    key += b * kb + h // GROUPS * kh
    before = i[:, None] < i[None, :]
    k = unit_rows(_rows(key, real, t, kt, p), l2_eps).to(dtype)
    u = tl.load(written + own)
    dk = tl.load(grad_key + to, mask=real[:, None], other=0.0).to(tl.float32)
    if DECAY:
        G = tl.cumsum(tl.load(decay + gates, mask=real, other=0.0), 0)
        dG = tl.load(grad_decay + gates, mask=real, other=0.0)
    if DELTA:
        beta = tl.load(write + gates, mask=real, other=0.0)
        dbeta = tl.load(grad_write + gates, mask=real, other=0.0)
        dr = tl.load(grad_written + own)
        seen = tl.dot(u, tl.trans(dr), input_precision=PRECISION)
        seeing = tl.dot(dr, tl.trans(u), input_precision=PRECISION)
        seen = tl.where(before, -seen, 0.0)
        both = seen * beta[None, :] - tl.where(i[:, None] > i[None, :], seeing, 0.0) * beta[:, None]
        seen *= tl.dot(k, tl.trans(k), input_precision=PRECISION)
        if DECAY:
            between = tl.exp(-tl.abs(G[:, None] - G[None, :]))
            both *= between
            seen *= between
        dk += tl.dot(both.to(dtype), k, input_precision=PRECISION)
        dbeta += tl.sum(seen, 0)
        if DECAY:
            seen *= beta[None, :]
            dG += tl.sum(seen, 0) - tl.sum(seen, 1)
    readers: tl.constexpr = READERS * STATES // HEADS
    for g in tl.range(readers, num_stages=1):
        reader = h // STATES * readers + g
        q = (unit_rows(_rows(query + b * qb + reader * qh, real, t, qt, p), l2_eps) * scale).to(dtype)
        do = _rows(grad + b * gb + reader * gh, real, t, gt, p).to(dtype)
        do = shared_out(do, share, b * READERS + reader, t, h % STATES, tokens, STATES)
        local = tl.where(i[:, None] <= i[None, :], tl.dot(u, tl.trans(do), input_precision=PRECISION), 0.0)
        if DECAY:
            local *= tl.exp(-tl.abs(G[:, None] - G[None, :]))
            reads = tl.where(before, local * tl.dot(k, tl.trans(q), input_precision=PRECISION), 0.0)
            dG += tl.sum(reads, 0) - tl.sum(reads, 1)
        dk = tl.dot(local.to(dtype), q, dk, input_precision=PRECISION)
    dk = _through_norm(_rows(key, real, t, kt, p).to(tl.float32), dk, l2_eps, 1.0)
    tl.debug_barrier()  # no thread stores before all have read
    tl.store(grad_key + to, dk, mask=real[:, None])
    if DELTA:
        tl.store(grad_write + gates, dbeta, mask=real)
    if DECAY:
        tl.store(grad_decay + gates, tl.cumsum(dG, 0, reverse=True), mask=real)
