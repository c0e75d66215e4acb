"""Invariants 1, 2, 3, 5 and 7 of docs/spec.md, section 8, on whole models.

Invariant 4 is in test_cache.py, 6 in test_ops.py and test_memory.py.

Weights are random and wide, so one key seen too many or one write out of order changes logits by more than 1 %.
"""

from __future__ import annotations

import weakref
from functools import cache
from typing import Any

import pytest
import torch
from golden import relative_error
from hypothesis import example, given, settings
from hypothesis import strategies as st
from models import ARCHITECTURES, EVERYTHING, MEMORIES, adapted, awaken, base, positions, tokens
from support.effort import examples
from support.turns import TOLERANCE, Turns, assert_rows_alone, assert_same_layers, padded, pieces, read, turns
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

import ahn

STANDARD = tuple(name for name in ARCHITECTURES if name not in ("gemma3", "gpt_oss"))


@cache
def shared(architecture: str = "qwen3", memory: str = "gated_deltanet", options: bool = False) -> PreTrainedModel:
    """One model for all examples of a test; `with_window` sets what differs."""
    return adapted(architecture, memory=memory, router=options, q_proj=options)


def with_window(model: PreTrainedModel, window: int, sinks: int, chunk: int = 10_000) -> PreTrainedModel:
    model.ahn_config = model.ahn_config.replace(window=window, sinks=sinks, prefill_chunk_size=chunk)
    return model


# -- 1. the whole prompt, chunks of any sizes, one token at a time ----------------------------------------------------


@pytest.mark.sample(3)
@pytest.mark.parametrize("memory", EVERYTHING)
@given(window=st.integers(1, 12), sinks=st.integers(0, 5), pieces=pieces, chunk=st.integers(1, 9))
@settings(max_examples=examples(1, 6))
@example(window=7, sinks=3, pieces=[1] * 20, chunk=1)
@example(window=5, sinks=2, pieces=[8, 1, 1, 1, 9, 1, 1, 4, 1], chunk=3)
def test_whole_is_chunks_is_steps(memory: str, window: int, sinks: int, pieces: list[int], chunk: int) -> None:
    model = with_window(shared(memory=memory, options=memory in MEMORIES), window, sinks)
    ids = tokens(2, sum(pieces))
    whole = ahn.AHNCache.for_model(model)
    expected = read(model, ids, [ids.shape[1]], whole)
    with torch.no_grad():
        assert relative_error(model(ids, use_cache=False).logits, expected) < TOLERANCE
    found = ahn.AHNCache.for_model(model)
    assert relative_error(read(model, ids, pieces, found), expected) < TOLERANCE
    assert_same_layers(found, whole)
    own_chunks = ahn.AHNCache.for_model(with_window(model, window, sinks, chunk))
    assert relative_error(read(model, ids, [ids.shape[1]], own_chunks), expected) < TOLERANCE
    assert_same_layers(own_chunks, whole)


@pytest.mark.sample(9)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("memory", MEMORIES)
def test_whole_is_chunks_is_steps_in_every_architecture(architecture: str, memory: str) -> None:
    model = with_window(shared(architecture, memory, options=True), 9, 2)
    ids = tokens(2, 34)
    whole, found = (ahn.AHNCache.for_model(model) for _ in range(2))
    expected = read(model, ids, [34], whole)
    assert relative_error(read(model, ids, [7, 1, 5, 1, 1, 1, 6, 1, 1, 10], found), expected) < TOLERANCE
    assert_same_layers(found, whole)
    with torch.no_grad(), ahn.disabled(model):
        assert relative_error(expected, model(ids).logits) > 0.01, "the test sees no memory"


def test_far_tokens_matter() -> None:
    """The read of the memory reaches the logits: the first evictable token changes the last position."""
    for memory in MEMORIES:
        model = with_window(shared(memory=memory), 6, 2)
        ids = tokens(1, 40)
        other = ids.clone()
        other[0, 2] = (ids[0, 2] + 7) % 50 + 2
        with torch.no_grad():
            # Two layers and a window of 6: without a memory nothing of position 2 arrives at 39.
            change = model(other).logits[:, -1] - model(ids).logits[:, -1]
        assert bool(change.any())


