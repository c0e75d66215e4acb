"""Keys or values of tokens that a memory keeps: exactly, or at a few bits per number (`ahn.ops.quantize`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from ahn.layout.blocks import TokenBlocks
from ahn.layout.slots import Picked
from ahn.ops.quantize import code_bytes, decode, encode, precise
from ahn.shape import EXACT


@dataclasses.dataclass
class Kept:
    """Keys or values of T tokens.

    Attributes:
        numbers: (B, Hkv, T, P) in the model's precision, or codes (B, Hkv, T, P · bits / 8) uint8 with
        scales: (B, Hkv, T) bfloat16, as `encode` gives them, and
        offset: (B, Hkv, P) float32, the mean of the row's first block, which was taken away before encoding: biases and
            other directions that all tokens share would take up most of the codes' range.
    """

    numbers: Tensor
    scales: Tensor | None = None
    offset: Tensor | None = None

    @classmethod
    def empty(cls, x: Tensor, count: int, bits: int) -> Kept:
        """For tokens like x (B, Hkv, m, P)."""
        B, heads, _, P = x.shape
        if bits == EXACT:
            return cls(x.new_zeros(B, heads, count, P))
        codes = x.new_zeros(B, heads, count, code_bytes(P, bits), dtype=torch.uint8)
        scales = x.new_zeros(B, heads, count, dtype=torch.bfloat16)
        return cls(codes, scales, x.new_zeros(B, heads, P, dtype=torch.float32))

    def tensors(self, name: str) -> dict[str, Tensor]:
        """By their names in a memory's state; `name` is "key" or "value"."""
        named = {f"{name}s": self.numbers, f"{name}_scales": self.scales, f"{name}_offset": self.offset}
        return {name: x for name, x in named.items() if x is not None}

    @classmethod
    def of(cls, state: Mapping[str, Tensor], name: str) -> Kept:
        """The inverse of `tensors`."""
        return cls(state[f"{name}s"], state.get(f"{name}_scales"), state.get(f"{name}_offset"))

    def joined(self, exact: Tensor, blocks: TokenBlocks, unbiased: bool) -> Kept:
        """With the tokens (B, Hkv, G + m, P) of the block that was filling and those that leave now.

        Args:
            unbiased: see `encode`.
        """
        if self.scales is None or self.offset is None:
            return Kept(torch.cat([self.numbers.to(exact.dtype), exact], dim=2))
        offset = self.offset
        if blocks.begins:
            mean = blocks.first(exact).to(precise(exact.dtype)).mean(2).float()
            offset = torch.where(blocks.beginning[:, None, None], mean, offset)
        bits = 8 * self.numbers.shape[-1] // exact.shape[-1]
        codes, scales = encode(exact.to(precise(exact.dtype)) - offset.unsqueeze(2), unbiased, bits)
        return Kept(torch.cat([self.numbers, codes], dim=2), torch.cat([self.scales, scales], dim=2), offset)

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """(B, Hkv, T, P) of this type."""
        if self.scales is None or self.offset is None:
            return self.numbers.to(dtype)
        bits = 8 * self.numbers.shape[-1] // self.offset.shape[-1]
        return (decode(self.numbers, self.scales, dtype, bits) + self.offset.unsqueeze(2)).to(dtype)

    def take(self, picked: Picked) -> Kept:
        """Of some of the tokens."""
        scales = None if self.scales is None else picked.of(self.scales)
        return Kept(picked.of(self.numbers), scales, self.offset)
