"""Fields of `AHNConfig` that are for memories which keep tokens: others say that they do not take them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from models import EVERYTHING

import ahn
from ahn import AHNConfig
from ahn.bench import methods as bench
from ahn.evaluation import methods

GIVEN: dict[str, Any] = {"slots": 64, "slot_heads": ((1, 0),), "passage": 2, "score_layer": 1}
OTHERS = [name for name in EVERYTHING if not ahn.memory.get(name).keeps_tokens]


@pytest.mark.parametrize("memory", OTHERS)
@pytest.mark.parametrize("field", GIVEN)
def test_a_memory_that_keeps_no_tokens_says_that_it_has_no_use_for_them(memory: str, field: str) -> None:
    said = rf"AHNConfig\.{field}: for memories that keep tokens, .*'{memory}' has no use"
    with pytest.warns(UserWarning, match=said):
        assert AHNConfig(memory, **{field: GIVEN[field]}) == AHNConfig(memory)
    with pytest.warns(UserWarning, match=said):
        assert AHNConfig(memory).replace(**{field: GIVEN[field]}) == AHNConfig(memory)


@pytest.mark.parametrize("memory", OTHERS)
@pytest.mark.filterwarnings("error")
def test_another_memory_in_a_configuration_leaves_them_behind(memory: str) -> None:
    """As methods do that are compared with a memory that keeps tokens, by its own window and sinks."""
    retained = AHNConfig("retained", 90, 7, **GIVEN)
    assert retained.replace(memory=memory) == AHNConfig(memory, 90, 7)
    assert retained.replace(window=80).slots == 64
    assert methods.make("window", retained).config == AHNConfig("window_only", 97 - 7, 7)


@pytest.mark.filterwarnings("error")
def test_files_that_hold_them_for_no_reason_load() -> None:
    """They never had an effect."""
    saved = dataclasses.asdict(AHNConfig("deltanet", 90, 7)) | GIVEN
    assert AHNConfig.saved(saved) == AHNConfig("deltanet", 90, 7)
    kept = dataclasses.asdict(AHNConfig("retained", 90, 7, **GIVEN))
    assert AHNConfig.saved(kept).slots == 64


def test_measurements_beside_an_adapter_that_keeps_tokens() -> None:
    adapter = str(ahn.smollm2.adapter_path("retained"))
    chosen = bench.make_methods(["window", "gated_deltanet"], 90, 7, adapter=adapter, trained=512)
    assert all(method.config.slots == AHNConfig().slots for method in chosen if method.config)
