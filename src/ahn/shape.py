"""`ModelShape`: the few numbers of a transformers configuration that an AHN depends on."""

import dataclasses
from typing import Any, Self

from ahn.errors import AHNError

EXACT = 16
"""In place of the bits per number of a code: numbers are kept as the model has them."""
DEFAULT_SLOTS = 4096
"""Tokens per layer and key head that a memory of tokens holds (`AHNConfig.slots`)."""

WHOLE_TEXT = ("full_attention", "hybrid")
"""Kinds of layers whose attention sees the whole text; "hybrid" ones have a recurrent mixer beside it (Falcon-H1)."""


def text_config(config: Any) -> Any:
    """The part of a `transformers` configuration that is about text; all of it, if it is about nothing else."""
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def trained_length(config: Any) -> int | None:
    """The number of positions that a base was trained on, or that its RoPE scaling stretches it to; None if unsaid.

    Args:
        config: a `transformers` configuration.
    """
    text = text_config(config)
    positions = getattr(text, "max_position_embeddings", None)
    if not isinstance(positions, int):
        return None
    rope = getattr(text, "rope_parameters", None) or {}
    original, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
    stretched = int(original * factor) if isinstance(original, int) and isinstance(factor, int | float) else 0
    return max(positions, stretched)


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder: D `hidden_size`, Hq `heads`, Hkv `kv_heads`, P `head_dim`, `layer_types` per layer.

    Only layers of a kind in `WHOLE_TEXT` can get a memory.
    """

    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    layer_types: tuple[str, ...]

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """Read a `transformers` configuration (or its text part, for multimodal models).

        Raises:
            AHNError: a size is missing, or heads cannot share key/value heads evenly.
        """
        text = text_config(config)
        sizes = _of_full_layers(text)
        needed = ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
        missing = [name for name in needed if not isinstance(getattr(sizes, name, None), int)]
        for name in set(needed).difference(missing):
            if not 0 < getattr(sizes, name) < 2**31:
                raise AHNError(
                    f"The configuration {type(text).__name__} cannot have {name} {getattr(sizes, name):.3g}."
                )
        if missing:
            raise AHNError(
                f"The configuration {type(text).__name__} has no {', '.join(missing)}; an AHN needs a decoder with "
                "standard attention."
            )
        heads = sizes.num_attention_heads
        kv_heads = getattr(sizes, "num_key_value_heads", None) or heads
        if heads % kv_heads:
            raise AHNError(f"{heads} query heads cannot share {kv_heads} key/value heads evenly.")
        types = getattr(text, "layer_types", None)
        if types is None:
            everywhere = "sliding_attention" if getattr(text, "sliding_window", None) else "full_attention"
            types = [everywhere] * text.num_hidden_layers
        return cls(
            hidden_size=text.hidden_size,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=getattr(sizes, "head_dim", None) or text.hidden_size // heads,
            intermediate_size=getattr(sizes, "intermediate_size", None) or 4 * text.hidden_size,
            vocab_size=text.vocab_size,
            layer_types=tuple(types),
        )

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layer_types)

    def memory_layers(self, full_attention_layers: tuple[int, ...] = ()) -> tuple[int, ...]:
        """Indices of the layers that get a memory: full-attention layers that are not asked to stay so.

        Raises:
            AHNError: an index is beyond the last layer, or no layer is left.
        """
        beyond = [i for i in full_attention_layers if i >= self.layers]
        if beyond:
            raise AHNError(
                f"full_attention_layers names layer {beyond[0]}, but the model has layers 0 to {self.layers - 1}."
            )
        chosen = tuple(
            i for i, kind in enumerate(self.layer_types) if kind in WHOLE_TEXT and i not in full_attention_layers
        )
        if not chosen:
            raise AHNError(
                "No layer is left for a memory: every layer uses "
                f"{', '.join(sorted(set(self.layer_types)))} or is listed in full_attention_layers."
            )
        return chosen


def _of_full_layers(text: Any) -> Any:
    """A configuration with the sizes of the layers that can get a memory: in some models layers differ."""
    if not getattr(text, "is_heterogeneous", False):
        return text
    return text.per_layer_config[next((i for i, kind in enumerate(text.layer_types) if kind in WHOLE_TEXT), 0)]
