"""Every causal class of transformers as a tiny model, and what becomes of it with an AHN."""

from __future__ import annotations

import copy
import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from golden import relative_error
from models import VOCABULARY, awaken, positions, tokens
from torch import Tensor
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import ahn
from ahn.model.support import counts_anew
from ahn.wrappers import attention_name, decoder_of

TOLERANCE = 1e-4  # float32 in another order of operations, through a few layers with sharp attention
TYPES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
"""Model types that transformers has a causal class for."""
_LENGTH = 34
_LIMIT = 20_000_000
"""Parameters up to which a model is built."""
_SIZES: dict[str, Any] = {
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "embed_dim": 32,
    "intermediate_size": 48, "ffn_dim": 48, "d_ff": 48, "n_inner": 48, "shared_intermediate_size": 16,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16,
    "expert_intermediate_size": 16, "intermediate_size_mlp": 48, "moe_ffn_hidden_size": 16, "ffn_hidden_size": 48,
    "num_hidden_layers": 2, "n_layer": 2, "num_layers": 2, "n_layers": 2, "encoder_layers": 2, "decoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "num_heads": 4, "n_heads": 4, "num_key_value_heads": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48,
    "head_dim": 16, "attention_head_dim": 16, "global_head_dim": 16, "num_global_key_value_heads": 2,
    "vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8,
    "max_position_embeddings": 4096, "initializer_range": 0.2, "init_std": 0.2,
    "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "n_shared_experts": 1,
    "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_k": 2, "moe_topk": 2, "top_k_experts": 2, "moe_top_k": 2,
    "n_group": 1, "topk_group": 1, "num_expert_group": 1,
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64, "mamba_n_groups": 1, "mamba_d_state": 8,
    "mamba_d_conv": 4, "mamba_expand": 2,
    "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1, "ssm_state_size": 8, "state_size": 4,
    "mamba_dt_rank": 4, "n_mamba_heads": 2, "attention_hidden_size": 64, "mamba_chunk_size": 8, "chunk_size": 8,
    "sliding_window": 6, "attention_window_size": 6, "attention_chunk_size": 8192, "lru_width": 32, "block_size": 32,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "tie_word_embeddings": False,
    "first_k_dense_replace": 1, "attn_layer_offset": 1, "attn_layer_period": 2, "rotary_dim": 8,
    "num_kv_shared_layers": 0, "laurel_rank": 4, "altup_num_inputs": 2, "activation_sparsity_pattern": 0.0,
    "router_dim": 8, "compress_ratio": 2, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 4096,
}  # fmt: skip
_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
_MIXED = ["sliding_attention", "full_attention"]
_SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 1}
_OF_TYPE: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "rope_parameters": {name: _ROPE["rope_parameters"] for name in ("full_attention", "sliding_attention")}
    },
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        "patcher_config": _SMALL | {"num_key_value_heads": 4, "head_dim": 8},
        "encoder_config": _SMALL | {"num_key_value_heads": 4, "hidden_size_global": 32},
        "decoder_config": _SMALL | {"num_key_value_heads": 4, "head_dim": 8, "hidden_size_global": 32},
        "global_config": _SMALL | {"num_key_value_heads": 4, "head_dim": 8},
    },
    "dbrx": {
        "max_seq_len": 4096,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 48, "hidden_size": 32},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 8}
    | {"swa_kv_lora_rank": 8, "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8},
    "gemma3n_text": {"activation_sparsity_pattern": [0.0, 0.0], "layer_types": ["sliding_attention", "full_attention"]},
    "gemma4_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "git": {"vision_config": dict(_SMALL)},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "helium": {"head_dim": 8},
    "hunyuan_v1_dense": _ROPE | {"head_dim": 16},
    "hunyuan_v1_moe": _ROPE | {"head_dim": 16},
    "jamba": {},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "marian": {"decoder_vocab_size": VOCABULARY},
    "ministral": _ROPE | {"head_dim": 16},
    "mllama_text_model": {"cross_attention_layers": [1]},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"time_step_min": 1e-6},  # transformers clamps at it where several tokens come, but not in a step
    "phi4_multimodal": {
        "vision_config": _SMALL | {"image_size": 32, "patch_size": 16, "crop_size": 32},
        "audio_config": _SMALL | {"num_blocks": 1, "ext_pw_out_channel": 32, "nemo_conv_channels": 32},
    },
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention"],
        "ngram_vocab_size_base": 64,
        "split_ngram_parts": 1,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 2,
        "hc_lowrank": 8,
    },
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": (16, 16)},
    "rwkv": {"attention_hidden_size": 32},
    "whisper": {"decoder_attention_heads": 4, "encoder_attention_heads": 4},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}
