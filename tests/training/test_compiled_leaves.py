"""What training compiles on a GPU, compiled for the CPU: the same numbers, also where layers are run again."""

from __future__ import annotations

import functools
import gc
import sys
import threading
import warnings
import weakref

import pytest
import torch
from models import RECURRENT, adapted
from models import tokens as prompt
from support.effort import slow
from tiny_student import freeze_base, student, tokens
from torch import Tensor

import ahn
from ahn.decode.compiled import _rotation, leaves_compiled
from ahn.ops import has_triton
from ahn.training import distillation_loss
from ahn.training.losses import _compare

pytestmark = pytest.mark.skipif(not has_triton(), reason="torch.compile needs a C compiler")


@pytest.fixture(params=["aot_eager", slow("inductor")])
def compiler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is traced, and when it is traced again; `make test-all` also has it made into C++, which takes a minute."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=request.param))
    _rotation.cache_clear()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def losses_and_gradients(length: int, compiled: bool) -> tuple[Tensor, dict[str, Tensor]]:
    model = freeze_base(student())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    if compiled:
        with leaves_compiled(model):
            found = distillation_loss(model, tokens(1, length), window=6, sinks=2)
            found.loss.backward()
    else:
        found = distillation_loss(model, tokens(1, length), window=6, sinks=2)
        found.loss.backward()
    gradients = {n: p.grad for n, p in ahn.adapter_parameters(model).items() if p.grad is not None}
    return torch.stack(found[:4]).detach(), gradients


@pytest.mark.usefixtures("compiler")
def test_same_gradients_and_no_compilation_for_another_length() -> None:
    graphs = []
    for length in (30, 41):
        found, gradients = losses_and_gradients(length, compiled=True)
        expected, wanted = losses_and_gradients(length, compiled=False)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert gradients.keys() == wanted.keys()
        for name, gradient in gradients.items():
            scale = wanted[name].abs().max().item()
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-5 * scale)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] > 0, "nothing was compiled"
    assert graphs[1] == graphs[0]


@pytest.mark.sample(1)
@pytest.mark.parametrize("memory", RECURRENT)
@pytest.mark.usefixtures("compiler")
@torch.no_grad()
def test_a_prompt_in_a_compiled_block(memory: str) -> None:
    """Layers share what is compiled, and chunks of other lengths need no more of it."""
    model, graphs = adapted(memory=memory, window=9, sinks=2, prefill_chunk_size=7), []
    methods = dict(model.get_decoder().layers[0].ahn.fn.__dict__)
    for length in (40, 33, 51):
        ids = prompt(1, length)
        expected = model(ids).logits
        with leaves_compiled(model):
            found = model(ids).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[1:] == [graphs[0]] * 2, graphs
    assert methods.keys() == model.get_decoder().layers[0].ahn.fn.__dict__.keys()


def test_a_block_within_a_block_changes_nothing() -> None:
    model = student()
    norm = model.get_decoder().layers[0].input_layernorm
    with leaves_compiled(model):
        before = norm._compiled_call_impl
        with leaves_compiled(model):
            assert norm._compiled_call_impl is before
        assert norm._compiled_call_impl is before
    assert norm._compiled_call_impl is None


def traces(model: torch.nn.Module) -> list[object]:
    """Where a block could leave something behind: the modeling file, and the modules of the model."""
    found: list[object] = [sys.modules[type(model.get_decoder().layers[0].self_attn).__module__].apply_rotary_pos_emb]
    for module in model.modules():
        found += [module._compiled_call_impl, sorted(module.__dict__.keys() - {"_compiled_call_impl"})]
    return found


@pytest.mark.parametrize("same", [True, False], ids=["one model", "two models"])
def test_blocks_that_overlap_leave_nothing_behind(same: bool) -> None:
    """As those of two threads do: the one that began first ends first."""
    first = student()
    second = first if same else student()
    before = traces(first), traces(second)
    one, two = leaves_compiled(first), leaves_compiled(second)
    one.__enter__()
    assert traces(first)[0] is before[0][0], "the modeling file belongs to every model"
    two.__enter__()
    one.__exit__(None, None, None)
    assert second.get_decoder().layers[0].input_layernorm._compiled_call_impl is not None
    assert "forward" in second.get_decoder().layers[0].self_attn.__dict__, "the rotation is not compiled"
    two.__exit__(None, None, None)
    assert (traces(first), traces(second)) == before


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
@torch.no_grad()
def test_two_threads_compile_at_once() -> None:
    """Each with a model of its own, of one architecture: right while the other compiles, and nothing stays."""
    found: dict[int, Tensor] = {}
    students = [adapted(memory=memory, window=9, sinks=2) for memory in ("deltanet", "window_only")]
    before, ids = [traces(model) for model in students], prompt(1, 30)

    def run(number: int) -> None:
        with torch.no_grad(), leaves_compiled(students[number]):
            both.wait()
            found[number] = students[number](ids).logits

    both = threading.Barrier(2, timeout=60)
    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [traces(model) for model in students] == before
    for number, model in enumerate(students):
        torch.testing.assert_close(found[number], model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("compiler")
def test_losses_of_a_chunk() -> None:
    """With and without a cross entropy and a gradient; the last chunk of a sequence is shorter."""
    compiled = torch.compile(_compare, dynamic=True)
    for n, ce, dtype in [(12, 0.0, torch.bfloat16), (5, 0.0, torch.bfloat16), (7, 0.5, torch.float32), (9, 0.0, None)]:
        g = torch.Generator().manual_seed(n)
        student, teacher = (3 * torch.randn(n, 501, generator=g) for _ in range(2))
        labels = torch.randint(501, (n,), generator=g)
        found, expected = (f(student, teacher, labels, 1.0, ce, dtype) for f in (compiled, _compare))
        torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=0)
        assert (found[1] is None) == (dtype is None)
        if dtype is not None:
            # float32 sums in another order may round to the neighbouring bfloat16
            torch.testing.assert_close(found[1], expected[1], rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


def test_the_second_prompt_finds_the_parts_ready_until_the_memory_is_taken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("qwen2", window=9, sinks=3)
    with leaves_compiled(model):
        pass
    asked: list[object] = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: asked.append(function) or function)
    with leaves_compiled(model):
        assert all(layer.mlp._compiled_call_impl is not None for layer in model.model.layers)
    assert not asked
    memory = weakref.ref(model.get_decoder().layers[0].ahn.fn)
    ahn.detach(model)
    gc.collect()
    assert memory() is None, "a memory that was taken off takes up space"
    ahn.attach(model, ahn.AHNConfig("deltanet", window=9, sinks=3))
    with leaves_compiled(model):
        pass
    assert asked, "a new memory's parts were not compiled"
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
