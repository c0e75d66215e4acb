"""What the kernels of a step have in common: where a token lies, finished heads and gates, rotated vectors."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def slot_of(position, sinks, window):
    ring = sinks + (position - sinks) % window
    return tl.where(position < sinks + window, position, ring)


@triton.jit
def finished_head(x, kept, norm, eps, cos, sin, P: tl.constexpr):
    """The heads at x (a pointer, or one for each row as [N, 1]) through their norm and rotation: P numbers, float32."""
    p = tl.arange(0, P)
    y = tl.load(x + p, mask=kept, other=0.0).to(tl.float32)
    if cos is not None:
        partner = tl.where(p < P // 2, p + P // 2, p - P // 2)
        z = tl.load(x + partner, mask=kept, other=0.0).to(tl.float32)
        if norm is not None:
            factor = tl.rsqrt(tl.sum(y * y, -1, keep_dims=True) / P + eps)
            y *= factor * tl.load(norm + p).to(tl.float32)
            z *= factor * tl.load(norm + partner).to(tl.float32)
        z = tl.where(p < P // 2, -z, z)
        y = y * tl.load(cos + p).to(tl.float32) + z * tl.load(sin + p).to(tl.float32)
    return y


@triton.jit
def turned(x, cos, sin, P: tl.constexpr):
    """x (P,) turned by the angles (P / 2,) at these pointers."""
    p = tl.arange(0, P) % (P // 2)
    first, second = tl.split(tl.trans(tl.reshape(x, [2, P // 2])))
    partner = joined(-second, first, P)
    return x * tl.load(cos + p) + partner * tl.load(sin + p)


@triton.jit
def joined(first, second, P: tl.constexpr):
    """Both halves (P / 2,) of a vector (P,)."""
    return tl.reshape(tl.trans(tl.join(first, second)), [P])


@triton.jit
def finished_gate(logits, shift, log_rate, h, ACTIVATION: tl.constexpr):
    """See `ahn.ops.gate.Gate`: of one token and the head h."""
    x = tl.load(logits).to(tl.float32)
    if shift is not None:
        x += tl.load(shift + h).to(tl.float32)
    if ACTIVATION == "sigmoid":
        x = tl.sigmoid(x)
    elif ACTIVATION == "softplus":
        # max(x, 0) + log1p(e), where e <= 1; log1p as log(u) e / (u - 1) with u = 1 + e keeps the digits of a small e.
        e = tl.exp(-tl.abs(x))
        u = 1.0 + e
        x = tl.maximum(x, 0.0) + tl.where(u == 1.0, e, tl.log(u) * e / tl.where(u == 1.0, 1.0, u - 1.0))
    if log_rate is not None:
        x *= -tl.exp(tl.load(log_rate + h).to(tl.float32))
    return x


@triton.jit
def hadamard(rows, columns):
    """Entries of the Hadamard matrix times the root of its size, from int32 indices: `ahn.ops.quantize.rotate`."""
    bits = rows & columns
    bits ^= bits >> 4
    bits ^= bits >> 2
    bits ^= bits >> 1
    return tl.where((bits & 1) == 0, 1.0, -1.0)


@triton.jit
def rotate(x, P: tl.constexpr):
    """x (P,) float32, rotated: by a matrix of the upper half of an index's bits, then by one of the lower."""
    A: tl.constexpr = 4 if P <= 16 else 8 if P <= 64 else 16
    B: tl.constexpr = P // A
    a, b = tl.arange(0, A), tl.arange(0, B)
    y = tl.sum(tl.reshape(x, [A, B])[:, None, :] * hadamard(a[:, None], a[None, :])[:, :, None], 0)
    y = tl.sum(y[:, :, None] * hadamard(b[:, None], b[None, :])[None, :, :], 1)
    return tl.reshape(y, [P]) / tl.sqrt(P * 1.0)
