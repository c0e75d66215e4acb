"""`ahn.inspect.record`: every number against one that is come by in another way, on every path, changing nothing."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from golden import relative_error
from models import RULED, adapted, tokens
from torch import Tensor
from transformers import PreTrainedModel

import ahn
from ahn import AHNCache, AHNError, private
from ahn.decode import runner
from ahn.inspect import Trace

WINDOW, SINKS, LENGTH = 9, 3, 90  # more than one chunk of the recorder's is written
TOLERANCE = 1e-4  # float32 in another order of operations, through two layers with sharp attention


@cache
def shared(memory: str = "gated_deltanet", options: bool = False, architecture: str = "qwen3") -> PreTrainedModel:
    return adapted(
        architecture, memory=memory, router=options, q_proj=options, window=WINDOW, sinks=SINKS, prefill_chunk_size=24
    )


@torch.no_grad()
def recorded(model: PreTrainedModel, ids: Tensor, sizes: tuple[int, ...] = (), **more: Tensor) -> Trace:
    """Of ids read with a cache in pieces of these sizes, or without a cache."""
    with ahn.inspect.record(model) as trace:
        if not sizes:
            model(ids, use_cache=False, **more)
        start, kv = 0, AHNCache.for_model(model)
        for size in sizes:
            model(ids[:, start : start + size], past_key_values=kv)
            start += size
    return trace


def test_quantized_tokens_are_written_when_they_leave_the_codes() -> None:
    model = adapted(window=WINDOW, sinks=SINKS, quantized=7)
    ids = tokens(1, LENGTH)
    trace = recorded(model, ids, (20, 1, 30, LENGTH - 51))
    positions = next(iter(trace.writes.values())).positions[0]
    assert positions.tolist() == list(range(SINKS, LENGTH - WINDOW - 7))
    assert trace.evicted_at(SINKS) == SINKS + WINDOW + 7
    assert next(iter(trace.reads.values())).positions[0].tolist() == list(range(SINKS + WINDOW + 7, LENGTH))


def assert_same(one: Trace, other: Trace) -> None:
    assert one.writes.keys() == other.writes.keys()
    for layer, writes in one.writes.items():
        for mine, theirs in ((writes, other.writes[layer]), (one.reads[layer], other.reads[layer])):
            for name, x in vars(mine).items():
                assert x.shape == getattr(theirs, name).shape
                assert relative_error(x, getattr(theirs, name)) < TOLERANCE, name


def of_heads(kv: AHNCache, layer: int, writers: int) -> Tensor:
    """All numbers that a query head reads: (B, 4, ·)."""
    return kv.layers[layer].state.memory["state"].reshape(2, writers, -1).repeat_interleave(4 // writers, 1)


@pytest.mark.sample(1)
@torch.no_grad()
@pytest.mark.parametrize("memory", RULED)
def test_writes_are_what_happens_to_the_state(memory: str) -> None:
    """Tokens go in one by one and every state is kept: the change beyond the decay is the update."""
    model, ids = shared(memory), tokens(2, LENGTH)
    trace, kv = recorded(model, ids), AHNCache.for_model(model)
    model(ids[:, : WINDOW + SINKS], past_key_values=kv)
    writers = model.model.layers[0].ahn.fn.write_heads
    for n in range(LENGTH - WINDOW - SINKS):
        before = {layer: of_heads(kv, layer, writers) for layer in trace.writes}
        pending = {layer: {k: g.clone() for k, g in kv.layers[layer].window.gates.items()} for layer in trace.writes}
        slot = SINKS + n % WINDOW  # of the token that leaves, once tokens lie in slots; before, the column after sinks
        model(ids[:, WINDOW + SINKS + n, None], past_key_values=kv)
        for layer, writes in trace.writes.items():
            after = of_heads(kv, layer, writers)
            rule = model.model.layers[layer].ahn.fn.step_rule()
            assert torch.equal(writes.positions[:, n], torch.full((2,), SINKS + n))
            at = slot if n else SINKS
            if n > 1:  # pending gates lie in slots from the second step on
                gate = pending[layer][rule.write][:, :, at].repeat_interleave(4 // writers, 1)
                assert relative_error(writes.strength[:, :, n], gate) < TOLERANCE
            decay = writes.decay[:, :, n, None, None]
            if rule.decay is not None and n > 1:
                assert relative_error(decay[..., 0, 0], pending[layer][rule.decay][:, :, at].exp()) < TOLERANCE
            change = after - decay[..., 0] * before[layer]
            assert relative_error(writes.update[:, :, n], change.norm(dim=2)) < 1e-3
            assert relative_error(writes.state_norm[:, :, n], after.norm(dim=2)) < TOLERANCE


@pytest.mark.sample(2)
@torch.no_grad()
@pytest.mark.parametrize("options", [False, True], ids=["plain", "router and q_proj"])
@pytest.mark.parametrize("memory", RULED)
def test_reads_are_what_the_memory_adds_after_o_proj(memory: str, options: bool) -> None:
    """The first layer's attention output with and without its reads differs by them."""
    model, ids = shared(memory, options), tokens(2, LENGTH)
    seen: list[Tensor] = []
    handle = model.model.layers[0].self_attn.o_proj.register_forward_hook(lambda _, __, out: seen.append(out))
    reads = recorded(model, ids).reads[0]
    with ahn.inspect.without(model, [0], read=False, write=True):
        model(ids, use_cache=False)
    for head in range(4):
        with ahn.inspect.without(model, [0], [head], write=True):
            model(ids, use_cache=False)
    handle.remove()
    both, exact, *headless = (x[:, WINDOW + SINKS :] for x in seen)
    assert reads.positions.tolist() == [list(range(WINDOW + SINKS, LENGTH))] * 2
    assert relative_error(reads.exact, exact.norm(dim=-1)) < TOLERANCE
    assert relative_error(reads.memory, (both - exact).norm(dim=-1)) < TOLERANCE
    cosine = torch.cosine_similarity(both - exact, exact, dim=-1)
    assert (reads.cosine - cosine).abs().max() < 1e-3
    for head, less in enumerate(headless):
        assert relative_error(reads.head_memory[:, head], (both - less).norm(dim=-1)) < 1e-3
    assert abs(reads.share - float((reads.memory / reads.exact).mean())) < 1e-5