"""What a type needs besides `_SIZES`; of one with several parts, the text's."""
_WHOLE: dict[str, dict[str, Any]] = {
    "dots3_note": {
        "vision_config": _SMALL | {"mlp_layer_types": ["dense"], "adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 48}
        | {"adapter_out_dim": 32},
    },
}
"""What a type with several parts needs besides those of its text."""
_OF_ASSISTANT = {
    "text_config": _SMALL
    | {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "head_dim": 16}
    | {"num_hidden_layers": 2, "num_kv_shared_layers": 2, "num_key_value_heads": 2, "layer_types": _MIXED}
    | {"global_head_dim": 16, "vocab_size": VOCABULARY},
}
_WHOLE["gemma4_assistant"] = _OF_ASSISTANT
_DEFAULTS = {"gemma4_assistant": _OF_ASSISTANT}
"""Without which a type has no default configuration."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of one architecture: "right", "refused", "not built", or "wrong" with what was."""

    kind: str
    reason: str = ""


def config_of(model_type: str) -> Any:
    """A tiny configuration."""
    kind = CONFIG_MAPPING[model_type]
    default = kind(**_DEFAULTS.get(model_type, {}))
    parts = {name: part for name, part in vars(default).items() if isinstance(part, PreTrainedConfig)}
    text = default.get_text_config(decoder=True)
    if not parts or not any(part is text for part in parts.values()):
        return kind(**_sizes(default))
    whole = _WHOLE.get(model_type, {})
    made = {name: type(part)(**_sizes(part)).to_dict() for name, part in parts.items() if name not in whole}
    return kind(**made | whole)


def _sizes(config: Any) -> dict[str, Any]:
    """Small values of what a configuration has."""
    sizes = {name: size for name, size in _SIZES.items() if _has(config, name) and not _is_computed(config, name)}
    sizes |= {name: _SIZES[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    if "qk_rope_head_dim" in sizes and "head_dim" in sizes:
        sizes["head_dim"] = sizes["qk_rope_head_dim"]
    if "kv_lora_rank" in sizes and "num_key_value_heads" in sizes:  # latent attention has a key for every query head
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    if getattr(config, "is_encoder_decoder", False):  # its decoder alone
        sizes |= {"is_encoder_decoder": False, "is_decoder": True}
    types = getattr(config, "layer_types", None)
    if types and not _is_computed(config, "layer_types"):
        several = list(dict.fromkeys(types))
        sizes |= {"layer_types": several if len(several) > 1 else several * 2}
        sizes["num_hidden_layers"] = len(sizes["layer_types"])
    return sizes | _OF_TYPE.get(config.model_type, {})


def _has(config: Any, name: str) -> bool:
    try:
        return getattr(config, name, None) is not None
    except Exception:  # an attribute that may vary between layers has no one value
        return True


def _is_computed(config: Any, name: str) -> bool:
    return isinstance(getattr(type(config), type(config).attribute_map.get(name, name), None), property)


def build(model_type: str, seed: int = 0) -> PreTrainedModel:
    """A tiny model: float32, CPU, evaluation mode."""
    config = config_of(model_type)
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    kind = kind[0] if isinstance(kind, tuple) else kind
    if isinstance(config.get_text_config(decoder=True), kind.config_class):  # as the Auto classes do
        config = config.get_text_config(decoder=True)
    with torch.device("meta"), _without_sight(kind):
        size = sum(p.numel() for p in kind(copy.deepcopy(config)).parameters())
    if size > _LIMIT:
        raise ValueError(f"{size} parameters")
    torch.manual_seed(seed)
    with _without_sight(kind):
        return kind(config).eval()


def _without_sight(kind: Any) -> Any:
    """For a while, a vision tower that only timm has is left out: no text goes through it."""

    def made(auto: Any, config: Any, **kwargs: Any) -> Any:
        return torch.nn.Identity() if config.model_type == "gemma3n_vision" else from_config(auto, config, **kwargs)

    auto = sys.modules[kind.__module__].__dict__.get("AutoModel", AutoModel)
    from_config = auto.from_config.__func__
    return mock.patch.object(auto, "from_config", classmethod(made))


def in_float64(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, whose fused products of experts do not know such numbers."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model.double()


@torch.no_grad()
def read(model: PreTrainedModel, ids: Tensor, pieces: list[int], cache: Any = None) -> Tensor:
    """Logits of ids (B, L) read in pieces of so many tokens.

    A base that numbers the tokens of every forward from 0 (Bamba) is told positions, as `generate` tells it.
    """
    logits, at = [], 0
    anew = not hasattr(model, "ahn_config") and counts_anew(decoder_of(model))
    for length in pieces:
        told = {"position_ids": torch.arange(at, at + length)[None]} if anew else {}
        output = model(ids[:, at : at + length], past_key_values=cache, use_cache=True, **told)
        cache, at = output.past_key_values, at + length
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


@torch.no_grad()
def judge(model_type: str) -> Verdict:
    """What becomes of a tiny model of this type."""
    try:
        plain = build(model_type)
    except Exception as error:
        return Verdict("not built", f"{type(error).__name__}: {error}".split("\n")[0][:150])
    try:
        model = ahn.attach(build(model_type), ahn.AHNConfig(window=60, sinks=4))
    except ahn.AHNError as error:
        return Verdict("refused", str(error))
    except Exception as error:
        return Verdict("wrong", f"attach: {type(error).__name__}: {error}".split("\n")[0])
    try:
        ids = tokens(2, _LENGTH)
        expected = plain(ids).logits
        wrong = _compare(model, plain, ids, expected)
    except Exception as error:
        return Verdict("wrong", f"{type(error).__name__}: {error}".split("\n")[0])
    return Verdict("wrong", wrong) if wrong else Verdict("right")


def _compare(model: PreTrainedModel, plain: PreTrainedModel, ids: Tensor, expected: Tensor) -> str:
    """What is wrong about a model with a wide window, which is then made narrow; empty if nothing is."""
    if wrong := _windowed(model, plain, ids):
        return wrong
    awaken(model)
    if not torch.equal(model(ids).logits, expected):
        return "another result within the window"
    if not torch.equal(model(ids, use_cache=False).logits, plain(ids, use_cache=False).logits):
        return "another result within the window, without a cache"
    if not torch.equal(read(model, ids, [20, *[1] * 14]), read(plain, ids, [20, *[1] * 14])):
        return "another result within the window, in steps"
    ahn.set_window(model, 9, 2)
    whole = read(model, ids, [_LENGTH])
    if relative_error(whole, expected) < 0.003:
        return "the window changes nothing"
    cache = ahn.AHNCache.for_model(model)
    pieces, steps = [7, 1, 5, 1, 1, 1, 6, 1, 1, 10], [20, *[1] * 14]
    found: dict[str, Tensor] = {
        "without a cache": model(ids, use_cache=False).logits,
        "in steps": read(model, ids, steps),
    }
    try:
        found["in pieces"] = read(model, ids, pieces, cache)
    except ahn.AHNError:  # a refusal is right as well: the base cannot go on in pieces
        read(model, ids, steps, cache := ahn.AHNCache.for_model(model))
    model.ahn_config = model.ahn_config.replace(prefill_chunk_size=5)
    found["in chunks"] = model(ids).logits
    for how, logits in found.items():
        if not relative_error(logits, whole) < TOLERANCE:
            return f"another result {how}: {relative_error(logits, whole):.1e}"
    return (
        _padded(model, plain, ids) or _kept(model, cache, ids) or _learned(model, ids) or _detached(model, plain, ids)
    )


def _windowed(model: PreTrainedModel, plain: PreTrainedModel, ids: Tensor) -> str:
    """With a memory that is still silent: the base whose layers are given an explicit mask of four dimensions."""
    config = model.ahn_config
    ahn.set_window(model, 9, 2)
    query, key = torch.arange(ids.shape[1])[:, None], torch.arange(ids.shape[1])[None]
    visible = (key <= query) & ((key < 2) | (key > query - 9))
    mask = torch.zeros(1, 1, *visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)

    def give(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        assert "attention_mask" in kwargs
        return args, kwargs | {"attention_mask": mask}

    pairs = zip(decoder_of(model).layers, decoder_of(plain).layers, strict=True)
    attentions = [
        getattr(layer, attention_name(layer) or "") for with_memory, layer in pairs if hasattr(with_memory, "ahn")
    ]
    handles = [x.register_forward_pre_hook(give, with_kwargs=True) for x in attentions]
    wanted = plain(ids).logits
    for handle in handles:
        handle.remove()
    error = relative_error(model(ids).logits, wanted)
    model.ahn_config = config
    return f"not the base with a window: {error:.1e}" if error > TOLERANCE else ""


def _padded(model: PreTrainedModel, plain: PreTrainedModel, ids: Tensor) -> str:
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    errors = []
    for each in (plain, model):
        padded = each(ids, attention_mask=mask, position_ids=positions(mask)).logits[0, 6:]
        errors.append(relative_error(padded, each(ids[:1, 6:]).logits[0]))
    return (
        f"a padded row is another: {errors[1]:.1e}, base {errors[0]:.1e}"
        if errors[1] > max(TOLERANCE, 3 * errors[0])
        else ""
    )


def _kept(model: PreTrainedModel, cache: ahn.AHNCache, ids: Tensor) -> str:
    more = tokens(2, 3, seed=1)
    copied = copy.deepcopy(cache)
    with tempfile.TemporaryDirectory() as folder:
        cache.to("cpu").save(Path(folder) / "cache")
        loaded = ahn.AHNCache.load(Path(folder) / "cache", model)
    expected = read(model, more, [1, 1, 1], cache)
    for how, other in (("copied", copied), ("saved", loaded)):
        if relative_error(read(model, more, [1, 1, 1], other), expected) > 1e-6:
            return f"another result from a {how} conversation"
    return ""


def _learned(model: PreTrainedModel, ids: Tensor) -> str:
    with torch.enable_grad():
        model(ids, labels=ids, use_cache=False).loss.backward()
    weights = {name: p for name, p in ahn.adapter_parameters(model).items() if name.endswith("fn.o_proj.weight")}
    silent = [name for name, p in weights.items() if p.grad is None or not bool(p.grad.any())]
    return f"no gradient reaches {silent[0]}" if silent or not weights else ""


def _detached(model: PreTrainedModel, plain: PreTrainedModel, ids: Tensor) -> str:
    with ahn.disabled(model):
        if not torch.equal(model(ids).logits, plain(ids).logits):
            return "another result with the AHN disabled"
    ahn.detach(model)
    if model.state_dict().keys() != plain.state_dict().keys() or not torch.equal(model(ids).logits, plain(ids).logits):
        return "another model after detach"
    return ""


def row(model_type: str, verdict: Verdict) -> str:
    """Of the table in docs/compatibility.md."""
    reason = verdict.reason.replace("|", "/")
    return f"| `{model_type}` | {verdict.kind} | {reason if verdict.kind == 'refused' else ''} |"


if __name__ == "__main__":
    print(*(row(name, judge(name)) for name in TYPES), sep="\n")
