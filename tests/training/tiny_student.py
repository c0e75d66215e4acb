"""Tiny random models for the training tests."""

from __future__ import annotations

import torch
from transformers import GraniteConfig, GraniteForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

import ahn

VOCABULARY = 64


def student(trained: bool = True, **config: object) -> PreTrainedModel:
    """A two-layer Qwen3 with an AHN. Weights are wide enough that far tokens matter; `trained` opens the memory."""
    torch.manual_seed(0)
    shape = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, initializer_range=0.3,
    )  # fmt: skip
    model = ahn.attach(Qwen3ForCausalLM(shape).eval(), ahn.AHNConfig(window=8, sinks=2, **config))
    if trained:  # a new memory's output projection is zero: its read would not show
        for name, parameter in ahn.adapter_parameters(model).items():
            if name.endswith("fn.o_proj.weight"):
                torch.nn.init.normal_(parameter, std=0.2)
    return model


def scaled_head() -> PreTrainedModel:
    """A Granite with an AHN: it divides its logits by a constant, which the losses would miss without a sign."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = GraniteConfig(vocab_size=VOCABULARY, num_key_value_heads=1, logits_scaling=8.0, **sizes)
    return ahn.attach(GraniteForCausalLM(config).eval(), ahn.AHNConfig(window=8, sinks=2))


def freeze_base(model: PreTrainedModel) -> PreTrainedModel:
    """Only the adapter takes gradients."""
    model.requires_grad_(False)
    for parameter in ahn.adapter_parameters(model).values():
        parameter.requires_grad_(True)
    return model


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
