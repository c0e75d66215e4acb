"""Configurations of the models that are measured most: their shapes are all that speed depends on."""

from typing import Any

from ahn.errors import AHNError

_QWEN2 = {"model_type": "qwen2", "vocab_size": 151936, "rms_norm_eps": 1e-6, "tie_word_embeddings": True}
_QWEN3 = _QWEN2 | {"model_type": "qwen3", "head_dim": 128}


def _layers(count: int, hidden: int, heads: int, kv_heads: int, mlp: int) -> dict[str, Any]:
    return {
        "num_hidden_layers": count,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp,
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }


_UNTIED = {"vocab_size": 152064, "tie_word_embeddings": False}

SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-3b": _QWEN2 | _layers(36, 2048, 16, 2, 11008),
    "qwen2.5-7b": _QWEN2 | _layers(28, 3584, 28, 4, 18944) | _UNTIED,
    "qwen2.5-14b": _QWEN2 | _layers(48, 5120, 40, 8, 13824) | _UNTIED,
    "smollm2-135m": _layers(30, 576, 9, 3, 1536)
    | {"model_type": "llama", "vocab_size": 49152, "tie_word_embeddings": True, "max_position_embeddings": 8192},
    "qwen3-4b": _QWEN3 | _layers(36, 2560, 32, 8, 9728),
}
"""The published configurations by name, as far as the shape is concerned (Hugging Face, Qwen2.5, Qwen3 and SmolLM2)."""


def configuration(name: str) -> Any:
    """The `transformers` configuration of a name in `SHAPES`."""
    from transformers import AutoConfig

    if name not in SHAPES:
        raise AHNError(f"Unknown shape {name!r}; there are {', '.join(SHAPES)}.")
    fields = dict(SHAPES[name])
    return AutoConfig.for_model(fields.pop("model_type"), **fields)
