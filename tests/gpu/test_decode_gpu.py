"""Captured steps on a GPU: the same numbers as ordinary forwards, one compilation, memory that does not grow."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import pytest
import torch
from models import adapted, awaken, base, tokens
from talk import Talk
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

import ahn
from ahn import ops
from ahn.decode import runner

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

WINDOW, SINKS = 40, 4
TOLERANCE = 1e-4  # float32 in another order of operations, through two layers with sharp attention
STEPS = 300  # the window goes round seven times


@pytest.fixture(autouse=True)
def _float32_scans() -> Iterator[None]:
    """So that nothing is rounded to bfloat16 on the way."""
    with ops.use_backend("chunked"):
        yield


@cache
def made(memory: str = "gated_deltanet", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Tests take batches of two rows, so that each of these models compiles once."""
    config = ahn.AHNConfig(memory=memory, window=WINDOW, sinks=SINKS, prefill_chunk_size=64)
    if dtype == torch.float32:
        return adapted(**vars(config)).cuda()
    plain = base(hidden_size=256, head_dim=128, initializer_range=0.08).to(dtype)
    return awaken(ahn.attach(plain, config)).cuda()


def _talk(model: PreTrainedModel, lengths: tuple[int, int] = (30, 17), seed: int = 0) -> Talk:
    """A padded batch that has read its prompt, from before the window is full."""
    talk = Talk(model, 2, seed=seed)
    talk.read(lengths)
    return talk


