"""Engines of tiny random models, and what their replies come to."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from models import FEW, VOCABULARY, awaken, base
from transformers import PreTrainedModel

import ahn
from ahn.serve.engine.engine import Engine
from ahn.serve.engine.reply import Reply
from ahn.serve.request import Delta, GenerationRequest, SamplingOptions, TokenLogprobs

WINDOW, SINKS = 9, 2
GREEDY = {"temperature": 0.0}


class Letters:
    """A tokenizer for models without text: every token is one character."""

    eos_token_id = None
    is_fast = False

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return "".join(chr(0x100 + token) for token in ids)


def text(ids: Iterable[int]) -> str:
    return Letters().decode(list(ids))


def model(seed: int = 0, **config: Any) -> PreTrainedModel:
    """Of one layer: what several layers do together is tested without an engine."""
    own = {"window": WINDOW, "sinks": SINKS, "memory": "gated_deltanet"} | config
    few = FEW if own["memory"] == "retained" else {}
    few = few | ({"key_bits": 4, "value_bits": 2} if config.get("quantized") else {})
    return awaken(ahn.attach(base(seed=seed, num_hidden_layers=1), ahn.AHNConfig(**few | own)))


@contextlib.contextmanager
def engine(of: PreTrainedModel | None = None, **options: Any) -> Iterator[Engine]:
    made = Engine(of or model(), Letters(), **{"conversations": 4, "chunk": 16} | options)  # type: ignore[arg-type]
    made.start()
    try:
        yield made
    finally:
        made.close(timeout=10)


def request(prompt: Sequence[int], max_tokens: int = 5, **fields: Any) -> GenerationRequest:
    names = {field.name for field in dataclasses.fields(GenerationRequest)}
    own = {name: fields.pop(name) for name in list(fields) if name in names}
    return GenerationRequest(prompt, SamplingOptions(max_tokens=max_tokens, **GREEDY | fields), **own)


@dataclasses.dataclass
class Whole:
    """A reply from its first delta to its last."""

    tokens: list[int]
    text: str
    finish: str | None
    error: str | None
    cached: int
    logprobs: list[TokenLogprobs]
    prompt_logprobs: list[TokenLogprobs]
    deltas: list[Delta]


def whole(reply: Reply) -> Whole:
    deltas = list(reply)
    return Whole(
        [token for delta in deltas for token in delta.tokens],
        "".join(delta.text for delta in deltas),
        deltas[-1].finish,
        deltas[-1].error,
        deltas[-1].cached,
        [one for delta in deltas for one in delta.logprobs],
        [one for delta in deltas for one in delta.prompt_logprobs],
        deltas,
    )


def ask(of: Engine, prompt: Sequence[int], max_tokens: int = 5, **fields: Any) -> Whole:
    return whole(of.submit(request(prompt, max_tokens, **fields)))


def prompt(length: int, seed: int = 0) -> list[int]:
    ids = torch.randint(2, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))
    return [int(token) for token in ids]


@torch.no_grad()
def alone(of: PreTrainedModel, ids: Sequence[int], count: int) -> list[int]:
    """What the model writes on its own, greedily."""
    whole = torch.tensor([list(ids)], device=of.device)  # the padding token's id may be among them
    options = {"attention_mask": torch.ones_like(whole), "max_new_tokens": count, "do_sample": False}
    output = of.generate(whole, eos_token_id=None, **options)
    return [int(token) for token in output[0, len(ids) :]]
