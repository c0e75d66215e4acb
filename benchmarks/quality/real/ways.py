"""The ways to read that a study compares, on one base model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

import ahn
from ahn.measure.method import Method

FULL, WINDOW = "full attention", "sinks + window"


@dataclasses.dataclass(frozen=True)
class Shape:
    """What all ways share.

    Attributes:
        window, sinks: tokens kept exactly.
        length: tokens of a text.
        scores: directory of the adapter with the scores of retained tokens; None leaves its ways out.
        shared: likewise of one whose layer `AHNConfig.score_layer` scores for all heads.
        keys: likewise of one with the basis in which keys of the tier are coded.
        memories: directories of the adapters of recurrent memories; those that are not there are left out.
    """

    window: int
    sinks: int
    length: int
    scores: Path | None
    memories: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    shared: Path | None = None
    keys: Path | None = None

    @property
    def lossless(self) -> int:
        return self.window + self.sinks

    @property
    def rest(self) -> int:
        """Tokens of a text that are not exact."""
        return self.length - self.lossless


def weights_of(model: PreTrainedModel, directory: Path) -> tuple[Mapping[str, Tensor], ahn.AHNConfig]:
    """The parameters of an adapter by name, which fit every number of slots and bits, and its configuration."""
    ahn.load_adapter(model, directory)
    found, config = {name: p.detach().clone() for name, p in ahn.adapter_parameters(model).items()}, model.ahn_config
    ahn.detach(model)
    return found, config


class Ways:
    """Makes the ways of a shape for one model."""

    def __init__(self, shape: Shape, model: PreTrainedModel) -> None:
        self.shape, self.model = shape, model
        self._scores: dict[Path, tuple[Mapping[str, Tensor], ahn.AHNConfig]] = {}

    def scores(self, directory: Path | None) -> tuple[Mapping[str, Tensor], ahn.AHNConfig] | None:
        """The scores of retained tokens and their configuration, if they are there."""
        if directory is None or not directory.is_dir():
            return None
        if directory not in self._scores:
            self._scores[directory] = weights_of(self.model, directory)
        return self._scores[directory]

    def tier(self, tokens: int, bits: tuple[int, int]) -> Method:
        """The tier alone."""
        config = self.config("window_only", quantized=tokens, key_bits=bits[0], value_bits=bits[1])
        return Method(f"tier {tokens} {bits[0]}/{bits[1]}", config)

    def calibrated(self, tokens: int, value_bits: int) -> Iterator[Method]:
        """The tier alone, keys at two bits in a calibrated basis, if that is there."""
        if self.shape.keys is not None and self.shape.keys.is_dir():
            bits = {"key_bits": 2, "value_bits": value_bits}
            config = self.config("window_only", quantized=tokens, calibrated_keys=True, **bits)
            name = f"tier {tokens} 2/{value_bits}, calibrated"
            yield Method(name, config, weights_of(self.model, self.shape.keys)[0])

    def retained(
        self, slots: int, bits: tuple[int, int], tier: int = 0, passage: int = 1, shared: bool = False
    ) -> Iterator[Method]:
        """Retained tokens, alone or behind a tier, if their scores are there.

        Args:
            slots: tokens a key head if all keep some; where few do, each keeps so many more.
            passage: tokens that stay or go together.
            shared: by one layer's scores for all heads.
        """
        found = self.scores(self.shape.shared if shared else self.shape.scores)
        if found is None:
            return
        weights, trained = found
        few, text = trained.slot_heads, self.model.config
        each = slots if few is None else slots * text.num_hidden_layers * text.num_key_value_heads // len(few)
        kept = "exact" if bits == (16, 16) else f"{bits[0]}/{bits[1]}"
        name = f"retained {slots} {kept}" + (f" behind a tier of {tier}" if tier else "")
        name += "" if few is None else f", in {len(few)} heads"
        name += "" if passage == 1 else f", passages of {passage}"
        config = self.config("retained", slots=each, key_bits=bits[0], value_bits=bits[1], quantized=tier)
        name += "" if trained.score_layer is None else f", scores of layer {trained.score_layer}"
        config = config.replace(passage=passage, slot_heads=few, score_layer=trained.score_layer)
        yield Method(name, config, weights)

    def recurrent(self) -> Iterator[Method]:
        """Recurrent memories that were trained."""
        for name, directory in self.shape.memories.items():
            if directory.is_dir():
                yield Method(name, self.config(name), weights_of(self.model, directory)[0])

    def config(self, memory: str, window: int | None = None, **fields: int) -> ahn.AHNConfig:
        return ahn.AHNConfig(memory, window or self.shape.window, self.shape.sinks, **fields)

    def within(self) -> Iterator[Method]:
        """For texts within the trained length."""
        rest = self.shape.rest
        yield Method(FULL)
        yield Method(WINDOW, self.config("window_only"))
        yield self.tier(rest, (4, 2))
        yield from self.calibrated(rest, 2)
        yield from self.calibrated(rest, 4)
        yield from self.retained(4096, (4, 2))
        yield from self.retained(4096, (4, 2), passage=64)
        yield from self.retained(4096, (4, 2), passage=64, shared=True)
        yield from self.retained(2048, (4, 2), tier=2048)
        yield from self.retained(1024, (16, 16))
        yield self.tier(rest, (3, 2))
        yield Method("window of as many bytes", self.config("window_only", self.shape.window + 1024))
        yield from self.recurrent()

    def beyond(self) -> Iterator[Method]:
        """For facts asked beyond the trained length."""
        yield Method(FULL)
        yield from self.retained(4096, (4, 2), passage=64, shared=True)
        yield from self.retained(4096, (4, 2), passage=64)
        yield from self.retained(4096, (4, 2))
        yield from self.retained(2048, (4, 2), tier=2048)
        yield Method(WINDOW, self.config("window_only"))
        yield self.tier(self.shape.rest, (4, 2))
        yield from self.retained(4096, (4, 2), tier=self.shape.rest)

    def book(self) -> Iterator[Method]:
        """For a whole book; full attention begins afresh again and again."""
        yield Method(FULL)
        yield Method(WINDOW, self.config("window_only"))
        yield self.tier(self.shape.rest, (4, 2))
        yield from self.retained(4096, (4, 2))
        yield from self.retained(4096, (4, 2), passage=64)
        yield from self.retained(4096, (4, 2), passage=64, shared=True)
