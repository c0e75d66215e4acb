"""Every way of use on every family of models: what docs/compatibility.md says, which is right or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from support.architectures import TYPES
from support.uses import FAMILIES, NONE, SIGHTED, USES, judge, read_table

PAGE = (Path(__file__).parents[2] / "docs" / "compatibility.md").read_text(encoding="utf-8")
LONG = ("LoRA", "offload to the CPU or to disk", "`torch.compile(model)`")
"""Take seconds for what they import or compile."""
HERE = [x for x in FAMILIES if x in TYPES or x in SIGHTED]  # older versions lack some


FOUND = [
    ("`AutoModel`", "gemma4_text"),
    ("prompt lookup", "llama4_text"),
    ("`save_pretrained`, then an Auto class", "exaone"),
]
"""What was wrong in one architecture that is no family of the page."""


def test_the_page_has_every_use_of_every_family() -> None:
    assert list(read_table(PAGE)) == [(name, family) for name in USES for family in FAMILIES]


@pytest.mark.sample(len(HERE))
@pytest.mark.parametrize("family", HERE)
@pytest.mark.parametrize("name", [pytest.param(x, marks=pytest.mark.slow) if x in LONG else x for x in USES])
def test_a_use_is_right_or_refused_as_the_page_says(name: str, family: str, tmp_path: Path) -> None:
    verdict = judge(name, family, tmp_path)
    assert verdict.kind in ("right", "refused", NONE), verdict.note
    if f"transformers {transformers.__version__}" in PAGE:
        assert verdict == read_table(PAGE)[name, family]


@pytest.mark.parametrize(("name", "model_type"), FOUND)
def test_a_use_that_was_wrong_elsewhere(name: str, model_type: str, tmp_path: Path) -> None:
    """Its decoder takes `logits_to_keep` as if it had logits; its angles are one tensor of complex numbers;
    transformers saves it under the names of its makers' code."""
    verdict = judge(name, model_type, tmp_path)
    assert verdict.kind == "right", verdict.note
