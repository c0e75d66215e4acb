"""Checkpoints with a real tokenizer: a tiny random model that reads and writes text, and an adapter for it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from models import awaken
from transformers import AutoTokenizer, LogitsProcessor, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

import ahn
from ahn import tiny
from ahn.cli.session import Session
from ahn.cli.writing import Sampling

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WINDOW, SINKS = 12, 4


@dataclasses.dataclass(frozen=True)
class Speaking:
    """Directories of a base model and of an adapter that names it."""

    base: Path
    adapter: Path


def tokenizer(template: str | None = None) -> PreTrainedTokenizerBase:
    """The shipped tokenizer, with a chat template and its special tokens or without any template."""
    loaded = AutoTokenizer.from_pretrained(tiny.path())
    loaded.chat_template = template
    if template:
        loaded.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        loaded.eos_token = "<|im_end|>"
    return loaded


def model(words: PreTrainedTokenizerBase, **config: Any) -> Qwen3ForCausalLM:
    """A random model for a tokenizer, with a memory whose weights all matter."""
    torch.manual_seed(0)
    base = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(words),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=512,
            initializer_range=0.2,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
    )
    return awaken(ahn.attach(base, ahn.AHNConfig(**{"window": WINDOW, "sinks": SINKS} | config))).eval()


def session(template: str | None = None, **config: Any) -> Session:
    """A session in this process."""
    words = tokenizer(template)
    return Session(model(words, **config), words)


def save(folder: Path, template: str | None = None, **config: Any) -> Speaking:
    """The same model as base and adapter on disk."""
    words = tokenizer(template)
    adapted = model(words, **config)
    saved = Speaking(folder / "base", folder / "adapter")
    adapted.config._name_or_path = adapted.name_or_path = str(saved.base)
    ahn.save_adapter(adapted, saved.adapter)
    ahn.detach(adapted).save_pretrained(saved.base)
    words.save_pretrained(saved.base)
    return saved


class _Script(LogitsProcessor):
    """Leaves one token to choose from: the next of these."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = iter(tokens)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        only = torch.full_like(scores, -torch.inf)
        only[:, next(self.tokens)] = 0
        return only


def script(monkeypatch: pytest.MonkeyPatch, tokens: Sequence[int]) -> None:
    """Make the model say these tokens in the next continuation."""
    plain, processor = Sampling(temperature=0.0).arguments, _Script(tokens)

    def arguments(self: Sampling, ends: Any) -> dict[str, Any]:
        return plain(ends) | {"max_new_tokens": self.max_new_tokens, "logits_processor": [processor]}

    monkeypatch.setattr(Sampling, "arguments", arguments)


@torch.no_grad()
def next_logits(session: Session) -> torch.Tensor:
    """What a session would choose its next token from; the session stays as it is."""
    cache = copy.deepcopy(session.cache)
    ids = torch.tensor([session._ids[cache.seen - session._before :]])
    return session.model(input_ids=ids, past_key_values=cache).logits[0, -1]
