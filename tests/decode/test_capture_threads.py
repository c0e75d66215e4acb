"""While one thread captures a step, others use the same model: they find its modules as they were."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import MethodType
from typing import Any

import pytest
import torch
from captured import SINKS, TOLERANCE, WINDOW, Graphs, traces
from models import adapted, tokens
from talk import Talk
from torch import Tensor
from transformers import PreTrainedModel

from ahn.decode import runner
from ahn.decode.twin import twin_of


@dataclasses.dataclass
class Held:
    """A capture that waits, between its runs of the step, until somebody lets it go on."""

    inside: threading.Event = dataclasses.field(default_factory=threading.Event)
    go_on: threading.Event = dataclasses.field(default_factory=threading.Event)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    events, capture = Held(), runner.capture

    def waiting(twin: PreTrainedModel, once: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        def held_once() -> Tensor:
            logits = once()
            if not events.inside.is_set():
                events.inside.set()
                assert events.go_on.wait(60)
            return logits

        return capture(twin, held_once)

    monkeypatch.setattr(runner, "capture", waiting)
    yield events
    events.go_on.set()


def _talk(model: PreTrainedModel, seed: int = 0) -> Talk:
    talk = Talk(model, 1, seed=seed)
    talk.read([20])
    return talk


@torch.no_grad()
def test_ordinary_forwards_while_a_step_is_captured_and_compiled(compiled: list[torch.fx.Graph], held: Held) -> None:
    """Prompts, steps and gradients in this thread, to the bit what they are without the other one."""
    model, ids = adapted(window=WINDOW, sinks=SINKS), tokens(2, 30)
    expected, before = model(ids).logits, traces(model)
    talk = _talk(model)
    with ThreadPoolExecutor(1) as pool:
        capturing = pool.submit(talk.steps, 3)
        assert held.inside.wait(60)
        assert compiled and traces(model) == before
        assert torch.equal(model(ids).logits, expected)
        with torch.enable_grad():
            assert torch.equal(model(ids, use_cache=False, labels=ids).logits, model(ids, use_cache=False).logits)
        held.go_on.set()
        capturing.result()
    talk.check(TOLERANCE)
    assert traces(model) == before


def test_two_threads_capture_at_once(graphs: Graphs, held: Held) -> None:
    """The first waits in the middle of its capture while the second captures and steps."""
    model = adapted(window=WINDOW, sinks=SINKS)
    first, second = _talk(model), _talk(model, seed=1)
    with ThreadPoolExecutor(1) as pool:
        capturing = pool.submit(first.steps, 9)
        assert held.inside.wait(60)
        second.steps(9)
        held.go_on.set()
        capturing.result()
    first.check(TOLERANCE)
    second.check(TOLERANCE)
    assert graphs == Graphs(captures=2, replays=18)


@pytest.mark.sample(1)
@pytest.mark.parametrize("way", ["bound", "partial", "closure"])
def test_forwards_that_somebody_put_on_a_layer(way: str, graphs: Graphs) -> None:
    """As accelerate's hooks do. One that does not say which module it belongs to would run the model's own layer."""
    model = adapted(window=WINDOW, sinks=SINKS)
    layer, calls = model.model.layers[1], []

    def noted(module: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(module)
        return type(module).forward(module, *args, **kwargs)

    layer.forward = {
        "bound": MethodType(noted, layer),
        "partial": functools.partial(noted, layer),
        "closure": lambda *args, **kwargs: noted(layer, *args, **kwargs),
    }[way]
    talk = _talk(model)
    talk.steps(4)
    talk.check(TOLERANCE)
    assert graphs == (Graphs() if way == "closure" else Graphs(captures=1, replays=4))
    assert len(set(map(id, calls))) == (1 if way == "closure" else 2), "the layer and its twin"


def test_a_twin_has_the_model_s_tensors_and_nothing_else_of_it() -> None:
    model = adapted(window=WINDOW, sinks=SINKS)
    twin = twin_of(model)
    mine, its = (dict(m.named_parameters()) for m in (model, twin))
    assert mine.keys() == its.keys() and all(mine[name] is x for name, x in its.items())
    assert not {id(module) for module in model.modules()} & {id(module) for module in twin.modules()}
    hooks = [next(iter(layer.self_attn._forward_pre_hooks.values())) for layer in twin.model.layers]
    assert all(hook.ahn is layer.ahn for hook, layer in zip(hooks, twin.model.layers, strict=True))
