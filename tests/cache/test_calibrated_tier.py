"""Quantized tokens whose keys are coded in a basis of their own: against a plain form, cut in any way, padded, in rows.

As in `test_tier`, models compute in float64 and the examples are fixed: a number on the edge of two levels would jump.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from golden import relative_error
from models import adapted, give_bases, tokens
from support.turns import Turns, assert_rows_alone, assert_same_layers, read
from torch import Tensor
from transformers import PreTrainedModel

import ahn
from ahn.cache import rows
from ahn.layout.rotation import Rotation
from ahn.memory.key_basis import KeyBasis
from ahn.ops.basis import SIZES
from ahn.ops.quantize import LEVELS
from ahn.wrappers import attached

TOLERANCE = 1e-4  # memories compute in float32
W, S, C = 6, 2, 14


class Near(ahn.AHNConfig):
    """Of the tier's tokens a few are near, which a base of 4 096 never wants."""

    @property
    def tier_reach(self) -> int:
        return self.lossless + 4


@cache
def shared(memory: str = "window_only", **fields: int) -> PreTrainedModel:
    sizes: dict[str, Any] = {"window": W, "sinks": S, "quantized": C, "key_bits": 2, "value_bits": 2} | fields
    model = adapted(memory=memory, calibrated_keys=True, **sizes).double()
    model.ahn_config = Near(**vars(model.ahn_config))
    give_bases(model)
    return model


def in_basis(x: Tensor, basis: KeyBasis) -> Tensor:
    """Keys x (B, Hkv, L, P) as their codes say them, written out: 4, 2 and no bits for a direction."""
    mean = x[:, :, S : S + W].mean(2, keepdim=True)
    weight, deviations, P = basis.weight[None], basis.deviations[None, :, None], x.shape[-1]
    y = (weight[:, :, None] @ (x - mean)[..., None])[..., 0]
    first = 5 * P // 32 * 2
    z = (y / deviations)[..., : P - first]
    z = z / z.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-30)
    tried = []
    for size in SIZES:
        level = torch.zeros_like(y)
        for bits, some in ((4, slice(0, first)), (2, slice(first, P - first))):
            levels = torch.tensor(LEVELS[bits], dtype=x.dtype)
            level[..., some] = levels[(z[..., some, None] / size - levels).abs().argmin(-1)]
        tried.append(level * deviations)
    level = torch.stack(tried)
    best = (y * level).sum(-1, keepdim=True) / level.square().sum(-1, keepdim=True)
    errors = (y - best * level).square().sum(-1, keepdim=True)
    level = level.gather(0, errors.argmin(0, keepdim=True).expand(1, *y.shape))[0]
    scale = y.square().sum(-1, keepdim=True) / (y * level).sum(-1, keepdim=True).clamp_min(1e-30)
    return torch.linalg.solve(weight[:, :, None], (level * scale.bfloat16())[..., None])[..., 0] + mean


@pytest.mark.parametrize("length", [S + W, S + W + 3, 40])
@torch.no_grad()
def test_it_is_a_plain_form_of_it(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What queries see of a text, layer by layer: the keys that the tier gives, before they are turned."""
    model, ids = shared(quantized=60), tokens(2, length)  # nothing leaves the tier
    layers, at = model.model.layers, iter(range(2))
    asked: list[tuple[Tensor, Tensor, int]] = []
    push = ahn.cache.tier.push

    def spied(view: Any, state: Any, evicted: Any, keys: Tensor, *rest: Any) -> Any:
        passed, layer = push(view, state, evicted, keys, *rest), next(at)
        rotation: Rotation = attached(model)._ahn.rotation
        before = rotation.undo(keys, torch.arange(length)[None])
        expected = in_basis(before, layers[layer].ahn.fn.key_basis)[:, :, S : length - W]
        basis = layers[layer].ahn.fn.key_basis.basis(torch.float64)
        ring = passed.state.keys
        found = basis.decode(ring.codes, ring.scales, torch.float64) + ring.offset.unsqueeze(2)
        asked.append((found[:, :, : length - S - W], expected, layer))
        return passed

    monkeypatch.setattr("ahn.cache.tier.push", spied)
    model(ids, past_key_values=ahn.AHNCache.for_model(model))
    assert [layer for *_, layer in asked] == ([0, 1] if length > S + W else [])
    for found, expected, _ in asked:
        assert relative_error(found, expected) < 1e-6  # the offset is kept in float32


@pytest.mark.sample(1)
@pytest.mark.parametrize("memory", ["window_only", "gated_deltanet"])
@torch.no_grad()
def test_whole_is_chunks_is_steps(memory: str) -> None:
    model, ids = shared(memory), tokens(2, 44)
    whole = ahn.AHNCache.for_model(model)
    expected = read(model, ids, [44], whole)
    assert relative_error(model(ids, use_cache=False).logits, expected) < TOLERANCE
    for pieces in ([8, *[1] * 36], [9, 1, 20, *[1] * 4, 10]):
        found = ahn.AHNCache.for_model(model)
        assert relative_error(read(model, ids, pieces, found), expected) < TOLERANCE
        assert_same_layers(found, whole)


def test_a_padded_batch_is_its_rows_alone() -> None:
    assert_rows_alone(shared(), Turns(window=W, sinks=S, chunks=[[25, 14], [1, 1], [9, 2], [1, 1], [1, 1]]))


@torch.no_grad()
def test_rows_of_a_batch_and_forks_go_on_as_alone() -> None:
    model = shared("gated_deltanet")
    alone = [ahn.AHNCache.for_model(model) for _ in range(2)]
    for n, length in enumerate((31, 12)):
        read(model, tokens(1, length, seed=n), [length], alone[n])
    new = tokens(2, 1, seed=7)
    expected = [read(model, new[n : n + 1], [1], copy.deepcopy(alone[n])) for n in (0, 1)]
    batch = rows.join(alone)
    positions = torch.tensor(rows.lengths(batch))[:, None]
    found = model(new, past_key_values=batch, position_ids=positions).logits
    for n in (0, 1):
        assert relative_error(found[n], expected[n][0]) < TOLERANCE
    fork = rows.take(batch, 0, torch.device("cpu"))
    read(model, new[:1], [1], alone[0])
    more = tokens(1, 3, seed=9)
    assert relative_error(read(model, more, [3], fork), read(model, more, [3], alone[0])) < TOLERANCE


def test_bytes_are_those_of_two_bits() -> None:
    model = shared(quantized=60)
    held = ahn.AHNCache.for_model(model)
    read(model, tokens(1, 70), [70], held)
    P, heads, layers = 16, 2, 2
    token = heads * ((2 + 2) * P // 8 + 4)
    assert held.bytes_by_part()["quantized"] == layers * (60 * token + 2 * heads * P * 4)
