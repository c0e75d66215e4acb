"""What people do with a transformers model goes on working once it has a memory, or is refused before work begins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden import relative_error
from models import adapted, base, tokens
from transformers import PreTrainedModel

import ahn
from ahn import AHNError

TOLERANCE = 1e-4  # float32 in another order of operations, through two layers with sharp attention

# -- another attention implementation ----------------------------------------------------------------------------------


def _by_model(model: PreTrainedModel, kernel: str) -> None:
    model.set_attn_implementation(kernel)


def _by_decoder(model: PreTrainedModel, kernel: str) -> None:
    model.model.set_attn_implementation(kernel)


def _by_config(model: PreTrainedModel, kernel: str) -> None:
    model.config._attn_implementation = kernel


@pytest.mark.parametrize("change", [_by_model, _by_decoder, _by_config])
def test_another_kernel_for_the_base_leaves_the_memory(change: Any) -> None:
    model, plain, ids = adapted(window=13, sinks=3), base(), tokens(1, 60)
    with torch.no_grad():
        expected, steps = model(ids).logits, model.generate(ids, max_new_tokens=4, do_sample=False)
        change(model, "eager")
        plain.set_attn_implementation("eager")
        assert relative_error(model(ids).logits, expected) < TOLERANCE
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), steps)
        with ahn.disabled(model):
            assert torch.equal(model(ids).logits, plain(ids).logits)
        weights = model(ids[:, :16], output_attentions=True).attentions
        assert torch.equal(weights[1], plain(ids[:, :16], output_attentions=True).attentions[1]), (
            "the base's own kernel"
        )
    model(ids, labels=ids).loss.backward()
    assert all(
        bool(p.grad.any()) for name, p in ahn.adapter_parameters(model).items() if name.endswith("o_proj.weight")
    )
    change(model, "sdpa")
    ahn.detach(model)
    assert model.config._attn_implementation == model.model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        assert torch.equal(model(ids).logits, base()(ids).logits)


def test_an_unknown_kernel_is_transformers_to_refuse() -> None:
    model, ids = adapted(window=13, sinks=3), tokens(1, 60)
    with torch.no_grad():
        expected = model(ids).logits
        with pytest.raises(ValueError, match="nonsense"):
            model.set_attn_implementation("nonsense")
        assert torch.equal(model(ids).logits, expected)


# -- wrappers ----------------------------------------------------------------------------------------------------------


def _lora(model: PreTrainedModel, **settings: Any) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(**{"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.ahn\..*"} | settings)
    return peft.get_peft_model(model, config)


class Around(torch.nn.Module):
    """What DistributedDataParallel and many others do."""

    def __init__(self, module: PreTrainedModel) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


@pytest.mark.parametrize("wrap", [_lora, Around, torch.compile])
@torch.no_grad()
def test_every_function_works_through_a_wrapper(wrap: Any, tmp_path: Any) -> None:
    model, ids = adapted(window=13, sinks=3), tokens(1, 60)
    student, teacher = model(ids).logits, base()(ids).logits
    wrapped = wrap(model)
    call = model if wrap is torch.compile else wrapped  # compiling takes a minute, and is not what this is about
    assert torch.equal(call(ids).logits, student)
    with ahn.disabled(wrapped):
        assert torch.equal(call(ids).logits, teacher)
    assert ahn.AHNCache.for_model(wrapped).config.window == 13
    ahn.set_window(wrapped, 40, 3)
    assert (model.ahn_config.window, ahn.AHNCache.for_model(wrapped).config.window) == (40, 40)
    ahn.set_window(wrapped, 13, 3)
    assert torch.equal(call(ids).logits, student)
    assert len(ahn.adapter_parameters(wrapped)) == len(ahn.adapter_parameters(model))
    ahn.save_adapter(wrapped, tmp_path / "adapter")
    assert ahn.detach(wrapped) is wrapped
    assert torch.equal(call(ids).logits, teacher)
    assert not any(".ahn." in name for name, _ in wrapped.named_parameters())
    assert ahn.load_adapter(wrapped, tmp_path / "adapter") is wrapped
    assert torch.equal(call(ids).logits, student)
    ahn.detach(wrapped)
    assert ahn.attach(wrapped, ahn.AHNConfig(window=13, sinks=3)) is wrapped
    assert model.ahn_config.window == 13


def test_a_wrapper_without_an_ahn_is_refused() -> None:
    for call in (ahn.detach, ahn.adapter_parameters, ahn.AHNCache.for_model):
        with pytest.raises(AHNError, match=r"no AHN; call ahn\.attach"):
            call(Around(base()))
