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
class Way:
    """One way to read.

    Attributes:
        config: None for full attention.
        adapter: directory of the weights, if the way has some. They fit every number of slots and bits.
        main: it answers tasks, too.
    """

    name: str
    config: ahn.AHNConfig | None = None
    adapter: Path | None = None
    main: bool = False

    def method(self, model: PreTrainedModel) -> Method:
        """The way on a bare model, with its weights."""
        if self.adapter is None or self.config is None:
            return Method(self.name, self.config)
        weights, trained = weights_of(model, self.adapter)
        return Method(self.name, self.config.replace(score_layer=trained.score_layer), weights)


def weights_of(model: PreTrainedModel, directory: Path) -> tuple[Mapping[str, Tensor], ahn.AHNConfig]:
    """The parameters of an adapter by name, and its configuration."""
    ahn.load_adapter(model, directory)
    found, config = {name: p.detach().clone() for name, p in ahn.adapter_parameters(model).items()}, model.ahn_config
    ahn.detach(model)
    return found, config


@dataclasses.dataclass(frozen=True)
class Ways:
    """Makes the ways of one shape.

    Attributes:
        window, sinks: tokens that all ways but one keep exactly.
        length: tokens of a text.
        scores: directory of the adapter with the scores of retained tokens, of each key head.
        shared: likewise of one whose `AHNConfig.score_layer` scores for all heads.
        keys: likewise of one with the basis in which keys of the tier are coded.
        memories: likewise of recurrent memories, by name.
    """

    window: int
    sinks: int
    length: int
    scores: Path
    shared: Path
    keys: Path
    memories: Mapping[str, Path]

    @property
    def rest(self) -> int:
        """Tokens of a text that are not exact."""
        return self.length - self.window - self.sinks

    def _config(self, memory: str, window: int | None = None, **fields: int) -> ahn.AHNConfig:
        return ahn.AHNConfig(memory, window or self.window, self.sinks, **fields)

    def full(self) -> Way:
        """Full attention, the model as it is."""
        return Way(FULL, main=True)

    def forgetting(self) -> Way:
        """Sinks and window alone."""
        return Way(WINDOW, self._config("window_only"), main=True)

    def tier(self, tokens: int, bits: tuple[int, int], main: bool = False) -> Way:
        """The tier alone."""
        config = self._config("window_only", quantized=tokens, key_bits=bits[0], value_bits=bits[1])
        return Way(f"tier {tokens} {bits[0]}/{bits[1]}", config, main=main)

    def calibrated(self, tokens: int, value_bits: int, main: bool = False) -> Way:
        """The tier alone, keys at two bits in a calibrated basis."""
        bits = {"key_bits": 2, "value_bits": value_bits}
        config = self._config("window_only", quantized=tokens, calibrated_keys=True, **bits)
        return Way(f"tier {tokens} 2/{value_bits}, calibrated", config, self.keys, main)

    def retained(
        self, slots: int, bits: tuple[int, int], tier: int = 0, passage: int = 1, shared: bool = False,
        main: bool = False,
    ) -> Way:  # fmt: skip
        """Retained tokens, alone or behind a tier.

        Args:
            slots: tokens a key head.
            passage: tokens that stay or go together.
            shared: by one layer's scores for all heads.
        """
        kept = "exact" if bits == (16, 16) else f"{bits[0]}/{bits[1]}"
        name = f"retained {slots} {kept}" + (f" behind a tier of {tier}" if tier else "")
        name += ("" if passage == 1 else f", passages of {passage}") + (", one score for all heads" if shared else "")
        config = self._config("retained", slots=slots, key_bits=bits[0], value_bits=bits[1], quantized=tier)
        return Way(name, config.replace(passage=passage), self.shared if shared else self.scores, main)

    def passages(self) -> Way:
        """Retained tokens as they ship."""
        return self.retained(4096, (4, 2), passage=64, shared=True, main=True)

    def behind(self) -> Way:
        """Retained tokens behind a tier, in as many bytes."""
        return self.retained(2048, (4, 2), tier=2048, main=True)

    def recurrent(self) -> Iterator[Way]:
        """Recurrent memories."""
        for number, (name, directory) in enumerate(self.memories.items()):
            yield Way(name, self._config(name), directory, main=number == 0)

    def within(self) -> Iterator[Way]:
        """For texts within the trained length."""
        yield self.full()
        yield self.forgetting()
        yield self.calibrated(self.rest, 4, main=True)
        yield self.passages()
        yield self.behind()
        yield self.tier(self.rest, (4, 2))
        yield self.calibrated(self.rest, 2)
        yield self.retained(4096, (4, 2))
        yield Way("window of as many bytes", self._config("window_only", self.window + 1024), main=True)
        yield from self.recurrent()
        yield self.retained(4096, (4, 2), passage=64)
        yield self.retained(1024, (16, 16))
        yield self.tier(self.rest, (3, 2))

    def beyond(self) -> Iterator[Way]:
        """For facts asked beyond the trained length."""
        yield self.passages()
        yield self.forgetting()
        yield self.behind()
        yield self.calibrated(self.rest, 4)
        yield self.full()
        yield self.retained(4096, (4, 2))

    def book(self) -> Iterator[Way]:
        """For a whole book; full attention begins afresh again and again."""
        yield self.full()
        yield self.forgetting()
        yield self.passages()
        yield self.calibrated(self.rest, 4)
        yield self.behind()
        yield self.retained(4096, (4, 2))