# -- 2. nothing has left the window: the base model, bit for bit -------------------------------------------------------


@pytest.mark.sample(5)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("length", [1, 11, 30])
@torch.no_grad()
def test_below_the_window_it_is_the_base_model(architecture: str, length: int) -> None:
    plain = base(architecture)
    model = awaken(ahn.attach(base(architecture), ahn.AHNConfig(window=28, sinks=4, router=True, q_proj=True)))
    ids = tokens(2, 32)
    for attention_mask in (None, torch.ones(2, length, dtype=torch.long)):
        a, b = (m(ids[:, :length], attention_mask=attention_mask) for m in (model, plain))
        assert torch.equal(a.logits, b.logits)
        assert torch.equal(
            model(ids[:, :length], attention_mask=attention_mask, use_cache=False).logits,
            plain(ids[:, :length], attention_mask=attention_mask, use_cache=False).logits,
        )
    for t in range(length, 32):
        step = ids[:, t : t + 1]
        a, b = (m(step, past_key_values=x.past_key_values) for m, x in ((model, a), (plain, b)))
        assert torch.equal(a.logits, b.logits)
    # The token after the last lossless one is where they part.
    a, b = (m(step, past_key_values=x.past_key_values) for m, x in ((model, a), (plain, b)))
    assert not torch.equal(a.logits, b.logits)


@pytest.mark.sample(3)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_below_the_window_a_padded_batch_is_the_base_models(architecture: str) -> None:
    plain, model = base(architecture), shared(architecture)
    with_window(model, 28, 4)
    ids, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[1, :6] = 0
    a, b = (m(ids, attention_mask=mask, position_ids=positions(mask)) for m in (model, plain))
    assert torch.equal(a.logits, b.logits)
    longer = torch.cat([mask, torch.ones(2, 5, dtype=torch.long)], dim=1)
    extra = {"attention_mask": longer, "position_ids": positions(longer)[:, -5:]}
    a, b = (m(ids[:, :5], past_key_values=x.past_key_values, **extra) for m, x in ((model, a), (plain, b)))
    assert torch.equal(a.logits, b.logits)


@pytest.mark.sample(3)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_below_the_window_generation_is_the_base_models(architecture: str) -> None:
    plain, model = base(architecture), with_window(shared(architecture), 40, 4)
    options = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    a, b = (m.generate(tokens(2, 20), **options) for m in (model, plain))
    assert torch.equal(a.sequences, b.sequences)
    assert all(torch.equal(x, y) for x, y in zip(a.logits, b.logits, strict=True))


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@torch.no_grad()
def test_both_kernels_of_a_model(kernel: str) -> None:
    """Below the window the kernel that the model was loaded with; beyond it the same numbers from either."""
    ids = tokens(2, 60)
    plain = base(attn_implementation=kernel)
    model = awaken(ahn.attach(base(attn_implementation=kernel), ahn.AHNConfig(window=20, sinks=4)))
    assert torch.equal(model(ids[:, :24]).logits, plain(ids[:, :24]).logits)
    other = awaken(ahn.attach(base(), ahn.AHNConfig(window=20, sinks=4)))
    other.load_state_dict(model.state_dict())
    assert relative_error(model(ids).logits, other(ids).logits) < TOLERANCE


# -- 3. a left-padded batch is its rows alone --------------------------------------------------------------------------