@pytest.mark.sample(2)
@pytest.mark.parametrize("sizes", [(LENGTH,), (7, 40, 1, 1, 41), (12, 1, 1, 76), (60,) + (1,) * 30])
def test_every_way_of_reading_is_recorded_alike(sizes: tuple[int, ...]) -> None:
    model, ids = shared(), tokens(1, LENGTH)
    assert_same(recorded(model, ids, sizes), recorded(model, ids))


@torch.no_grad()
@pytest.mark.sample(2)
@pytest.mark.parametrize("memory", RULED)
def test_outputs_do_not_change_by_a_bit(memory: str) -> None:
    model, ids = shared(memory, True), tokens(2, LENGTH)
    plain, kv = model(ids), AHNCache.for_model(model)
    written = model.generate(ids, max_new_tokens=5, do_sample=False)
    with ahn.inspect.record(model):
        again = model(ids, past_key_values=kv)
    assert torch.equal(plain.logits, again.logits)
    for layer, same in zip(plain.past_key_values.layers, kv.layers, strict=True):
        assert torch.equal(layer.state.memory["state"], same.state.memory["state"])
    with ahn.inspect.record(model) as trace:
        assert torch.equal(written, model.generate(ids, max_new_tokens=5, do_sample=False))
    assert trace.writes[0].positions.shape[1] == LENGTH + 4 - WINDOW - SINKS


def test_training_goes_on_under_a_recording() -> None:
    model, ids = copy.deepcopy(shared()), tokens(1, LENGTH)
    model(ids, use_cache=False).logits.square().mean().backward()
    right = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with ahn.inspect.record(model) as trace:
        model(ids, use_cache=False).logits.square().mean().backward()
    assert right and all(torch.equal(dict(model.named_parameters())[name].grad, grad) for name, grad in right.items())
    assert not trace.writes[0].update.requires_grad
    model.train()
    model.gradient_checkpointing_enable()
    with pytest.raises(AHNError, match="twice"), ahn.inspect.record(model):
        pass


@torch.no_grad()
def test_rows_of_a_padded_batch_are_rows_alone() -> None:
    model, ids = shared(), tokens(2, LENGTH)
    pads = 50
    mask = torch.ones_like(ids)
    mask[1, :pads] = 0
    batch = recorded(model, ids, attention_mask=mask)
    alone = recorded(model, ids[1:, pads:])
    for layer, mine in alone.writes.items():
        for own, shared_ in ((mine, batch.writes[layer]), (alone.reads[layer], batch.reads[layer])):
            last = own.positions.shape[1]
            for name, x in vars(own).items():
                assert relative_error(getattr(shared_, name)[1:, ..., -last:], x) < TOLERANCE, name
        assert (batch.writes[layer].positions[1, :-last] == -1).all()
        assert (batch.writes[layer].update[1, :, :-last] == 0).all()
        assert batch.reads[layer].positions[1].tolist() == [-1] * (pads - WINDOW - SINKS) + list(range(LENGTH - pads))
    assert batch.evicted_at(SINKS, row=1) == SINKS + WINDOW


