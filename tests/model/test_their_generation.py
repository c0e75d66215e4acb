"""transformers' own tests of generation on models with an AHN: what passes on the base passes here, but for EXCEPTIONS.

They are in no distribution, so they run where `AHN_TRANSFORMERS_SOURCE` names a checkout of transformers' repository at
the version that is installed (git clone --branch vX.Y.Z --depth 1 https://github.com/huggingface/transformers).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

SOURCE = Path(os.environ.get("AHN_TRANSFORMERS_SOURCE", ""))
TESTS = Path(__file__).parents[1]
WIDE, NARROW = 4096, 3
KINDS = {
    "another cache": (
        "test_generate_compilation_all_outputs",
        "test_generate_compile_model_forward_fullgraph",
        "test_generate_from_inputs_embeds_with_static_cache",
        "test_generate_with_static_cache",
        "test_static_cache_no_recompile_with_smaller_length",
    ),
    "another class": (
        "test_eager_padding_matches_padding_free_with_position_ids",
        "test_sdpa_padding_matches_padding_free_with_position_ids",
    ),
    "masks of four dimensions": ("test_custom_4d_attention_mask",),
}
"""What they look for and a model with an AHN does not have, as docs/compatibility.md gives it."""
OF_SIZE = (
    "test_assisted_decoding_matches_greedy_search_0_random",
    "test_assisted_decoding_matches_greedy_search_1_same",
    "test_assisted_decoding_sample",
    "test_beam_search_generate_dict_outputs_use_cache",
    "test_greedy_generate_dict_outputs_use_cache",
    "test_past_key_values_format",
)
"""With a narrow window: they want a cache, and weights of attention, as wide as the text."""
EXCEPTIONS = {test for tests in KINDS.values() for test in tests}


def outcomes(family: str, *options: str) -> dict[str, str]:
    command = [sys.executable, "-W", "ignore", "-m", "support.their_generation", str(SOURCE), family, *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=TESTS, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.stdout.strip(), done.stderr[-2000:]
    found: dict[str, str] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def missing() -> str:
    """Why they cannot run here; empty if they can."""
    if not os.environ.get("AHN_TRANSFORMERS_SOURCE"):
        return "AHN_TRANSFORMERS_SOURCE names no checkout of transformers"
    if not (SOURCE / "tests" / "generation" / "test_utils.py").is_file():
        return f"{SOURCE} has no tests of generation"
    version = (SOURCE / "src" / "transformers" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'__version__ = "(.*?)"', version)
    if found is None or found[1] != transformers.__version__:
        return f"{SOURCE} is of another version than transformers {transformers.__version__}"
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2", "llama", "olmo2", "gemma3"])
def test_what_passes_on_the_base_passes_with_a_memory(family: str) -> None:
    if reason := missing():
        pytest.skip(reason)
    pytest.importorskip("parameterized")
    passed = {name for name, outcome in outcomes(family).items() if outcome == "passed"}
    assert len(passed) > 20
    for window, more in ((WIDE, set()), (NARROW, set(OF_SIZE))):
        found = outcomes(family, "--window", str(window))
        failed = {name: outcome for name, outcome in found.items() if name in passed and outcome != "passed"}
        unexpected = {name: failed[name] for name in failed.keys() - EXCEPTIONS - more}
        assert not unexpected, f"window {window}: {unexpected}"


def test_the_page_lists_each_exception() -> None:
    page = (TESTS.parent / "docs" / "compatibility.md").read_text(encoding="utf-8")
    assert [name for name in (*sorted(EXCEPTIONS), *OF_SIZE) if f"`{name}`" not in page] == []
