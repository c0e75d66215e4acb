"""Loading of golden cases: tiny random models with what the published implementation computes for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

import ahn
from ahn import memory

OWN = Path(__file__).parent / "golden"
PUBLISHED = Path(__file__).parents[2] / "shared" / "golden"
CONFIG_KEYS = (
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_hidden_layers",
    "vocab_size",
    "intermediate_size",
    "rms_norm_eps",
    "tie_word_embeddings",
)
FAMILIES = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}


def cases() -> list[Path]:
    """Folders of all cases on this machine: ours, and the published ones where they are."""
    return sorted(path.parent for root in (OWN, PUBLISHED) for path in root.glob("*/case.json"))


def load_case(folder: Path) -> tuple[PreTrainedModel, ahn.AHNConfig, dict[str, Any], dict[str, Tensor]]:
    """The case's model with its AHN attached (float32, CPU), its AHN configuration, its description and its numbers."""
    case = json.loads((folder / "case.json").read_text())
    config = ahn.AHNConfig(
        memory=memory.by_published_name(case["ahn"]).name,
        window=case["sliding_window"],
        sinks=case["num_attn_sinks"],
    )
    model = base_model(case)
    weights = load_file(folder / "base.safetensors")
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    ahn.attach(model, config)
    missing, unexpected = model.load_state_dict(load_file(folder / "ahn.safetensors"), strict=False)
    assert not unexpected and not any("ahn" in name for name in missing)
    return model, config, case, load_file(folder / "expected.safetensors")


def base_model(case: dict[str, Any]) -> PreTrainedModel:
    """A randomly initialised model in the case's shape."""
    config_class, model_class = FAMILIES[case["family"]]
    sizes = {name: case[name] for name in CONFIG_KEYS}
    if case["family"] == "qwen3":
        sizes["head_dim"] = case["head_dim"]
    rope = {"rope_type": "default", "rope_theta": case["rope_theta"]}
    config = config_class(**sizes, rope_parameters=rope, max_position_embeddings=4096)
    return model_class(config).eval()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual - expected‖ / ‖expected‖ in float64; NaN if either has one."""
    actual, expected = actual.double(), expected.double()
    return float(torch.linalg.vector_norm(actual - expected) / torch.linalg.vector_norm(expected).clamp_min(1e-30))
