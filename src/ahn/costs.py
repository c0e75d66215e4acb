"""What a model costs with and without its memory: parameters, cache, FLOPs (arXiv 2510.07318, Table 1).

Everything follows from configurations alone: no weights are needed, and nothing is computed on a device. torch is
imported when a memory is asked for its sizes, so that `ahn.cost`, the function, can be imported with the package.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ahn.config import AHNConfig
from ahn.errors import AHNError, first_line
from ahn.shape import ModelShape, text_config

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

BFLOAT16_BYTES = 2


@dataclasses.dataclass(frozen=True)
class Usage:
    """What one sequence of a given length costs, over all layers.

    Numbers and bytes of the cache differ in two ways. The paper counts numbers: keys, values and states alike. Bytes
    are what `AHNCache` occupies: keys, values and the write gates of the kept tokens in the model's dtype, states in
    float32. The gates wait there until their token leaves (the paper leaves them out). Keys and values of quantized
    tokens are numbers like others; their bytes are codes, scales and offsets (all of them from the first token on that
    leaves the window).

    A FLOP is a multiplication or an addition. As in the paper only matrix products count (norms, RoPE, softmax and
    element-wise gates do not), and a causal product of L queries with L keys counts half of the square.
    """

    kv_numbers: int
    state_numbers: int
    kv_bytes: int
    state_bytes: int
    gate_bytes: int
    mixer_flops: int
    """Attention with its projections, plus the memory."""
    model_flops: int
    """Mixer, MLP, and the vocabulary's two matrices, as the paper counts them."""
    quantized_numbers: int = 0
    quantized_bytes: int = 0

    @property
    def cache_numbers(self) -> int:
        """The paper's measure of the cache: keys, values and states."""
        return self.kv_numbers + self.quantized_numbers + self.state_numbers

    @property
    def cache_bytes(self) -> int:
        """What the cache occupies."""
        return self.kv_bytes + self.quantized_bytes + self.state_bytes + self.gate_bytes


@dataclasses.dataclass(frozen=True)
class Cost:
    """One prompt of `length` tokens, read by the model as it is (`full`) and with its memory (`ahn`)."""

    length: int
    parameters: int
    """Parameters of the memory, over all layers."""
    full: Usage
    ahn: Usage

    @property
    def cache_ratio(self) -> float:
        """Cache of the AHN as a share of full attention's, counted in numbers as in the paper."""
        return self.ahn.cache_numbers / self.full.cache_numbers

    @property
    def bytes_ratio(self) -> float:
        """Cache of the AHN as a share of full attention's, in bytes."""
        return self.ahn.cache_bytes / self.full.cache_bytes

    @property
    def mixer_ratio(self) -> float:
        """FLOPs of the token mixers as a share of full attention's."""
        return self.ahn.mixer_flops / self.full.mixer_flops

    @property
    def model_ratio(self) -> float:
        """FLOPs of the whole model as a share of full attention's."""
        return self.ahn.model_flops / self.full.model_flops


def count_parameters(hf_config: Any, ahn_config: AHNConfig) -> int:
    """Number of parameters that the memory adds to a model: what training trains and an adapter file holds.

    Args:
        hf_config: configuration of any `transformers` decoder.
        ahn_config: which memory, on which layers, with which options.

    Raises:
        AHNError: the model has no layer for a memory, or its configuration lacks a size.
    """
    AHNConfig.check(ahn_config)
    shape = ModelShape.from_config(hf_config)
    return sum(sizes.parameters for sizes in _all_sizes(shape, ahn_config))


def count_model_parameters(hf_config: Any) -> int:
    """Number of parameters of the base model itself; tied embeddings count once.

    Raises:
        AHNError: `transformers` has no causal language model for this configuration.
    """
    return sum(parameter.numel() for parameter in empty_model(hf_config).parameters())


