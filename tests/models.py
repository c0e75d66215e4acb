"""Tiny random models of every architecture that is tested, with weights wide enough that far tokens matter."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

import ahn

VOCABULARY = 61
FEW = {"slots": 16, "key_bits": 16, "value_bits": 16}
"""Of a memory of tokens: 14 are kept, blocks have 2, so that most of a short text is forgotten. They are kept exactly:
one number that rounds to the other side moves a code by far more than float32 rounds (tests/memory is about codes)."""
_SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "phi3": ("Phi3", {"sliding_window": None}),
    "olmo": ("Olmo", {}),
    "olmo2": ("Olmo2", {}),
    "gemma3": (
        "Gemma3",
        {"head_dim": 8, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gpt_oss": (
        "GptOss",
        {
            "head_dim": 8,
            "sliding_window": 6,
            "layer_types": ["full_attention", "sliding_attention"],
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
        },
    ),
}
ARCHITECTURES = tuple(_ARCHITECTURES)
MEMORIES = ahn.memory.names()
RECURRENT = ahn.memory.recurrent()
EVERYTHING = MEMORIES + ahn.memory.baselines()
RULED = tuple(name for name in RECURRENT if ahn.memory.get(name)(8, 2, 4).step_rule() is not None)
"""Memories that our kernels know, whose steps are captured, and that `ahn.inspect` looks into."""


def base(architecture: str = "qwen3", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model without an AHN: float32, CPU, evaluation mode."""
    name, extra = _ARCHITECTURES[architecture]
    config_class = getattr(transformers, f"{name}TextConfig", None) or getattr(transformers, f"{name}Config")
    torch.manual_seed(seed)
    return getattr(transformers, f"{name}ForCausalLM")(config_class(**_SHAPE | extra | changes)).eval()


def adapted(architecture: str = "qwen3", seed: int = 0, **config: Any) -> PreTrainedModel:
    """A model with an AHN whose every part is at work: no parameter is at the value of a new one."""
    few = FEW if config.get("memory") == "retained" else {}
    if config.get("quantized"):  # whose tokens are codes, and so are those that are retained
        few = few | {"key_bits": 4, "value_bits": 2}
    return awaken(ahn.attach(base(architecture, seed), ahn.AHNConfig(**few | config)))


@torch.no_grad()
def awaken(model: PreTrainedModel) -> PreTrainedModel:
    """Move an untrained AHN away from its initial values; a new one's reads are zero."""
    for name, parameter in ahn.adapter_parameters(model).items():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
        elif not name.endswith(("A_log", "dt_bias")):
            parameter += 0.3 * torch.randn_like(parameter)
    return model


@torch.no_grad()
def give_bases(model: PreTrainedModel) -> None:
    """Calibrated keys: directions that are not orthogonal, and of different weight.

    Condition numbers are about 9. How much a step's rounding is enlarged grows with them faster than in proportion.
    """
    generator = torch.Generator().manual_seed(5)
    for layer in model.model.layers:
        basis = layer.ahn.fn.key_basis
        for x in basis.parameters():
            x.copy_(torch.randn(x.shape, generator=generator))
        P = basis.weight.shape[-1]
        basis.weight.copy_(2 / P**0.5 * basis.weight + 3 * torch.eye(P))
        basis.deviations.copy_(basis.deviations.abs().add(0.1).sort(descending=True).values)


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    """Token ids (B, L); none is the padding id."""
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def positions(mask: Tensor) -> Tensor:
    """Position ids of a left-padded batch with mask (B, L), as `generate` makes them."""
    return (mask.cumsum(1) - 1).clamp_min(0)


def read(model: PreTrainedModel, ids: Tensor, counts: list[int], mask: Tensor | None = None) -> tuple[Tensor, Any]:
    """Logits (B, L, V) of a text that is read in parts of so many tokens, and the cache after it."""
    cache, done, logits = ahn.AHNCache.for_model(model), 0, []
    for count in counts:
        own = {} if mask is None else {"attention_mask": mask[:, : done + count]}
        if mask is not None:
            own["position_ids"] = positions(mask)[:, done : done + count]
        logits.append(model(ids[:, done : done + count], past_key_values=cache, use_cache=True, **own).logits)
        done += count
    return torch.cat(logits, dim=1), cache