@pytest.mark.sample(2)
@pytest.mark.parametrize("memory", EVERYTHING)
@given(turns=turns())
@settings(max_examples=examples(5, 10))
@example(turns=Turns(window=6, sinks=3, chunks=[[15, 4], [1, 1], [9, 2], [1, 1], [1, 1]]))
@example(turns=Turns(window=4, sinks=4, chunks=[[20, 10], [10, 2], [1, 1], [1, 1]]))
@example(turns=Turns(window=40, sinks=2, chunks=[[9, 5], [5, 2], [1, 1], [1, 1], [7, 9]]))
@example(turns=Turns(window=3, sinks=2, chunks=[[9, 2], [7, 0], [7, 0], [3, 4], [1, 1], [1, 1]]))
def test_a_padded_batch_is_its_rows_alone(memory: str, turns: Turns) -> None:
    """First turns, later turns on the live cache with padding of their own, and decoding in between."""
    model = with_window(shared(memory=memory, options=memory in MEMORIES), turns.window, turns.sinks)
    assert_rows_alone(model, turns)


@torch.no_grad()
@pytest.mark.parametrize("quantized", [0, 7])
def test_retained_tokens_in_codes(quantized: int) -> None:
    """Whole, chunks, steps, padded rows. In float64, where no number is so near to a code's edge as to cross it."""
    model = adapted(memory="retained", window=9, sinks=2, quantized=quantized, key_bits=4, value_bits=2).double()
    ids = tokens(2, 70)
    whole, found = (ahn.AHNCache.for_model(model) for _ in range(2))
    expected = read(model, ids, [70], whole)
    assert relative_error(read(model, ids, [7, 1, 20, 1, 1, 1, 6, 1, 1, 31], found), expected) < TOLERANCE
    assert_same_layers(found, whole)
    assert relative_error(model(ids, use_cache=False).logits, expected) < TOLERANCE
    assert_rows_alone(model, Turns(9, 2, [[60, 31], [1, 1], [9, 2], [1, 1], [1, 1]]))


@pytest.mark.sample(3)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_a_padded_prompt_in_every_architecture(architecture: str) -> None:
    """With a cache, without (training), and in chunks that are padding only for one row."""
    model = with_window(shared(architecture, options=True), 9, 2)
    ids, mask, rows = padded([[40, 23]])
    for chunk, use_cache in ((10_000, True), (10_000, False), (5, True)):
        with_window(model, 9, 2, chunk)
        logits = model(ids, attention_mask=mask, position_ids=positions(mask), use_cache=use_cache).logits
        for row, own in enumerate(rows):
            expected = model(own[None], use_cache=False).logits
            assert relative_error(logits[row, mask[row].bool()], expected[0]) < TOLERANCE


@pytest.mark.sample(4)
@pytest.mark.parametrize("architecture", STANDARD)
@pytest.mark.parametrize("window", [9, 100])
@pytest.mark.parametrize("explicit", [True, False])
@torch.no_grad()
def test_a_second_turn_with_new_padding(architecture: str, window: int, explicit: bool) -> None:
    """Whether or not the caller gives positions: relative ones are right either way."""
    model = with_window(shared(architecture, options=True), window, 2)
    chunks = [[20, 20], [8, 3], [1, 1], [1, 1]]
    ids, mask, rows = padded(chunks)
    cache, logits = ahn.AHNCache.for_model(model), []
    for chunk in chunks:
        start, stop = cache.seen, cache.seen + max(chunk)
        extra = {"position_ids": positions(mask[:, :stop])[:, start:]} if explicit else {}
        logits.append(model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, **extra).logits)
    found = torch.cat(logits, 1)
    for row, own in enumerate(rows):
        expected = model(own[None], use_cache=False).logits
        assert relative_error(found[row, mask[row].bool()], expected[0]) < TOLERANCE


