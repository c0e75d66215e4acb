"""One model, several threads: what holds inside a block of one thread is no business of the others."""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from models import adapted, base, tokens
from torch import Tensor
from transformers import PreTrainedModel

import ahn
from ahn.layout.visibility import Visibility
from ahn.model.attached import observed
from ahn.model.observer import Observer


@contextlib.contextmanager
def meanwhile(act: Callable[[], None]) -> Iterator[None]:
    """Another thread does this over and over, at least once before the block begins."""
    over, begun = threading.Event(), threading.Event()

    def work() -> None:
        while not over.is_set():
            act()
            begun.set()

    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(work)
        begun.wait(30)
        try:
            yield
        finally:
            over.set()
        working.result()


@torch.no_grad()
def text(model: PreTrainedModel, ids: Tensor) -> list[int]:
    return model.generate(ids, max_new_tokens=12, do_sample=False)[0].tolist()


@torch.no_grad()
def test_a_teacher_in_another_thread_leaves_texts_alone() -> None:
    model, ids = adapted(window=9, sinks=2), tokens(1, 30)
    expected, teacher = text(model, ids), base()(ids).logits

    def teach() -> None:
        with torch.no_grad(), ahn.disabled(model):
            assert torch.equal(model(ids).logits, teacher)

    with meanwhile(teach):
        for _ in range(6):
            assert text(model, ids) == expected


@torch.no_grad()
def test_a_thread_that_waits_inside_disabled_disables_no_one() -> None:
    """Without luck: the other thread is inside its block for the whole forward, and between prompt and step."""
    model, ids = adapted(window=9, sinks=2), tokens(1, 31)
    expected = model(ids).logits
    cache = ahn.AHNCache.for_model(model)
    model(ids[:, :30], past_key_values=cache)
    inside, done = threading.Event(), threading.Event()

    def wait() -> None:
        with ahn.disabled(model):
            inside.set()
            done.wait(30)

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(wait)
        assert inside.wait(30)
        try:
            assert torch.equal(model(ids).logits, expected)
            model(ids[:, 30:], past_key_values=cache)
        finally:
            done.set()
        waiting.result()


@torch.no_grad()
def test_a_thread_started_inside_disabled_takes_the_block_along_only_with_its_context() -> None:
    model, ids = adapted(window=9, sinks=2), tokens(1, 30)
    student, teacher = model(ids).logits, base()(ids).logits

    def logits() -> Tensor:
        with torch.no_grad():
            return model(ids).logits

    with ThreadPoolExecutor(1) as pool, ahn.disabled(model):
        assert torch.equal(pool.submit(logits).result(), student)
        assert torch.equal(pool.submit(contextvars.copy_context().run, logits).result(), teacher)


@torch.no_grad()
def test_blocks_may_be_left_in_any_order() -> None:
    first, second, ids = adapted(window=9, sinks=2), adapted(window=9, sinks=2), tokens(1, 30)
    student, teacher = first(ids).logits, base()(ids).logits
    one, two = ahn.disabled(first), ahn.disabled(second)
    one.__enter__()
    two.__enter__()
    one.__exit__(None, None, None)
    assert torch.equal(first(ids).logits, student)
    assert torch.equal(second(ids).logits, teacher)
    two.__exit__(None, None, None)
    assert torch.equal(second(ids).logits, student)


@torch.no_grad()
def test_another_threads_window_does_not_change_a_text_that_has_begun() -> None:
    model, ids = adapted(window=9, sinks=2), tokens(1, 30)
    cache = ahn.AHNCache.for_model(model)
    expected = model(ids).logits
    model(ids[:, :20], past_key_values=cache)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(ahn.set_window, model, 5, 0).result()
    found = model(ids[:, 20:], past_key_values=cache).logits
    torch.testing.assert_close(found, expected[:, 20:], rtol=1e-4, atol=1e-4)
    assert ahn.AHNCache.for_model(model).config.window == 5, "new conversations have it, in all threads"


class Count(Observer):
    def __init__(self) -> None:
        self.threads: list[int] = []

    def begin(self, cache: ahn.AHNCache | None, view: Visibility) -> None:
        self.threads.append(threading.get_ident())


@torch.no_grad()
def test_observers_see_their_own_thread() -> None:
    model, ids = adapted(window=9, sinks=2), tokens(1, 30)

    def read() -> None:
        with torch.no_grad():
            model(ids)

    count = Count()
    with meanwhile(read), observed(model, count, first=True):
        for _ in range(4):
            read()
    assert set(count.threads) == {threading.get_ident()}
    assert len(count.threads) >= 4


def test_gradient_checkpointing_of_the_teacher_runs_outside_of_its_block() -> None:
    """The backward pass runs layers again, in autograd's own threads on a GPU, and here after the block is left."""
    model, plain, ids = adapted(window=9, sinks=2).train(), base().train(), tokens(1, 30)
    for each in (model, plain):
        each.gradient_checkpointing_enable({"use_reentrant": False})
    with ahn.disabled(model):
        loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    plain(ids, labels=ids, use_cache=False).loss.backward()
    weights = dict(model.named_parameters())
    for name, weight in plain.named_parameters():
        assert torch.equal(weights[name].grad, weight.grad), name
