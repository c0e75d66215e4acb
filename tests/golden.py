"""Golden cases: six tiny random models and what the published implementation computes for them (`golden/README.md`)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

import ahn
from ahn import memory

Case = dict[str, Any]

FOLDER = Path(__file__).parent / "golden"
CASES: list[Case] = json.loads((FOLDER / "cases.json").read_text())
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


def name(case: Case) -> str:
    return f"{case['family']}-{case['ahn']}"


def expected(case: Case) -> dict[str, Tensor]:
    """The published numbers; of every float tensor the first columns of the last dimension."""
    return load_file(FOLDER / f"{name(case)}.safetensors")


def load_case(case: Case) -> tuple[PreTrainedModel, ahn.AHNConfig, dict[str, Tensor]]:
    """The case's model with its AHN attached (float32, CPU), its AHN configuration and its numbers."""
    config = ahn.AHNConfig(
        memory=memory.by_published_name(case["ahn"]).name,
        window=case["sliding_window"],
        sinks=case["num_attn_sinks"],
    )
    model = base_model(case)
    base, adapter = draw_weights(case)
    missing, unexpected = model.load_state_dict(base, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    ahn.attach(model, config)
    missing, unexpected = model.load_state_dict(adapter, strict=False)
    assert not unexpected and not any("ahn" in name for name in missing)
    return model, config, expected(case)


def base_model(case: Case) -> PreTrainedModel:
    """A randomly initialised model in the case's shape."""
    config_class, model_class = FAMILIES[case["family"]]
    sizes = {name: case[name] for name in CONFIG_KEYS}
    if case["family"] == "qwen3":
        sizes["head_dim"] = case["head_dim"]
    rope = {"rope_type": "default", "rope_theta": case["rope_theta"]}
    config = config_class(**sizes, rope_parameters=rope, max_position_embeddings=4096)
    return model_class(config).eval()


# -- weights: drawn as they were for the published implementation, so that they need not be stored ---------------------

ATTENTION = {
    "qwen2": [f"{p}_proj.{kind}" for p in "qkv" for kind in ("weight", "bias")] + ["o_proj.weight"],
    "qwen3": [*(f"{p}_proj.weight" for p in "qkvo"), "q_norm.weight", "k_norm.weight"],
}
MEMORY = {
    "DeltaNet": ["b_proj.weight", "g_proj.weight", "o_norm.weight", "o_proj.weight"],
    "GatedDeltaNet": [
        *("A_log", "D", "dt_bias", "b_proj.weight", "a_proj.weight", "g_proj.weight", "o_norm.weight", "o_proj.weight")
    ],
    "Mamba2": [
        *("dt_bias", "A_log", "norm.weight", "dt_proj.weight", "dt_proj.bias", "g_proj.weight", "g_proj.bias"),
        "o_proj.weight",
    ],
}
REST = [*(f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")), "input_layernorm.weight"]


def draw_weights(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights of the base (embeddings tied) and of the AHN, float32, in transformers' and in published names.

    One generator, seeded with `seed + 1`, draws all tensors in the order in which the published model registers them.
    """
    generator = torch.Generator().manual_seed(case["seed"] + 1)
    drawn = {key: _draw(key, shape, generator) for key, shape in _shapes(case)}
    sums = torch.tensor([float(x.double().sum()) for x in drawn.values()])
    published = torch.tensor(case["sums"])
    assert torch.allclose(sums, published, atol=1e-2), "this torch draws other numbers from the cases' seeds"
    adapter = {key: x for key, x in drawn.items() if ".ahn." in key}
    return {key: x for key, x in drawn.items() if key not in adapter}, adapter


def _shapes(case: Case) -> Iterator[tuple[str, tuple[int, ...]]]:
    D, P, V, F = case["hidden_size"], case["head_dim"], case["vocab_size"], case["intermediate_size"]
    H, Hkv = case["num_attention_heads"], case["num_key_value_heads"]
    rows = {"q_proj": H * P, "k_proj": Hkv * P, "v_proj": Hkv * P, "gate_proj": F, "up_proj": F}
    shapes: dict[str, tuple[int, ...]] = {f"{key}.weight": (size, D) for key, size in rows.items()}
    shapes |= {f"{key}.bias": (size,) for key, size in rows.items()}
    shapes |= {"o_proj.weight": (D, H * P), "down_proj.weight": (D, F), "q_norm.weight": (P,), "k_norm.weight": (P,)}
    heads = {f"{key}.weight": (H, D) for key in ("b_proj", "a_proj", "g_proj", "dt_proj")}
    heads |= {"o_proj.weight": (H, P, P), "o_norm.weight": (P,), "norm.weight": (H * P,)}
    yield "model.embed_tokens.weight", (V, D)
    for i in range(case["num_hidden_layers"]):
        for key in ATTENTION[case["family"]]:
            yield f"model.layers.{i}.self_attn.{key}", shapes[key]
        for key in MEMORY[case["ahn"]]:
            yield f"model.layers.{i}.ahn.fn.{key}", heads.get(key, (H,))
        for key in REST:
            yield f"model.layers.{i}.{key}", shapes.get(key.removeprefix("mlp."), (D,))
        yield f"model.layers.{i}.post_attention_layernorm.weight", (D,)
    yield "model.norm.weight", (D,)


def _draw(key: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """One tensor, of the spread that makes its layer work: no gate is stuck and no logit is flat."""
    leaf = key.rsplit(".", 1)[-1]
    if leaf == "A_log":
        return (torch.rand(shape, generator=generator) * 2 + 0.02).log()
    x = torch.randn(shape, generator=generator)
    if leaf in ("dt_bias", "D"):
        return x * 0.5 - 1
    if "norm" in key:
        return 1 + (0.2 if ".ahn." in key else 0.1) * x
    if ".ahn." in key:
        return x * (0.6 * shape[-1] ** -0.5) if "o_proj" in key else x * 0.3
    return x * 0.3 if leaf == "bias" else x * shape[-1] ** -0.5


# -- comparing ---------------------------------------------------------------------------------------------------------


def golden_error(actual: Tensor, published: Tensor) -> float:
    """`relative_error` of the columns that the golden file keeps."""
    return relative_error(actual[..., : published.shape[-1]], published)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual - expected‖ / ‖expected‖ in float64; NaN if either has one."""
    actual, expected = actual.double(), expected.double()
    return float(torch.linalg.vector_norm(actual - expected) / torch.linalg.vector_norm(expected).clamp_min(1e-30))