@pytest.mark.sample(4)
@pytest.mark.parametrize("memory", EVERYTHING)
@torch.no_grad()
def test_gradients_of_a_padded_batch_are_its_rows(memory: str) -> None:
    model = with_window(shared(memory=memory, options=memory in MEMORIES), 6, 2)
    ids, mask, rows = padded([[25, 14]])
    parameters = ahn.adapter_parameters(model)

    def gradients(*batches: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        model.zero_grad()
        with torch.enable_grad():
            for batch, real in batches:
                out = model(batch, attention_mask=real, position_ids=positions(real), use_cache=False).logits
                (out[real.bool()].sin()).sum().backward()
        return {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}

    expected = gradients(*((own[None], torch.ones_like(own[None])) for own in rows))
    found = gradients((ids, mask))
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert relative_error(found[name], gradient) < 10 * TOLERANCE, name  # sums over tokens that partly cancel


# -- 5. peak memory does not grow with the context ---------------------------------------------------------------------


class PeakBytes(TorchDispatchMode):
    """The most bytes of tensors alive at a time, among those made inside the block.

    Integers are not counted: token ids, masks and positions are the caller's inputs, 8 bytes a token each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.dtype != torch.int64:
                self._count(x.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._alive:
            return

        def gone(_: object) -> None:
            self.now -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


@pytest.mark.slow
@pytest.mark.parametrize(("memory", "quantized"), [("gated_deltanet", 0), ("gated_deltanet", 100), ("ct_avg", 0)])
def test_peak_memory_does_not_grow_with_the_prompt(memory: str, quantized: int) -> None:
    config = ahn.AHNConfig(memory=memory, window=64, sinks=16, prefill_chunk_size=1024, quantized=quantized)
    model = awaken(ahn.attach(base(num_hidden_layers=1), config))
    peaks = {}
    for length in (8_192, 65_536):
        ids = tokens(1, length)
        with PeakBytes() as used:
            model.generate(ids, max_new_tokens=4, do_sample=False)
        peaks[length] = used.peak
    assert peaks[65_536] < 1.05 * peaks[8_192], peaks
    cache_bytes = 2 * 2 * 16 * 80 * 4  # keys and values, heads, head size, tokens, bytes
    assert peaks[8_192] > cache_bytes, "nothing was measured"


@torch.no_grad()
def test_a_cache_holds_what_the_specification_says() -> None:
    """2·W·P·Hkv + P²·Hq numbers a layer (W: the lossless total), plus the gates of the window."""
    model = with_window(shared(), 20, 4)
    sizes = []
    for length in (60, 200):
        cache = ahn.AHNCache.for_model(model)
        read(model, tokens(1, length), [length], cache)
        sizes.append(cache.nbytes())
    layers, heads, kv_heads, head_dim, gates = 2, 4, 2, 16, 2
    assert sizes == [4 * layers * (2 * 24 * head_dim * kv_heads + head_dim**2 * heads + gates * 24 * heads)] * 2


# -- 7. attach, then detach --------------------------------------------------------------------------------------------


def _traces(model: PreTrainedModel) -> dict[str, Any]:
    """Everything that an adapter could leave behind."""
    modules = dict(model.named_modules())
    return {
        "modules": {name: type(module) for name, module in modules.items()},
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "hooks": {name: (len(m._forward_pre_hooks), len(m._forward_hooks)) for name, m in modules.items()},
        "training": {name: module.training for name, module in modules.items()},
        "gradients": {name: p.requires_grad for name, p in model.named_parameters()},
        "config": model.config.to_dict(),
        "kernels": [model.config._attn_implementation, model.get_decoder().config._attn_implementation],
        "generation": model.generation_config.to_dict(),
    }


@pytest.mark.sample(1)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_attach_then_detach_leaves_no_trace(architecture: str) -> None:
    model, ids = base(architecture), tokens(2, 50)
    before, weights = _traces(model), {name: x.clone() for name, x in model.state_dict().items()}
    logits = model(ids).logits
    generated = model.generate(ids, max_new_tokens=5, do_sample=False)
    for memory in EVERYTHING:
        ahn.attach(model, ahn.AHNConfig(memory=memory, window=9, sinks=2, router=True, q_proj=True))
        awaken(model).generate(ids, max_new_tokens=5, do_sample=False)
        with ahn.disabled(model):
            assert torch.equal(model(ids).logits, logits)
            assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), generated)
        ahn.detach(model)
    assert _traces(model) == before
    after = model.state_dict()
    assert after.keys() == weights.keys() and all(torch.equal(after[name], x) for name, x in weights.items())
    assert torch.equal(model(ids).logits, logits)
