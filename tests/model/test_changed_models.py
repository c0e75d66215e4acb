"""What is done to a model after `attach`: quantized, cast, cut, copied, adapted by PEFT. It goes on, or it is said."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from golden import relative_error
from models import EVERYTHING, adapted, awaken, base, tokens
from torch import Tensor, nn
from transformers import PreTrainedModel

import ahn
from ahn import AHNError

TOLERANCE = 1e-4  # float32 in another order of operations, through two layers with sharp attention
ROUNDED = 0.1  # of bfloat16, 2^-8 a number, through two layers with sharp attention; another text is 1 away

# -- int8 --------------------------------------------------------------------------------------------------------------

pytestmark = pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_")


def _int8(model: PreTrainedModel, what: Any = (nn.Linear,)) -> PreTrainedModel:
    """torch's dynamic quantization: weights are packed, which then are no parameters."""
    chosen = what if isinstance(what, dict) else set(what)
    return torch.ao.quantization.quantize_dynamic(model, chosen, dtype=torch.qint8)


def _base_alone(model: PreTrainedModel) -> dict[str, Any]:
    linear = (name for name, x in model.named_modules() if type(x) is nn.Linear and ".ahn." not in name)
    return dict.fromkeys(linear, torch.ao.quantization.default_dynamic_qconfig)


@torch.no_grad()
def test_a_memory_on_a_base_in_int8(tmp_path: Any) -> None:
    """Quantized before or after: within the window it is that base, beyond it both are the same."""
    ids, plain = tokens(1, 60), _int8(base())
    before = awaken(ahn.attach(_int8(base()), ahn.AHNConfig(window=13, sinks=3)))
    after = adapted(window=13, sinks=3)
    after = _int8(after, _base_alone(after))
    assert torch.equal(before(ids[:, :16]).logits, plain(ids[:, :16]).logits)
    expected = before(ids).logits
    assert relative_error(after(ids).logits, expected) < TOLERANCE
    assert relative_error(expected, plain(ids).logits) > 0.01
    assert before.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 64)
    before(ids).past_key_values.save(tmp_path / "talk")
    assert ahn.AHNCache.load(tmp_path / "talk", before).seen == 60
    ahn.save_adapter(before, tmp_path / "adapter")
    assert torch.equal(ahn.load_adapter(_int8(base()), tmp_path / "adapter")(ids).logits, expected)
    with pytest.raises(AHNError, match="load it without quantisation"), ahn.inspect.record(before):
        pass
    with pytest.raises(AHNError, match=r"torch's quantization has packed .*ahn\.save_adapter"):
        before.save_pretrained(tmp_path / "whole")


def test_a_memory_in_int8_is_refused(tmp_path: Any) -> None:
    model = _int8(adapted(window=13, sinks=3))
    with pytest.raises(AHNError, match="has replaced projections of the memory"):
        model(tokens(1, 8))
    with pytest.raises(AHNError, match="not what 'gated_deltanet' has"):
        ahn.save_adapter(model, tmp_path / "adapter")


class _Packed(Tensor):
    """A tensor of numbers that nobody can write down, as torchao makes weights."""


def test_a_memory_of_packed_tensors_is_not_saved(tmp_path: Any) -> None:
    model = adapted(window=13, sinks=3)
    projection = model.model.layers[1].ahn.fn.g_proj
    projection.weight = nn.Parameter(projection.weight.data.as_subclass(_Packed))
    with pytest.raises(AHNError, match=r"layers\.1\.ahn\.fn\.g_proj\.weight is a _Packed, no plain tensor"):
        ahn.save_adapter(model, tmp_path / "adapter")


# -- another dtype in the middle of a text -----------------------------------------------------------------------------


