"""Two bits per number where they count most: keys coded in a calibrated basis, more bits for directions that matter.

What counts of a coded key k is its score with later queries, E[(q · (k - k̂))²] = (k - k̂)ᵀ M (k - k̂) with M = E[q qᵀ].
In coordinates y = Uᵀ M^½ k that is the plain squared error of y, and with U the eigenvectors of M^½ C M^½
(C = E[k kᵀ]) the numbers of y are uncorrelated with variances λ₁ ≥ λ₂ ≥ …: directions with little variance may be left
out, and the bits go to the others (reverse water-filling: Cover and Thomas, Elements of Information Theory, section
10.3.3).

One allotment serves all heads: 4 bits for the first 5/16 of the directions, none for as many at the end, 2 for the
others.

The numbers of one key are not Gaussian in such a basis, as they are after a Hadamard rotation: of keys that get much
attention a few lie far out. So the size by which a key is divided before it is rounded is searched among a few.
"""

import dataclasses
from typing import Self

import torch
from torch import Tensor

from ahn.ops.quantize import code_bytes, decode_rotated, deviation, nearest, packed, precise, tiny

FINE, COARSE = 4, 2
"""Bits of a number in the first directions, and in the middle."""
BITS = 2
"""Per number, over all directions."""
MULTIPLE = 4
"""Of what a head dimension is one, so that the codes of each part fill whole bytes."""
SIZES = (0.8, 1.0, 1.3, 1.8)
"""Times the deviation of the coded numbers: by what a key is divided before it is rounded."""


def fine_directions(head_dim: int) -> int:
    """How many of P directions have `FINE` bits, and how many have none: 5/16 of them, an even number."""
    return 5 * head_dim // 32 * 2


@dataclasses.dataclass(frozen=True)
class Basis:
    """Of the key heads of one layer, K directions of which have codes.

    Attributes:
        analysis: (Hkv, P, P), y = analysis @ k: the most important direction first.
        deviations: (Hkv, P), √λ.
        synthesis: (Hkv, K, P): its rows are what a level of 1 in a direction that has codes adds to a key.
    """

    analysis: Tensor
    deviations: Tensor
    synthesis: Tensor

    @classmethod
    def of(cls, analysis: Tensor, deviations: Tensor) -> Self:
        """With the inverse of `analysis`; both in float32 at least."""
        P = analysis.shape[-1]
        coded = P - fine_directions(P)
        inverse = torch.linalg.inv(analysis).mT[:, :coded]
        return cls(analysis, deviations, inverse * deviations[:, :coded, None])

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (B, Hkv, m, P) to codes (B, Hkv, m, P / 4) uint8, the finer ones first, and scales bfloat16 (B, Hkv, m).

        The result for one key does not depend on the others. The scale is the one with which the decoded key has on
        average the right product with a query, as in `ahn.ops.quantize.encode`.
        """
        coded = self.synthesis.shape[1]
        with torch.autocast(x.device.type, enabled=False):
            y = x.to(self.analysis.dtype) @ self.analysis.mT
        deviations, kept = self.deviations[:, None, :coded], y[..., :coded]
        z = kept / deviations
        size = deviation(z.square())
        codes, product, best = self._rounded(z / (SIZES[0] * size), kept, deviations)
        for factor in SIZES[1:]:
            others, other, fits = self._rounded(z / (factor * size), kept, deviations)
            better = fits > best
            product, best = torch.where(better, other, product), torch.where(better, fits, best)
            codes = torch.where(better[..., None], others, codes)
        scale = y.square().sum(-1) / product.clamp_min(tiny(y))
        first = fine_directions(x.shape[-1])
        parts = packed(codes[..., :first], FINE), packed(codes[..., first:], COARSE)
        return torch.cat(parts, dim=-1), scale.bfloat16()

    def _rounded(self, z: Tensor, y: Tensor, deviations: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The codes (..., K) of numbers z of deviation 1, the products (...) of what they mean with y, and by how much
        that, at its best scale, lessens the square of y."""
        first = fine_directions(self.analysis.shape[-1])
        parts = nearest(z[..., :first], FINE), nearest(z[..., first:], COARSE)
        codes, levels = (torch.cat(both, dim=-1) for both in zip(*parts, strict=True))
        levels = levels * deviations
        product = (y * levels).sum(-1)
        return codes, product, product.square() / levels.square().sum(-1)

    def decode(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """The keys (B, Hkv, m, P) that `encode` left of its input: float32, or float64 for such a `dtype`."""
        level = self.levels(codes, scales, dtype)
        with torch.autocast(level.device.type, enabled=False):
            return level @ self.synthesis.to(level.dtype)

    def levels(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """What `synthesis` makes keys of, (B, Hkv, m, K): float32, or float64 for such a `dtype`."""
        kind, first = precise(dtype), code_bytes(fine_directions(self.analysis.shape[-1]), FINE)
        parts = (codes[..., :first], FINE), (codes[..., first:], COARSE)
        return torch.cat([decode_rotated(part, scales, kind, bits) for part, bits in parts], dim=-1)
