"""How the quantized tokens of two conversations that read the same may differ: by a rounding, where they just wrote."""

from __future__ import annotations

import torch
from talk import Talk
from torch import Tensor

from ahn.ops.basis import COARSE, FINE, fine_directions
from ahn.ops.quantize import BITS, code_bytes, per_group

TWO_BITS = {"key_bits": BITS, "value_bits": BITS, "keys_before_rope": False}
"""The form of quantized tokens that the shipped memories were measured with."""
MOST = 4
"""Numbers and scales of one step. Of a thousand, float32 in another order of operations moves less than one."""


def rounded_otherwise(one: Talk, other: Talk) -> int:
    """Numbers and scales on which the two, alike before their last step, have rounded to either side.

    A number on the edge of two codes may take the neighbouring level, which moves its vector's scale by some per cent;
    a scale between two numbers of bfloat16 may take the other one. A calibrated key takes the best of a few sizes, and
    two of them may be level: one in 25 000 keys with errors of 1e-5. Anything else fails: larger steps, more of them
    than `MOST`, or codes elsewhere than in the one slot that a row has written.
    """
    tiers = [[layer.state.tier for layer in talk.cache.memory_layers.values()] for talk in (one, other)]
    found = 0
    written: list[Tensor] = []
    for a, b in zip(*tiers, strict=True):
        held = [tier for tier in (a, b) if tier is not None]
        if len(held) == 1:  # captured steps have room for codes before the first one
            assert not held[0].keys.scales.any(), "one has codes, the other has none"
        for kind in ("keys", "values") if len(held) == 2 else ():
            rings = [getattr(tier, kind) for tier in held]
            calibrated = kind == "keys" and one.model.ahn_config.calibrated_keys
            levels = [_levels(ring.codes.cpu(), ring.bits, calibrated) for ring in rings]
            first, second = (ring.scales.cpu() for ring in rings)
            steps = (levels[0] - levels[1]).abs()  # (B, Hkv, C, P)
            moved = steps.sum(-1)
            # Neighbours among positive numbers of bfloat16 are neighbours as integers.
            places = (first.view(torch.int16).int() - second.view(torch.int16).int()).abs()
            assert steps.max() <= 1, f"{kind}: a code is {steps.max()} levels off"
            assert places[moved == 0].amax() <= 1, f"{kind}: a scale is {places[moved == 0].amax()} roundings off"
            near = (first.float() / second.float() - 1).abs()[moved > 0] <= 0.1 * moved[moved > 0]
            assert near.all(), f"{kind}: a scale does not follow its codes"
            # Two sizes of a calibrated key may be level in how well they do: then all its codes may move at once.
            each = moved.clamp_max(1) if calibrated else moved
            found += int(each.sum() + (places[moved == 0] > 0).sum())
            written.append(((moved > 0) | (places > 0)).any(1))  # (B, C)
    if written:
        slots = torch.stack(written).any(0).sum(1)
        assert slots.max() <= 1, f"codes differ in {slots.max()} slots of a row, and one was written"
    assert found <= MOST, f"{found} codes and scales differ"
    return found


def _levels(codes: Tensor, bits: int, calibrated: bool = False) -> Tensor:
    """(..., P · bits / 8) bytes to (..., P) levels, of calibrated keys to as many as have codes."""
    if calibrated:
        first = code_bytes(fine_directions(codes.shape[-1] * 8 // bits), FINE)
        return torch.cat([_levels(codes[..., :first], FINE), _levels(codes[..., first:], COARSE)], dim=-1)
    group = per_group(bits)
    bytes_of_group = codes.unflatten(-1, (-1, group * bits // 8)).int()
    word = (bytes_of_group << 8 * torch.arange(bytes_of_group.shape[-1])).sum(-1, keepdim=True)
    return ((word >> bits * torch.arange(group)) & (2**bits - 1)).flatten(-2)