@pytest.mark.sample(3)
@pytest.mark.parametrize("memory", EVERYTHING)
@pytest.mark.parametrize("quantized", [0, 8])
@pytest.mark.parametrize("change", ["autocast ends", "autocast begins", "to bfloat16", "to float32"])
@torch.no_grad()
def test_a_conversation_goes_on_in_another_dtype(memory: str, quantized: int, change: str) -> None:
    """At once and one token at a time, for which the window lies in slots: both go on from the same state."""
    model, ids = adapted(window=13, sinks=3, memory=memory, quantized=quantized), tokens(1, 46)
    expected = model(ids).logits[:, 40:]
    if change == "to float32":
        model.bfloat16()
    cache = ahn.AHNCache.for_model(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast ends"):
        model(ids[:, :40], past_key_values=cache)
    model = {"to bfloat16": model.bfloat16, "to float32": model.float}.get(change, lambda: model)()
    other, logits = copy.deepcopy(cache), list[Tensor]()
    with torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast begins"):
        at_once = model(ids[:, 40:], past_key_values=cache).logits.float()
        logits += (model(token, past_key_values=other).logits for token in ids[:, 40:].split(1, dim=1))
    in_float32 = change in ("autocast ends", "to float32")
    assert relative_error(torch.cat(logits, dim=1).float(), at_once) < (TOLERANCE if in_float32 else ROUNDED)
    if not quantized:  # a number that rounds to the other side moves a code by more
        assert relative_error(at_once, expected) < ROUNDED


# -- other layers ------------------------------------------------------------------------------------------------------


def _cut(model: PreTrainedModel) -> None:
    model.model.layers = model.model.layers[:1]


def _swapped(model: PreTrainedModel) -> None:
    model.model.layers = nn.ModuleList(reversed(model.model.layers))


def _repeated(model: PreTrainedModel) -> None:
    model.model.layers = nn.ModuleList([*model.model.layers, copy.deepcopy(model.model.layers[0])])
    model.config.num_hidden_layers, model.config.layer_types = 3, [*model.config.layer_types, "full_attention"]


def _new(model: PreTrainedModel) -> None:
    model.model.layers[1] = base().model.layers[1]


@pytest.mark.parametrize("change", [_cut, _swapped, _repeated, _new])
def test_layers_that_changed_after_attach_are_refused(change: Any) -> None:
    model = adapted("qwen3", window=13, sinks=3)
    change(model)
    with pytest.raises(AHNError, match="layers are not those that its AHN was attached to"):
        model.generate(tokens(1, 20), max_new_tokens=2)


def test_a_shallow_copy_has_no_memory_of_its_own() -> None:
    """Its modules are the model's: what is taken off one is gone from both, and the other must not read on without."""
    model = adapted(window=13, sinks=3)
    ahn.detach(copy.copy(model))
    with pytest.raises(AHNError, match="taken off through a shallow copy"):
        model(tokens(1, 20))


@torch.no_grad()
def test_more_tokens_in_the_vocabulary(tmp_path: Any) -> None:
    model, ids = adapted(window=13, sinks=3), tokens(1, 60)
    expected, cache = model(ids).logits, model(ids[:, :50]).past_key_values
    model.resize_token_embeddings(70, mean_resizing=False)
    assert torch.equal(model(ids).logits[..., :61], expected)
    ids[:, 55] = 69
    whole = model(ids).logits
    assert relative_error(model(ids[:, 50:], past_key_values=cache).logits, whole[:, 50:]) < TOLERANCE
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(ahn.from_pretrained(tmp_path)(ids).logits, whole)


# -- PEFT --------------------------------------------------------------------------------------------------------------

LORA: dict[str, Any] = {
    "r": 2,
    "target_modules": ["q_proj", "v_proj"],
    "exclude_modules": r".*\.ahn\..*",
    "task_type": "CAUSAL_LM",
    "init_lora_weights": False,
}


@torch.no_grad()
def test_an_adapter_that_begins_to_act_within_a_prompt() -> None:
    """aLoRA counts from the end of what a forward reads: pieces of a prompt would each begin anew."""
    config = peft.LoraConfig(**LORA, alora_invocation_tokens=[5])
    model = peft.get_peft_model(adapted(window=13, sinks=3), config).eval()
    ids = tokens(2, 60)
    ids[ids == 5] = 6
    ids[0, 45] = ids[1, 10] = 5
    expected = model(input_ids=ids, use_cache=False).logits
    assert relative_error(model(input_ids=ids).logits, expected) < TOLERANCE
    with model.disable_adapter():
        assert relative_error(model(input_ids=ids).logits, expected) > 0.01


@torch.no_grad()
def test_an_adapter_for_each_row() -> None:
    model = peft.get_peft_model(adapted(window=13, sinks=3), peft.LoraConfig(**LORA)).eval()
    model.add_adapter("other", peft.LoraConfig(**LORA))
    ids = tokens(2, 60)
    both = model(input_ids=ids, adapter_names=["default", "other"]).logits
    for row, name in enumerate(("default", "other")):
        model.set_adapter(name)
        assert relative_error(model(input_ids=ids).logits[row], both[row]) < TOLERANCE


def test_virtual_tokens_are_read_and_a_cache_of_keys_is_refused() -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(adapted(window=13, sinks=3), config).eval()
    ids = tokens(1, 40)
    with torch.no_grad():
        virtual = model.get_prompt(1)
        embedded = torch.cat([virtual, model.get_input_embeddings()(ids)], dim=1)
        expected = model.base_model(inputs_embeds=embedded, use_cache=False).logits
        assert relative_error(model(input_ids=ids).logits, expected) < TOLERANCE
    prefix = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(AHNError, match="needs an AHNCache, got DynamicCache"):
        peft.get_peft_model(adapted(window=13, sinks=3), prefix)(input_ids=ids)
