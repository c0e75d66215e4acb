"""`AHNConfig`: everything that defines an Artificial Hippocampus Network apart from its weights."""

from __future__ import annotations

import dataclasses
import reprlib
import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypedDict

from ahn.errors import AHNError
from ahn.layout.anchors import anchor_step
from ahn.shape import DEFAULT_SLOTS, EXACT

DEFAULT_WINDOW = 32640
DEFAULT_SINKS = 128
MIN_DISTANCE = 16
"""The least `max_distance`, below which nothing could move in steps."""
LIMIT = 1 << 40
"""More tokens than this no conversation, window or tier has; sums and products of them stay within 64 bits."""
MODEL_TYPE = "ahn"
"""The model type of a merged checkpoint in its `config.json`, so that nobody loads it without its memory."""
ARCHITECTURE = "AHNForCausalLM"
SAVED_BLOCK, PUBLISHED_NAME = "ahn", "_ahn_implementation"
"""By which of its fields a `config.json` is one of a model with a memory: ours has both, a published one the second."""
OF_MEMORY = ("memory", "router", "q_proj", "full_attention_layers", "calibrated_keys")
"""Fields without which what a layer keeps means something else."""
BITS = (2, 3, 4)
"""Per number of a token's keys or values in codes."""
BEFORE = {"max_distance": 0, "key_bits": 2, "value_bits": 2, "keys_before_rope": False, "calibrated_keys": False}
"""What files mean that do not say it: they are older than these settings, and were trained and measured so."""
OF_KEPT_TOKENS: dict[str, Any] = {"slots": DEFAULT_SLOTS, "slot_heads": None, "passage": 1, "score_layer": None}
"""Fields that only memories which keep tokens have a use for, and their values with others."""
DTYPES = ("float32", "bfloat16", "float16")
"""Dtypes in which a model can be loaded to be used."""


class Reach(TypedDict, total=False):
    """What is seen besides the memory, in place of what a file or a configuration says; None chooses nothing."""

    window: int | None
    sinks: int | None
    quantized: int | None
    max_distance: int | None


