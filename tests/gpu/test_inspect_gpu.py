"""Looking into a memory on a GPU: what kernels wrote, and graphs that wait while someone looks on."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from golden import relative_error
from models import awaken, base, tokens
from transformers import PreTrainedModel

import ahn
from ahn import AHNCache
from ahn.decode import runner

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

WINDOW, SINKS, LENGTH = 40, 4, 300
HALF = 3e-2  # bfloat16 through two layers, the kernels' own rounding of states between chunks


@cache
def made(memory: str) -> PreTrainedModel:
    config = ahn.AHNConfig(memory=memory, window=WINDOW, sinks=SINKS, prefill_chunk_size=64)
    return awaken(ahn.attach(base(hidden_size=256, head_dim=128, initializer_range=0.08), config)).bfloat16().cuda()


@torch.no_grad()
@pytest.mark.parametrize("memory", ["deltanet", "gated_deltanet", "mamba2", "routed_deltanet"])
def test_the_trace_is_of_what_the_kernels_wrote(memory: str) -> None:
    model, ids = made(memory), tokens(2, LENGTH).cuda()
    plain, kv = model(ids), AHNCache.for_model(model)
    with ahn.inspect.record(model) as trace:
        again = model(ids, past_key_values=kv)
    assert torch.equal(plain.logits, again.logits)
    for layer, writes in trace.writes.items():
        writers = model.model.layers[layer].ahn.fn.write_heads
        norm = kv.layers[layer].state.memory["state"].reshape(2, writers, -1).norm(dim=2).cpu()
        norm = norm.repeat_interleave(4 // writers, dim=1)
        assert relative_error(writes.state_norm[..., -1], norm) < HALF
        assert not writes.update.is_cuda and trace.reads[layer].memory.isfinite().all()


@torch.no_grad()
def test_graphs_wait_and_go_on() -> None:
    model, ids = made("gated_deltanet"), tokens(2, LENGTH + 30).cuda()
    kv, ordinary = AHNCache.for_model(model), AHNCache.for_model(model)
    model(ids[:, :LENGTH], past_key_values=kv)
    model(ids[:, :LENGTH], past_key_values=ordinary)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "on_gpu", lambda ids: False)
        right = [model(ids[:, n, None], past_key_values=ordinary).logits for n in range(LENGTH, LENGTH + 30)]
    mine = [model(ids[:, n, None], past_key_values=kv).logits for n in range(LENGTH, LENGTH + 10)]
    replay = kv.captured.replay
    with ahn.inspect.record(model) as trace:
        mine += [model(ids[:, n, None], past_key_values=kv).logits for n in range(LENGTH + 10, LENGTH + 20)]
    assert trace.writes[0].positions[0].tolist() == [n - WINDOW for n in range(LENGTH + 10, LENGTH + 20)]
    mine += [model(ids[:, n, None], past_key_values=kv).logits for n in range(LENGTH + 20, LENGTH + 30)]
    assert kv.captured.replay is replay  # the same graph, caught up
    assert relative_error(torch.cat(mine), torch.cat(right)) < HALF


@torch.no_grad()
def test_without_everything_is_sinks_and_window() -> None:
    model, plain, ids = made("mamba2"), made("window_only"), tokens(2, LENGTH).cuda()
    with ahn.inspect.without(model):
        assert torch.equal(model(ids).logits, plain(ids).logits)
