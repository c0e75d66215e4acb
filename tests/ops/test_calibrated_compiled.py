"""The tier's part of a step in a calibrated basis, compiled as on a GPU: what it gives uncompiled, in one graph."""

from __future__ import annotations

import copy

import pytest
import torch
from golden import relative_error
from support.effort import slow
from torch import Tensor

from ahn.layout.state import TierRing, TierState
from ahn.ops.basis import Basis
from ahn.ops.step.calibrated import KeyStep, add_values, push_and_weigh
from ahn.ops.step.turn import TierTurn

ROWS, KEY_HEADS, GROUPS, P, SLOTS, C = 2, 2, 3, 32, 20, 90


def drawn_state(seed: int, value_bits: int) -> tuple[TierState, Basis, TierTurn]:
    r = torch.Generator().manual_seed(seed)

    def ring(bits: int) -> TierRing:
        codes = torch.randint(256, (ROWS, KEY_HEADS, C, P * bits // 8), dtype=torch.uint8, generator=r)
        scales = torch.rand(ROWS, KEY_HEADS, C, generator=r).bfloat16()
        return TierRing(codes, scales, torch.randn(ROWS, KEY_HEADS, P, generator=r))

    deviations = torch.linspace(0, -2, P).exp().expand(KEY_HEADS, P)
    basis = Basis.of(torch.randn(KEY_HEADS, P, P, generator=r) / P**0.5 + 3 * torch.eye(P), deviations)
    token, within, near, first = (
        torch.randn(*shape, generator=r) for shape in ((ROWS, 3, 2, P), (2, 64, P // 2), (2, 2, P // 2), (2, 1, P // 2))
    )
    return TierState(ring(2), ring(value_bits)), basis, TierTurn(token, within, near, first, 50)


@pytest.mark.parametrize(("backend", "value_bits"), [("eager", 3), *[slow("inductor", bits) for bits in (2, 3, 4)]])
@torch.no_grad()
def test_two_graphs_do_every_step(backend: str, value_bits: int) -> None:
    """Before, at and after either edge; nothing breaks the graph, and no step needs another one."""
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def lower(module: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(module)
        return torch._dynamo.lookup_backend(backend)(module, inputs)

    functions = push_and_weigh, add_values
    compiled = [torch.compile(function, dynamic=False, fullgraph=True, backend=lower) for function in functions]
    for seed, positions in enumerate([[0, 19], [20, 21], [79, 60], [109, 110], [111, 1000]]):
        tier, basis, turn = drawn_state(seed, value_bits)
        for ring in (tier.keys, tier.values):
            empty = torch.arange(C) > torch.tensor(positions)[:, None] - SLOTS
            ring.scales.masked_fill_(empty[:, None], torch.nan)
        found = []
        for weigh, add in (functions, compiled):
            own, r = copy.deepcopy(tier), torch.Generator().manual_seed(seed)
            heads = KEY_HEADS, *[KEY_HEADS * GROUPS] * 2
            key, *queries = (torch.randn(ROWS, count, P, generator=r) for count in heads)
            parts, scores = (torch.full((ROWS, heads[1], 4, size), torch.nan) for size in (P, 1))
            told = KeyStep(key, *queries, torch.empty_like(key), parts[:, :, 1:], scores[:, :, 1:, 0])
            at, active = torch.tensor(positions), torch.tensor([True, seed != 1])
            weights = weigh(told, at, active, own.keys, basis, turn, SLOTS, 0.3)
            add(told, weights, at, own.values, SLOTS)
            rows = [position >= SLOTS and (seed != 1 or not row) for row, position in enumerate(positions)]
            assert not told.score[rows].isnan().any() and not told.out[rows].isnan().any()
            found.append((told.out, told.score, own.keys.codes, own.keys.scales))
        for one, other in zip(*found, strict=True):
            assert torch.equal(one.isnan(), other.isnan())
            assert relative_error(other.nan_to_num(0, 0, 0).double(), one.nan_to_num(0, 0, 0).double()) < 1e-5
    assert len(graphs) == 2
    torch._dynamo.reset()