@torch.no_grad()
def test_padding_between_turns() -> None:
    """A row that waits neither writes nor reads; what it reads afterwards is as if it had not waited."""
    model, ids = shared(), tokens(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[1, 40:60] = 0
    with ahn.inspect.record(model) as trace:
        kv = AHNCache.for_model(model)
        for start, stop in ((0, 40), (40, 70), (70, LENGTH)):
            model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=kv)
    alone = recorded(model, torch.cat([ids[1:, :40], ids[1:, 60:]], dim=1))
    for layer, mine in alone.writes.items():
        for own, both in ((mine, trace.writes[layer]), (alone.reads[layer], trace.reads[layer])):
            real = both.positions[1] >= 0
            assert both.positions[1, real].tolist() == own.positions[0].tolist()
            for name, x in vars(own).items():
                assert relative_error(getattr(both, name)[1:][..., real], x) < TOLERANCE, name


def test_when_a_token_left() -> None:
    trace = recorded(shared(), tokens(1, LENGTH), (40, 50))
    assert trace.evicted_at(SINKS - 1) is None
    assert trace.evicted_at(SINKS) == SINKS + WINDOW
    assert trace.evicted_at(LENGTH - 1 - WINDOW) == LENGTH - 1
    assert trace.evicted_at(LENGTH - WINDOW) is None
    assert trace.evicted_at(-1) is None
    model, kv = shared(), AHNCache.for_model(shared())
    model(tokens(1, 40), past_key_values=kv)
    with ahn.inspect.record(model) as late:
        model(tokens(1, 10), past_key_values=kv)
    assert late.evicted_at(40 - WINDOW - 1) is None
    assert late.evicted_at(40 - WINDOW) == 40


@torch.no_grad()
def test_half_lives() -> None:
    writes = recorded(shared(), tokens(1, LENGTH)).writes[0]
    kept = writes.decay[0].double().log().cumsum(-1).exp()[:, -1]  # of the first state, after all writes
    assert torch.allclose(0.5 ** (writes.decay.shape[-1] / writes.half_life().double()), kept, rtol=1e-3)
    assert (recorded(shared("deltanet"), tokens(1, LENGTH)).writes[0].half_life() == float("inf")).all()


@torch.no_grad()
def test_one_conversation_a_trace() -> None:
    model, ids = shared(), tokens(1, 30)
    kv, other = AHNCache.for_model(model), AHNCache.for_model(model)
    with ahn.inspect.record(model) as trace:
        model(ids, past_key_values=kv)
        with pytest.raises(AHNError, match="one conversation"):
            model(ids)
        with pytest.raises(AHNError, match="one conversation"):
            model(ids, past_key_values=other)
        with ahn.disabled(model):
            model(ids)
        model(ids, past_key_values=kv)  # a refusal has harmed nothing
    assert trace.writes[0].positions.shape[1] == 60 - WINDOW - SINKS


@torch.no_grad()
def test_recordings_nest_and_end() -> None:
    model, ids = shared(), tokens(1, 30)
    with ahn.inspect.record(model) as outer, ahn.inspect.record(model) as inner:
        model(ids)
    assert_same(outer, inner)
    with pytest.raises(ZeroDivisionError), ahn.inspect.record(model):
        raise ZeroDivisionError
    assert not model._ahn.observers
    model(ids)
    assert outer.writes[0].positions.shape[1] == 30 - WINDOW - SINKS


@torch.no_grad()
def test_captured_steps_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "on_gpu", lambda ids: True)
    monkeypatch.setattr(runner, "supported", lambda *_: True)
    model, kv = shared(), AHNCache.for_model(shared())
    model(tokens(1, 30), past_key_values=kv)
    step = {"input_ids": tokens(1, 1), private.CACHE: kv}
    assert runner.runs(model, step)
    with ahn.inspect.record(model):
        assert not runner.runs(model, step)
    with ahn.inspect.without(model):
        assert not runner.runs(model, step)
    assert runner.runs(model, step)


@torch.no_grad()
def test_only_layers_with_a_memory() -> None:
    model = adapted("qwen3", window=WINDOW, sinks=SINKS, full_attention_layers=(0,))
    assert list(recorded(model, tokens(1, 30)).writes) == [1]
    gemma = adapted("gemma3", window=WINDOW, sinks=SINKS)
    assert list(recorded(gemma, tokens(1, 30), (20, 10)).reads) == [1]


def test_what_cannot_be_recorded() -> None:
    for memory in ("window_only", "ct_avg"):
        model = adapted(memory=memory)
        with pytest.raises(AHNError, match=f"{memory} keeps no recurrent state"), ahn.inspect.record(model):
            pass
    with pytest.raises(AHNError, match="no AHN"), ahn.inspect.record(ahn.detach(model)):
        pass
    trace = recorded(shared(), tokens(1, WINDOW + SINKS))
    assert trace.writes == trace.reads == {}
    with pytest.raises(AHNError, match="Nothing left the window"):
        trace.by_kind([])
