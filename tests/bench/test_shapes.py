"""The built-in shapes are the published models'."""

from __future__ import annotations

import pytest

from ahn.bench.shapes import SHAPES, configuration
from ahn.costs import count_model_parameters
from ahn.errors import AHNError

PUBLISHED = {  # parameters in the model cards' safetensors, tied embeddings once
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "smollm2-135m": 134_515_008,
    "qwen3-4b": 4_022_468_096,
}


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_those_of_the_published_model(name: str) -> None:
    assert count_model_parameters(configuration(name)) == PUBLISHED[name]


def test_unknown_name() -> None:
    with pytest.raises(AHNError, match=r"qwen2\.5-3b"):
        configuration("qwen9")