@dataclasses.dataclass(frozen=True)
class AHNConfig:
    """How a frozen decoder attends and remembers (arXiv 2510.07318, section 3).

    A query at position t attends exactly to the first `sinks` tokens and to the last `window` tokens, itself
    included. Every other token is written into the memory of its layer when it leaves the window, or, with `quantized`,
    that many tokens later: until then queries see what a few bits per number keep of it (`ahn.cache.tier`).

    Args:
        memory: one of `ahn.memory.names()`, or of `ahn.memory.baselines()` to compare with.
        window: number of most recent tokens kept exactly (W ≥ 1).
        sinks: number of first tokens kept exactly (S ≥ 0). `window + sinks` is the lossless total.
        full_attention_layers: indices of layers that keep full attention and get no memory.
        router: learn, per head, how much the memory's read counts as more tokens are written. Memories that are not
            recurrent have no read of their own, and neither this nor `q_proj`.
        q_proj: learn, per head, a projection of the query that reads the memory.
        prefill_chunk_size: tokens processed at once when a prompt is longer than the lossless total. A trade of
            speed against peak memory; the result is the same to float tolerance.
        quantized: number of tokens before the window that are still seen, at a few bits per number (C ≥ 0). For
            inference with any memory, trained without it.
        key_bits: bits per number of the keys of quantized and of retained tokens, 2, 3 or 4. A token takes, per layer
            and key head, `(key_bits + value_bits) · P / 8 + 4` bytes: with 4 and 2 bits a fifth of what it takes in a
            bfloat16 window (head dimension P of 64), with 2 and 2 a seventh.
        value_bits: likewise of their values. Retained tokens can be kept exactly: 16.
        keys_before_rope: keep the keys of quantized tokens as they are before RoPE, and turn them when they are seen:
            at their own distance as far as the base model looks well, and there all that are farther (`tier_reach`).
            `attach` sets it to False where the base's RoPE cannot be turned back.
        calibrated_keys: code the keys of quantized tokens in a basis that was calibrated on texts and lies in the
            adapter (`ahn.training.calibration`), with more of the bits for what queries look at (`ahn.ops.basis`).
            Takes `key_bits` of 2, keys before RoPE, and no memory that keeps tokens; as `key_bits`, of use with
            quantized tokens alone.
        max_distance: from how far a query may see a sink, in tokens. A base model breaks at distances that it was not
            trained on, so sinks move along behind a text that is longer (`reach`; docs/concepts.md, "Any length").
            None: what the base was trained on, filled in by `attach`. 0: sinks keep their own positions, as published.
        slots: tokens per layer and key head that a memory holds which keeps tokens ("retained"); with another memory
            this field and the next three stay at their defaults, with a warning. Up to 128 of them are exact, the
            others as `key_bits` and `value_bits` say, with 6 bytes for score and position: by default the bytes of
            1 024 window tokens (bfloat16, head dimension 64).
        slot_heads: the key heads that keep tokens, as pairs (layer, key head); the others see sinks and window alone.
            Few heads of a model find what was said long ago (`ahn.training.heads`): with as many bytes, these can keep
            several times as many tokens. None: all heads.
        passage: so many tokens next to each other are kept or forgotten together, by the mean of their scores over all
            heads of the layer that keep tokens; 1 lets each token of each key head stay by itself. It divides what is
            kept, and the block of up to 128 that is exact.
        score_layer: the layer whose attention input gives each token one score, by which all key heads of all layers
            keep the same tokens; None: each layer scores for itself. A score is wanted when its token leaves the
            window, and then before the first layer runs: a forward has no more new tokens than the window.

    Raises:
        AHNError: a number is out of range, a layer index is negative, or the memory's name is unknown.
    """

    memory: str = "gated_deltanet"
    window: int = DEFAULT_WINDOW
    sinks: int = DEFAULT_SINKS
    full_attention_layers: tuple[int, ...] = ()
    router: bool = False
    q_proj: bool = False
    prefill_chunk_size: int = 8192
    quantized: int = 0
    slots: int = DEFAULT_SLOTS
    slot_heads: tuple[tuple[int, int], ...] | None = None
    passage: int = 1
    score_layer: int | None = None
    max_distance: int | None = None
    key_bits: int = 4
    value_bits: int = 2
    keys_before_rope: bool = True
    calibrated_keys: bool = False

    def __post_init__(self) -> None:
        numbers = ("window", 1), ("sinks", 0), ("prefill_chunk_size", 1), ("quantized", 0), ("slots", 2), ("passage", 1)
        for name, minimum in numbers:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
                raise AHNError(f"AHNConfig.{name} must be an integer ≥ {minimum}, got {reprlib.repr(value)}.")
            if value > LIMIT:
                raise AHNError(f"AHNConfig.{name} can be {LIMIT} at most, got {reprlib.repr(value)}.")
        for name in ("key_bits", "value_bits"):
            value, allowed = getattr(self, name), BITS if self.quantized else (*BITS, EXACT)
            if type(value) is not int or value not in allowed:
                words = "2, 3 or 4" if self.quantized else "2, 3, 4, or 16 (retained tokens alone, exactly)"
                raise AHNError(f"AHNConfig.{name} must be {words}, got {reprlib.repr(value)}.")
        for name in ("router", "q_proj", "keys_before_rope", "calibrated_keys"):
            if not isinstance(getattr(self, name), bool):
                raise AHNError(f"AHNConfig.{name} must be True or False, got {reprlib.repr(getattr(self, name))}.")
        if self.max_distance is not None and (type(self.max_distance) is not int or not self._distance_fits()):
            raise AHNError(
                f"AHNConfig.max_distance must be 0, None or an integer from {MIN_DISTANCE} to {LIMIT}, "
                f"got {reprlib.repr(self.max_distance)}."
            )
        layers = self.full_attention_layers
        if not isinstance(layers, Iterable) or any(type(i) is not int or i < 0 for i in layers):
            raise AHNError(f"AHNConfig.full_attention_layers must be layer indices ≥ 0, got {reprlib.repr(layers)}.")
        object.__setattr__(self, "full_attention_layers", tuple(sorted(set(layers))))
        if self.slot_heads is not None:
            object.__setattr__(self, "slot_heads", _pairs(self.slot_heads))
        self._check_score_layer()
        useless = {name: x for name, x in _without_use(self.memory).items() if getattr(self, name) != x}
        for name, default in useless.items():  # no error: one set of fields is used for several memories
            object.__setattr__(self, name, default)
        if useless:
            warnings.warn(
                f"AHNConfig.{', '.join(useless)}: for memories that keep tokens, such as 'retained'; {self.memory!r} "
                "has no use for it.",
                stacklevel=3,
            )
        if self.calibrated_keys:
            self._check_calibrated()

    def _check_calibrated(self) -> None:
        from ahn.memory import registry  # not above: memories are made of a configuration

        reasons = {
            "key_bits=2": self.key_bits != BITS[0],
            "keys_before_rope=True, and a base whose RoPE can be turned back": not self.keys_before_rope,
            f"another memory than {self.memory!r}, which keeps tokens": registry.get(self.memory).keeps_tokens,
        }
        if missing := [reason for reason, holds in reasons.items() if holds]:
            raise AHNError(f"AHNConfig.calibrated_keys needs {missing[0]}; or choose calibrated_keys=False.")

    def heads_of(self, layer: int) -> tuple[int, ...] | None:
        """The key heads of a layer that keep tokens; None for all."""
        return None if self.slot_heads is None else tuple(head for at, head in self.slot_heads if at == layer)

    def check_layers(self, with_memory: Collection[int]) -> None:
        """Raises AHNError if no layer of a model scores tokens, given its layers that have a memory."""
        if self.score_layer is not None and self.score_layer not in with_memory:
            raise AHNError(
                f"score_layer is {self.score_layer}, which is no layer with a memory; those of this model are "
                f"{', '.join(map(str, with_memory))}."
            )

    def _check_score_layer(self) -> None:
        layer = self.score_layer
        if layer is None:
            return
        if type(layer) is not int or layer < 0:
            raise AHNError(f"AHNConfig.score_layer must be None or a layer's index ≥ 0, got {reprlib.repr(layer)}.")
        if layer in self.full_attention_layers:
            raise AHNError(
                f"AHNConfig.score_layer = {layer} is among full_attention_layers, which have no memory that could "
                "score tokens."
            )

    @property
    def chunk(self) -> int:
        """Tokens of a prompt that are read at once when tokens leave the window."""
        return self.prefill_chunk_size if self.score_layer is None else min(self.prefill_chunk_size, self.window)

    def _distance_fits(self) -> bool:
        return self.max_distance == 0 or MIN_DISTANCE <= (self.max_distance or 0) <= LIMIT

    @property
    def reach(self) -> int:
        """Tokens from which on a sink is seen at another position than its own; 0 where it never is.

        It is `max_distance` as long as sinks then have a place before the window; a window that leaves less than a
        quarter of that free pushes them farther.
        """
        if not self.max_distance:
            return 0
        reach = max(self.max_distance, self.lossless)
        while reach - anchor_step(reach) < self.lossless:
            reach = self.lossless + anchor_step(reach)
        return reach

    @classmethod
    def saved(cls, settings: Mapping[str, Any]) -> AHNConfig:
        """From the fields in a file, which may be older than some of them, and hold some that its memory never used.

        Raises:
            AHNError: as for `AHNConfig` itself.
        """
        return cls(**BEFORE | dict(settings) | _without_use(settings.get("memory", cls.memory)))

    @property
    def lossless(self) -> int:
        """Number of tokens that are kept exactly: sinks + window."""
        return self.sinks + self.window

    @property
    def tier_reach(self) -> int:
        """The distance at which quantized tokens are seen that are farther; 0 where each is seen at its own.

        A base looks best at what is not too far: half of `max_distance`. The window needs room before it, so that the
        tokens behind it do not all lie in one place: as much again, as far as `max_distance` goes.
        """
        if not (self.max_distance and self.keys_before_rope):
            return 0
        wanted = max(self.max_distance // 2, 2 * self.lossless)
        return max(min(wanted, self.max_distance - 1), self.lossless + 4)

    @property
    def tier_label(self) -> str:
        """What is kept per number of quantized tokens, in words: of keys / of values."""
        label = "two bits" if self.tier_bits == (2, 2) else f"{self.key_bits}/{self.value_bits} bits"
        return f"{label}, calibrated" if self.calibrated_keys else label

    @property
    def tier_bits(self) -> tuple[int, int]:
        """Bits per number of keys and of values of quantized tokens."""
        return self.key_bits, self.value_bits

    @classmethod
    def for_base(cls, trained: int | None, **fields: Any) -> AHNConfig:
        """The configuration for a base that was trained on so many positions, where window and sinks are not chosen.

        The paper's total of 32 768 tokens if the base was trained on as many, else half of what it was trained on: the
        memory then has something to hold while the base still works.
        """
        if trained is None or trained >= DEFAULT_WINDOW + DEFAULT_SINKS:
            return cls(**fields)
        total = max(trained // 2, 1)
        sinks = min(DEFAULT_SINKS, total // 8)
        return cls(**{"window": total - sinks, "sinks": sinks} | fields)

    @classmethod
    def check(cls, config: Any) -> None:
        """Raises AHNError if something is not a configuration."""
        if not isinstance(config, cls):
            raise AHNError(f"This takes an ahn.AHNConfig(window=…, sinks=…), not {reprlib.repr(config)}.")

    def replace(self, **changes: Any) -> AHNConfig:
        """A copy with some fields changed, validated again; what another memory has no use for is as in a new one."""
        return dataclasses.replace(self, **_without_use(changes.get("memory", self.memory)) | changes)


def _without_use(name: str) -> dict[str, Any]:
    """The fields that a memory has no use for, with the values that they have then."""
    from ahn.memory import registry  # not above: memories are made of a configuration

    return {} if registry.get(name).keeps_tokens else OF_KEPT_TOKENS


def _pairs(given: Any) -> tuple[tuple[int, int], ...]:
    """Pairs (layer, key head) in order, of what a caller or a file says.

    Raises:
        AHNError: there are none, or they are no pairs of numbers.
    """
    pairs = [tuple(pair) for pair in given if isinstance(pair, list | tuple)] if isinstance(given, list | tuple) else []
    whole = all(len(pair) == 2 and all(type(x) is int and x >= 0 for x in pair) for pair in pairs)
    if not pairs or len(pairs) != len(given) or not whole or len(set(pairs)) < len(pairs):
        raise AHNError(
            "AHNConfig.slot_heads must be None or different pairs (layer, key head) of numbers ≥ 0, "
            f"got {reprlib.repr(given)}."
        )
    return tuple(sorted((layer, head) for layer, head in pairs))


def overridden(config: AHNConfig, **changes: Any) -> AHNConfig:
    """The configuration with those changes that are not None, validated again."""
    return config.replace(**{name: value for name, value in changes.items() if value is not None})
