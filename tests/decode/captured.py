"""What tests of captured steps share: models, and what may happen to a conversation between two steps."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from models import RULED, adapted, tokens
from talk import Talk
from torch import Tensor, nn
from transformers import PreTrainedModel

from ahn import AHNCache, memory
from ahn.decode import runner

WINDOW, SINKS = 9, 3
LOSSLESS = WINDOW + SINKS
TOLERANCE = 1e-4  # float32 in another order of operations, through two layers with sharp attention
CAPTURED = (*RULED, "retained", "window_only")
IN_PARTS = tuple(
    name for name in CAPTURED if getattr(memory.get(name), "step_gates", None) is not memory.RecurrentMemory.step_gates
)
"""Those of which a step finishes the gates itself."""


@dataclasses.dataclass
class Graphs:
    """How many were recorded, and how often one was replayed."""

    captures: int = 0
    replays: int = 0


def on_this_machine(patch: pytest.MonkeyPatch) -> Graphs:
    """Let steps be captured on a CPU, which has no graphs: each replay runs the step itself, over the same buffers."""
    count = Graphs()

    def capture(model: PreTrainedModel, once: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        count.captures += 1
        with torch.inference_mode():  # as to a graph, it is all one to it
            for _ in range(2):
                once()
            logits = once()

        def replay() -> None:
            count.replays += 1
            with torch.inference_mode():
                logits.copy_(once())

        return replay, logits

    patch.setattr(runner, "capture", capture)
    patch.setattr(runner, "on_gpu", lambda ids: True)
    patch.setattr(runner, "supported", lambda *of: True)
    return count


@cache
def shared(architecture: str = "qwen3", memory: str = "gated_deltanet", options: bool = False) -> PreTrainedModel:
    return adapted(
        architecture, memory=memory, router=options, q_proj=options, window=WINDOW, sinks=SINKS, prefill_chunk_size=8
    )


def traces(model: nn.Module) -> list[tuple[Any, ...]]:
    """What is each module's own, by identity: capturing a step changes nothing of it."""
    return [
        (
            {name: id(x) for name, x in vars(module).items()},
            list(module._forward_pre_hooks.items()), dict(module._forward_pre_hooks_with_kwargs),
            list(module._modules.items()),
        )
        for module in model.modules()
    ]  # fmt: skip


def _reorder(talk: Talk) -> None:
    order = list(range(len(talk.rows)))[::-1]
    talk.cache.reorder_cache(torch.tensor(order))
    talk.choose(order)


def _select(talk: Talk) -> None:
    chosen = [len(talk.rows) - 1, 0]
    talk.cache.batch_select_indices(torch.tensor(chosen))
    talk.choose(chosen)


def _repeat(talk: Talk) -> None:
    talk.cache.batch_repeat_interleave(2)
    talk.choose([row for row in range(len(talk.rows)) for _ in range(2)])


def _fork(talk: Talk) -> None:
    """Go on with a copy, after the original has gone another way."""
    original, talk.cache = talk.cache, copy.deepcopy(talk.cache)
    with torch.no_grad():
        talk.model(tokens(len(talk.rows), 1), past_key_values=original)


def _save_and_load(talk: Talk) -> None:
    with tempfile.TemporaryDirectory() as folder:
        talk.cache.save(Path(folder) / "cache.safetensors")
        talk.cache = AHNCache.load(Path(folder) / "cache.safetensors", talk.model)


def _crop(talk: Talk) -> None:
    if talk.cache.seen <= LOSSLESS and bool(talk.mask[:, -2:].all()):
        talk.crop(2)


def _in_inference_mode(talk: Talk) -> None:
    with torch.inference_mode():
        talk.steps(1)


EVENTS: dict[str, Callable[[Talk], object]] = {
    "steps": lambda talk: talk.steps(3),
    "pause": lambda talk: talk.read([row % 2 for row in range(len(talk.rows))]),
    "pause of others": lambda talk: talk.read([1 - row % 2 for row in range(len(talk.rows))]),
    "turn": lambda talk: talk.read([5 + row for row in range(len(talk.rows))]),
    "hidden states": lambda talk: talk.read([1] * len(talk.rows), output_hidden_states=True),
    "loss": lambda talk: talk.read([1] * len(talk.rows), labels=torch.ones(len(talk.rows), 1, dtype=torch.long)),
    "inference mode": _in_inference_mode,
    "fork": _fork,
    "save and load": _save_and_load,
    "reorder": _reorder,
    "select": _select,
    "repeat": _repeat,
    "crop": _crop,
    "move": lambda talk: talk.cache.to("cpu"),
    "weigh": lambda talk: talk.cache.nbytes(),
    "look at padding": lambda talk: talk.cache.progress.padding,
}


def converse(talk: Talk, lengths: Sequence[int], events: Sequence[str]) -> None:
    talk.read(lengths)
    talk.steps(2)
    for event in events:
        if len(talk.rows) < 5 or event != "repeat":
            EVENTS[event](talk)
        talk.steps(1)
    talk.read([3] * len(talk.rows))
    talk.steps(2)
    talk.check(TOLERANCE)
