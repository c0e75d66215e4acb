"""Every causal class of transformers: right, or refused by `attach` with a sentence. Nothing in between.

What "right" means is in `support.architectures`: the base bit for bit within the window, beyond it the base with a mask
of the window, whole = chunks = steps = no cache, a padded row is the row alone, conversations are copied and saved,
gradients reach the memory, detach restores.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from support import architectures
from support.architectures import TYPES, build, judge, row

import ahn

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
REFUSED = {
    "diffllama": "DiffLlamaAttention attends 2 times per layer",
    "doge": "DogeAttention makes an attention mask of its own",
    "dory": "DoryAttention keeps keys and values in layer self.layer_idx [+] cache_offset of the cache",
    "inkling2_text": "Inkling2FullAttention.o_proj is a Inkling2GatedOutputProjection, not a linear map",
    "inkling_text": "InklingAttention gives each key a bias by its position",
    "jamba": "JambaMambaMixer does not go on where the last chunk",
    "minimax": "MiniMaxModel wants a cache of its own, MiniMaxCache",
    "stablelm": r"StableLmDecoderLayer.forward gives its attention no \*\*kwargs",
    "zamba2": "Zamba2HybridLayer attends in a block that other layers share",
}


@pytest.mark.parametrize("model_type", sorted(REFUSED.keys() & set(TYPES)))  # older versions lack some
def test_what_cannot_work_is_refused_before_anything_is_changed(model_type: str) -> None:
    model = build(model_type)
    before = set(model.state_dict())
    with pytest.raises(ahn.AHNError, match=REFUSED[model_type]):
        ahn.attach(model, ahn.AHNConfig(window=9, sinks=2))
    assert set(model.state_dict()) == before and "forward" not in vars(model)


@pytest.mark.parametrize("changes", [{"num_kv_shared_layers": 2}, {"attention_k_eq_v": True}])
def test_keys_and_values_of_other_layers_are_refused(
    changes: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the published small ones of Gemma 4; a layer without keys or values of its own has nothing to remember."""
    layers = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
    monkeypatch.setitem(architectures._OF_TYPE, "gemma4_text", layers | changes)
    with pytest.raises(ahn.AHNError, match=r"has no (k_proj, )?v_proj"):
        ahn.attach(build("gemma4_text"), ahn.AHNConfig(window=9, sinks=2))


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "model_type",
    ["afmoe", "bamba", "falcon_h1", "gemma4_text", "granitemoehybrid", "llama4_text", "nemotron_h", "qwen3_next"],
)
def test_families_that_were_gained(model_type: str) -> None:
    """Attention whose output is viewed, layers of different sizes, recurrent states that are saved and moved, some of
    them beside attention, layers that keep nothing, positions that begin anew with every forward, and a decoder that
    transformers itself does not find."""
    assert judge(model_type).kind == "right", judge(model_type).reason


@pytest.mark.slow
@pytest.mark.parametrize("model_type", TYPES)
def test_every_architecture_is_right_or_refused_as_the_page_says(model_type: str) -> None:
    verdict = judge(model_type)
    assert verdict.kind in ("right", "refused"), f"{verdict.kind}: {verdict.reason}"
    page = PAGE.read_text(encoding="utf-8")
    if f"transformers {transformers.__version__}" in page:
        found = [line for line in page.splitlines() if line.startswith(f"| `{model_type}` |")]
        assert found == [row(model_type, verdict)]