def _without_graphs(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(runner, "on_gpu", lambda ids: False)


@pytest.mark.parametrize("memory", ["gated_deltanet", "mamba2", "routed_deltanet"])
def test_float32_steps_are_the_whole_forward(memory: str) -> None:
    talk = _talk(made(memory))
    talk.steps(STEPS)
    assert talk.cache.captured is not None, "nothing was captured"
    talk.check(TOLERANCE)


@pytest.mark.parametrize(
    ("architecture", "memory"),
    [("qwen2", "gated_deltanet"), ("qwen3", "gated_deltanet"), ("qwen3", "routed_deltanet")],
)
@pytest.mark.parametrize(("window", "length"), [(WINDOW, 30), (8200, 8150)], ids=["one part", "many parts"])
def test_one_conversation_is_the_whole_forward(architecture: str, memory: str, window: int, length: int) -> None:
    """A single row is another step: fused products of a vector, whose kernels begin before the last one has ended."""
    config = ahn.AHNConfig(memory=memory, window=window, sinks=SINKS, prefill_chunk_size=max(64, length))
    talk = Talk(awaken(ahn.attach(base(architecture, hidden_size=64), config)).cuda(), 1)
    talk.read([length])
    talk.steps(STEPS)
    assert talk.cache.captured is not None, "nothing was captured"
    talk.check(TOLERANCE)


def test_bfloat16_steps_are_as_near_to_float32_as_ordinary_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(dtype=torch.bfloat16)
    reference = copy.deepcopy(model).float().cpu()
    errors = []
    for captured in (True, False):
        with monkeypatch.context() as patch:
            if not captured:
                _without_graphs(patch)
            talk = _talk(model)
            talk.steps(STEPS)
        assert (talk.cache.captured is not None) == captured
        errors.append(talk.error(reference))
    # Both round as often, at other places: the norm of 20 000 errors hardly depends on which.
    assert errors[0] < 1.5 * errors[1], errors


def test_greedy_tokens_are_those_without_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, mask = made(), tokens(2, 30).cuda(), torch.ones(2, 30, dtype=torch.long, device="cuda")
    ids[1, :13], mask[1, :13] = 0, 0
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": STEPS, "do_sample": False}
    found = model.generate(ids, **options)
    _without_graphs(monkeypatch)
    expected = model.generate(ids, **options)
    for row, pads in ((0, 0), (1, 13)):
        apart = (found[row] != expected[row]).nonzero()[:, 0].tolist()
        if apart:  # only where two tokens are level to float precision
            with torch.no_grad():
                logits = model(found[row : row + 1, pads : apart[0]], use_cache=False).logits[0, -1]
            gap = logits[found[row, apart[0]]] - logits[expected[row, apart[0]]]
            assert abs(float(gap)) < TOLERANCE * float(logits.norm())


def test_beams_share_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = made(), tokens(1, 30).cuda()
    options: dict[str, Any] = {
        "num_beams": 2, "max_new_tokens": 30, "do_sample": False, "return_dict_in_generate": True,
        "output_scores": True,
    }  # fmt: skip
    found = model.generate(ids, **options)
    _without_graphs(monkeypatch)
    expected = model.generate(ids, **options)
    torch.testing.assert_close(found.sequences_scores, expected.sequences_scores, rtol=10 * TOLERANCE, atol=0)


def test_nothing_compiles_after_the_first_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other lengths, two conversations in turn, pauses, and a return from an ordinary chunk."""
    model, graphs = made(), list[int]()

    def capture(*args: Any) -> Any:  # reading a prompt in chunks compiles as well, and not the step
        before = counters["stats"]["unique_graphs"]
        found = captured(*args)
        graphs.append(counters["stats"]["unique_graphs"] - before)
        return found

    _talk(model).steps(1)
    captured = runner.capture
    monkeypatch.setattr(runner, "capture", capture)
    talks = [_talk(model, lengths, seed=i) for i, lengths in enumerate([(2, 1), (44, 43), (45, 20), (200, 90)])]
    for _ in range(5):
        for talk in talks:
            talk.steps(1)
    for talk in talks:
        talk.read([0, 1])
        talk.read([5, 2])
        talk.steps(2)
        talk.check(TOLERANCE)
    assert len(graphs) >= len(talks) and not any(graphs), graphs
    assert counters["stats"]["unique_graphs"] > 0, "nothing was ever compiled"


@pytest.mark.parametrize("forgotten", [False, True], ids=["compiled before", "compiled now"])
def test_other_threads_go_on_while_steps_are_captured(forgotten: bool) -> None:
    """One reads and allocates, two capture, each with conversations of its own; no recording is given up."""
    model, ids = made(), tokens(2, 90).cuda()
    if forgotten:
        torch._dynamo.reset()
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits

    def read() -> None:
        with torch.no_grad():
            for _ in range(60):
                block = torch.empty(1 << 24, device="cuda")  # as whoever allocates anew
                torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=TOLERANCE, atol=TOLERANCE)
                del block

    def step(seed: int) -> None:
        for i in range(4):
            talk = _talk(model, seed=seed + i)
            talk.steps(20)
            assert talk.cache.captured is not None
            talk.check(TOLERANCE)

    with ThreadPoolExecutor(3) as pool:
        for work in [pool.submit(read), pool.submit(step, 0), pool.submit(step, 10)]:
            work.result()


def test_memory_does_not_grow_with_steps() -> None:
    talk = _talk(made())
    talk.steps(3)
    gc.collect()
    before = torch.cuda.memory_allocated()
    talk.steps(100)
    gc.collect()
    assert torch.cuda.memory_allocated() <= before


def test_a_parked_conversation_leaves_the_gpu_and_comes_back() -> None:
    """Its window is freed at once; the model may move as well, and the old graph is not used again."""
    model = made()
    talk = _talk(model)
    talk.steps(20)
    gc.collect()
    before = torch.cuda.memory_allocated()
    window = sum(layer.keys.nbytes + layer.values.nbytes for layer in talk.cache.memory_layers.values())
    talk.cache.to("cpu")
    gc.collect()
    assert torch.cuda.memory_allocated() <= before - window
    model.cpu().cuda()
    talk.cache.to("cuda")
    talk.steps(5)
    talk.check(TOLERANCE)
    model.cpu().cuda()  # while the conversation stays where its graph knows it
    talk.steps(5)
    talk.check(TOLERANCE)


def _poison() -> None:
    """NaN in what the allocator, and the driver below it, hand out next."""
    for give_back in (True, False):
        blocks = [torch.full((2**power,), torch.nan, device="cuda") for power in range(6, 22) for _ in range(4)]
        del blocks
        if give_back:
            torch.cuda.empty_cache()


def test_no_number_comes_from_unwritten_memory() -> None:
    model = made()
    _poison()
    talk = _talk(model, (17, 30))
    for counts in ([1, 1], [1, 0], [0, 1], [9, 4], [1, 1], [30, 60], [0, 1]):
        _poison()
        talk.read(counts)
        talk.steps(3)
    talk.check(TOLERANCE)