def empty_model(hf_config: Any) -> PreTrainedModel:
    """The base model without weights, on torch's meta device.

    Raises:
        AHNError: `transformers` has no causal language model for this configuration, or cannot make it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    text = text_config(hf_config)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(text)
    except ValueError:
        raise AHNError(f"transformers has no causal language model for {type(text).__name__}.") from None
    except Exception as error:  # a value that nothing has validated
        raise AHNError(f"transformers cannot make a model of {type(text).__name__}: {first_line(error)}.") from error


def cost(hf_config: Any, ahn_config: AHNConfig, length: int, dtype: torch.dtype | None = None) -> Cost:
    """Cache and FLOPs of reading one prompt of L = `length` tokens, with full attention and with the memory.

    With D, Hq, Hkv, P of the model, W = sinks + window, a layer costs (paper, Table 1):

    - full: cache `2·L·P·Hkv` numbers; mixer `4·L·D·P·(Hq+Hkv) + 2·P·Hq·L²` FLOPs;
    - AHN, for L > W: cache `2·W·P·Hkv + states`; mixer
      `4·L·D·P·(Hq+Hkv) + 2·P·Hq·W² + 2·(L-W)·(2·W·P·Hq + states + matrices)`,

    with one multiplication and one addition for every number of the state and every weight of the memory's matrices
    (gate projections, `o_proj`, `q_proj`) per token. For Gated DeltaNet that is the paper's `P²·Hq + 3·D·Hq + P²·Hq`.
    The baselines have no matrices; slots that attention sees besides the window count as keys and values (all of them
    from the first evicted token on). Pooled ones are held in float32 (the one that is being filled is left out),
    retained tokens in the model's dtype, with a score and a position.
    With C quantized tokens each of the last L - W queries attends to up to C more keys, and the memory begins to be
    written C tokens later. The rotations of encoding and decoding are left out.
    Up to W tokens nothing is written and both columns are equal (but for the waiting gates in `gate_bytes`).
    Layers without a memory cost the same in both columns: full attention, or sliding attention with its own window.

    `model_flops` adds the MLP (three matrices, experts that a token visits) and `2·(2·L·D·V)` for the vocabulary.

    Args:
        hf_config: configuration of any `transformers` decoder with standard attention.
        ahn_config: memory, window, sinks and options.
        length: tokens of the prompt.
        dtype: of the cached keys and values, None for bfloat16; only bytes depend on it.

    Raises:
        AHNError: the length is not positive, or the model has layers that are neither full nor sliding attention.
    """
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise AHNError(f"The length must be an integer ≥ 1, got {length!r}.")
    AHNConfig.check(ahn_config)
    shape = ModelShape.from_config(hf_config)
    text = text_config(hf_config)
    width = BFLOAT16_BYTES if dtype is None else dtype.itemsize
    sizes = _all_sizes(shape, ahn_config, width)
    with_memory = shape.memory_layers(ahn_config.full_attention_layers)
    rest = [_base_layer(shape, text, i, length, width) for i in range(shape.layers) if i not in with_memory]
    before = [_base_layer(shape, text, i, length, width) for i in with_memory]
    after = [_memory_layer(shape, own, ahn_config, length, width) for own in sizes]
    outside = _flops_outside_mixer(shape, text, length)
    return Cost(
        length=length,
        parameters=sum(own.parameters for own in sizes),
        full=_total(rest + before, outside),
        ahn=_total(rest + after, outside),
    )


@dataclasses.dataclass(frozen=True)
class _MemorySizes:
    """One layer's memory: counts of numbers, and the bytes of one sequence's state."""

    parameters: int
    matrices: int
    slots: int
    slot_heads: int
    """Key heads that have so many slots each."""
    slot_bytes: int
    """Of all of them."""
    state_numbers: int
    read_numbers: int
    """Numbers of states that all query heads read for one token."""
    state_bytes: int
    gate_numbers: int
    """Of one token."""


def _all_sizes(shape: ModelShape, ahn_config: AHNConfig, width: int = BFLOAT16_BYTES) -> list[_MemorySizes]:
    """Of each layer that has a memory."""
    layers = shape.memory_layers(ahn_config.full_attention_layers)
    ahn_config.check_layers(layers)
    if ahn_config.slot_heads is None and ahn_config.score_layer is None:  # parameters differ by layer too
        return [_memory_sizes(shape, ahn_config, layers[0], width)] * len(layers)
    return [_memory_sizes(shape, ahn_config, layer, width) for layer in layers]


@lru_cache(maxsize=256)
def _memory_sizes(shape: ModelShape, ahn_config: AHNConfig, layer: int, width: int) -> _MemorySizes:
    import torch

    from ahn import memory

    # Asking the module itself, on the meta device, keeps this right for every memory there will be.
    meta = torch.device("meta")
    with meta, torch.no_grad():
        module = memory.make(ahn_config, shape, layer)
        states = list(module.init_state(1, meta).values())
        gates = list(module.write_gates(torch.empty(1, 1, shape.hidden_size)).values())
    parameters = list(module.parameters())
    of_codes = [] if module.key_basis is None else list(module.key_basis.parameters())
    routed = ahn_config.router and isinstance(module, memory.RecurrentMemory)
    return _MemorySizes(
        parameters=sum(p.numel() for p in parameters) + (2 * shape.heads if routed else 0),
        matrices=sum(p.numel() for p in parameters if p.dim() > 1) - sum(p.numel() for p in of_codes),
        slots=module.slot_count(ahn_config.window + ahn_config.quantized),
        slot_heads=len(module.slot_heads),
        slot_bytes=module.slot_bytes(ahn_config.window + ahn_config.quantized, width),
        state_numbers=sum(s.numel() for s in states),
        read_numbers=sum(s.numel() for s in states) * (shape.heads // module.write_heads),
        state_bytes=sum(s.nbytes for s in states),
        gate_numbers=sum(g.numel() for g in gates),
    )


def _attention(shape: ModelShape, length: int, kept: int, width: int) -> Usage:
    """A layer whose L queries each see at most the last `kept` tokens; a cached number takes `width` bytes."""
    D, P, Hq, Hkv = shape.hidden_size, shape.head_dim, shape.heads, shape.kv_heads
    kept = min(length, kept)
    numbers = 2 * kept * P * Hkv
    projections = 4 * length * D * P * (Hq + Hkv)
    attended = 2 * P * Hq * kept**2 + 4 * (length - kept) * kept * P * Hq
    return Usage(numbers, 0, numbers * width, 0, 0, projections + attended, 0)


def _base_layer(shape: ModelShape, text: Any, layer: int, length: int, width: int) -> Usage:
    kind = shape.layer_types[layer]
    if kind == "full_attention":
        return _attention(shape, length, length, width)
    if kind == "sliding_attention":
        return _attention(shape, length, text.sliding_window, width)
    raise AHNError(f"Layer {layer} is of the kind {kind}; its cost is not known, only full and sliding attention are.")


def _memory_layer(shape: ModelShape, sizes: _MemorySizes, ahn_config: AHNConfig, length: int, width: int) -> Usage:
    exact = _with_tier(_attention(shape, length, ahn_config.lossless, width), shape, ahn_config, length)
    waiting = min(length, ahn_config.lossless) + (ahn_config.quantized if length > ahn_config.lossless else 0)
    exact = dataclasses.replace(exact, gate_bytes=waiting * sizes.gate_numbers * width)
    written = max(0, length - ahn_config.lossless - ahn_config.quantized)
    if written == 0:
        return exact
    P, groups = shape.head_dim, shape.heads // shape.kv_heads
    slot_numbers = 2 * sizes.slots * P * sizes.slot_heads
    slot_flops = 4 * sizes.slots * P * sizes.slot_heads * groups
    return dataclasses.replace(
        exact,
        state_numbers=sizes.state_numbers + slot_numbers,
        state_bytes=sizes.state_bytes + sizes.slot_bytes,
        mixer_flops=exact.mixer_flops + written * (2 * (sizes.read_numbers + sizes.matrices) + slot_flops),
    )


def _with_tier(exact: Usage, shape: ModelShape, ahn_config: AHNConfig, length: int) -> Usage:
    """With the quantized tokens that are seen besides the exact ones."""
    left, capacity = length - ahn_config.lossless, ahn_config.quantized
    if capacity == 0 or left <= 0:
        return exact
    from ahn.cache.tier import nbytes

    held = min(left, capacity)
    attended = held**2 / 2 + (left - held) * held  # keys, over all queries: the tier fills and stays full
    return dataclasses.replace(
        exact,
        mixer_flops=exact.mixer_flops + round(4 * attended * shape.head_dim * shape.heads),
        quantized_numbers=2 * held * shape.head_dim * shape.kv_heads,
        quantized_bytes=nbytes(capacity, shape.kv_heads, shape.head_dim, ahn_config.tier_bits),
    )


def _flops_outside_mixer(shape: ModelShape, text: Any, length: int) -> int:
    mlp = 6 * length * shape.hidden_size * _mlp_width(shape, text)
    # The paper counts the embedding as a product too: one V x D matrix in, one out.
    vocabulary = 2 * (2 * length * shape.hidden_size * shape.vocab_size)
    return shape.layers * mlp + vocabulary


def _mlp_width(shape: ModelShape, text: Any) -> int:
    """Hidden units of the MLP that one token passes: the dense width, or that of the experts it visits."""
    visited = getattr(text, "num_experts_per_tok", None)
    if not visited:
        return shape.intermediate_size
    expert = getattr(text, "moe_intermediate_size", None) or shape.intermediate_size
    return visited * expert + (getattr(text, "shared_expert_intermediate_size", None) or 0)


def _total(layers: list[Usage], outside: int) -> Usage:
    summed = [sum(column) for column in zip(*(dataclasses.astuple(layer) for layer in layers), strict=True)]
    total = Usage(*summed)
    return dataclasses.replace(total, model_flops=total.mixer_flops + outside)
