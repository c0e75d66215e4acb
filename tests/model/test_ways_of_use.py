"""What people do with a transformers model goes on working once it has a memory, or is refused before work begins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from golden import relative_error
from models import adapted, awaken, base, tokens
from torch import Tensor
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


def _compiled(model: PreTrainedModel) -> Any:
    return torch.compile(model, backend="eager")  # another one takes seconds to import


@pytest.mark.parametrize("wrap", [_lora, Around, _compiled], ids=["lora", "around", "compile"])
@torch.no_grad()
def test_every_function_works_through_a_wrapper(wrap: Any, tmp_path: Any) -> None:
    model, ids = adapted(window=13, sinks=3), tokens(1, 60)
    student, teacher = model(ids).logits, base()(ids).logits
    wrapped = wrap(model)
    call = model if wrap is _compiled else wrapped  # compiling takes long, and is not what this is about
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


ATTENTION, EVERYTHING_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj"], "all-linear"


@pytest.mark.sample(2)
@pytest.mark.parametrize("targets", [ATTENTION, EVERYTHING_LINEAR], ids=["q, k, v, o", "all linear"])
@pytest.mark.parametrize("order", ["memory first", "LoRA first"])
def test_lora_is_on_the_base_alone_in_both_orders(targets: Any, order: str, tmp_path: Any) -> None:
    """The memory keeps its own gradients, is saved and loaded, and survives the merging of LoRA."""
    config, ids = ahn.AHNConfig(window=13, sinks=3), tokens(1, 60)
    lora = {"target_modules": targets, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    if order == "memory first":
        wrapped = _lora(adapted(window=13, sinks=3), **lora)
    else:
        wrapped = awaken(ahn.attach(_lora(base(), **lora), config))
    names = [name for name, _ in wrapped.named_parameters()]
    assert any(".q_proj.lora_A." in name for name in names) and any(".o_proj.lora_A." in name for name in names)
    assert not any("lora" in name for name in ahn.adapter_parameters(wrapped))
    wrapped(ids, labels=ids, use_cache=False).loss.backward()
    assert all(p.grad is not None for name, p in wrapped.named_parameters() if "lora_" in name)
    with torch.no_grad():
        expected = wrapped(ids).logits
        ahn.save_adapter(wrapped, tmp_path / "adapter")
        ahn.load_adapter(wrapped, tmp_path / "adapter")
        assert torch.equal(wrapped(ids).logits, expected)
        assert relative_error(wrapped.merge_and_unload()(ids).logits, expected) < TOLERANCE


def test_a_memory_that_peft_has_adapted_is_not_saved_as_one(tmp_path: Any) -> None:
    wrapped = _lora(
        adapted(window=13, sinks=3), target_modules=EVERYTHING_LINEAR, exclude_modules=None, task_type="CAUSAL_LM"
    )
    with pytest.raises(AHNError, match=r"PEFT has adapted the memory itself .* exclude_modules"):
        ahn.save_adapter(wrapped, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_memory_that_peft_has_copied_is_refused(tmp_path: Any) -> None:
    """The copy would be trained, the original read: so no gradient came, and the file held what nobody had changed."""
    wrapped = _lora(adapted(window=13, sinks=3), modules_to_save=["ahn"], task_type="CAUSAL_LM")
    with pytest.raises(AHNError, match="modules_to_save has copied the memory"):
        wrapped(tokens(1, 8))
    with pytest.raises(AHNError, match="PEFT has adapted the memory itself"):
        ahn.save_adapter(wrapped, tmp_path / "adapter")


def test_a_conversation_of_a_model_with_other_sizes_is_refused() -> None:
    other = adapted("llama", window=13, sinks=3)
    cache = ahn.AHNCache.for_model(other)
    with pytest.raises(AHNError, match="made for another model"):
        adapted(window=13, sinks=3)(tokens(1, 8), past_key_values=cache)


def test_a_wrapper_without_an_ahn_is_refused() -> None:
    for call in (ahn.detach, ahn.adapter_parameters, ahn.AHNCache.for_model):
        with pytest.raises(AHNError, match=r"no AHN; call ahn\.attach"):
            call(Around(base()))


# -- generate ----------------------------------------------------------------------------------------------------------


def _greedy(model: PreTrainedModel, ids: Tensor, new: int, **options: Any) -> list[list[int]]:
    with torch.no_grad():
        return model.generate(ids, max_new_tokens=new, do_sample=False, **options).tolist()


@pytest.mark.sample(3)
@pytest.mark.parametrize("where", ["argument", "given configuration", "model's configuration"])
@pytest.mark.parametrize("kind", ["static", "offloaded", "quantized"])
def test_other_kinds_of_cache_are_ignored_with_a_warning(where: str, kind: str) -> None:
    model, ids, options = adapted(window=13, sinks=3), tokens(2, 20), dict[str, Any]()
    expected = _greedy(model, ids, 8)
    if where == "argument":
        options = {"cache_implementation": kind}
    elif where == "given configuration":
        config = transformers.GenerationConfig(cache_implementation=kind, pad_token_id=0)
        options = {"generation_config": config}
    else:
        model.generation_config.cache_implementation = kind
    with pytest.warns(UserWarning, match=f"cache_implementation='{kind}' is ignored") as warned:
        assert _greedy(model, ids, 8, **options) == expected
    assert sum("is ignored" in str(warning.message) for warning in warned) == 1


@pytest.mark.parametrize("lengths", [(12, 7), (3, 12)])
def test_padding_on_the_right_is_the_bases_business_while_nothing_leaves(lengths: tuple[int, int]) -> None:
    model, plain, ids = adapted(window=17, sinks=3), base(), tokens(2, 12)
    mask = (torch.arange(12)[None] < torch.tensor(lengths)[:, None]).long()
    assert _greedy(model, ids, 8, attention_mask=mask) == _greedy(plain, ids, 8, attention_mask=mask)
    with pytest.raises(AHNError, match=r"may have 21 tokens, more than window \+ sinks = 20\. Pad on the left"):
        _greedy(model, ids, 9, attention_mask=mask)


@torch.no_grad()
def test_any_mask_is_the_bases_business_while_nothing_leaves() -> None:
    """Without a cache: holes within rows, four dimensions."""
    model, plain, ids = adapted(window=13, sinks=3), base(), tokens(2, 12)
    holes = torch.ones(2, 12, dtype=torch.long)
    holes[0, 4:6] = holes[1, 9:] = 0
    square = torch.ones(12, 12, dtype=torch.bool).tril().expand(2, 1, 12, 12).clone()
    square[:, :, 7:, 2] = False
    for mask in (holes, square):
        given: dict[str, Any] = {"attention_mask": mask, "use_cache": False}
        assert torch.equal(model(ids, **given).logits, plain(ids, **given).logits)
    with pytest.raises(AHNError, match="2-D attention_mask"):
        model(tokens(2, 40), attention_mask=torch.ones(2, 1, 40, 40, dtype=torch.bool), use_cache=False)


@torch.no_grad()
def test_a_text_goes_on_after_padding_on_the_right_until_something_leaves() -> None:
    model, plain, ids = adapted(window=17, sinks=3), base(), tokens(3, 21)
    begin = torch.tensor([[0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
    mask = torch.cat([begin, torch.ones(3, 15, dtype=torch.long)], dim=1)
    states: list[Any] = [None, None]
    for start, stop in ((0, 6), (6, 7), (7, 20)):
        outputs = [
            each(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=state, use_cache=True)
            for each, state in zip((model, plain), states, strict=True)
        ]
        states = [output.past_key_values for output in outputs]
        assert torch.equal(outputs[0].logits, outputs[1].logits)
    for step in ({"attention_mask": mask}, {}):
        with pytest.raises(AHNError, match="padding between real tokens"):
            model(ids[:, 20:], past_key_values=states[0], **step)


# -- refused before work begins ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [12, 60], ids=["within the window", "beyond it"])
@pytest.mark.parametrize("name", ["attention_mask", "position_ids"])
@torch.no_grad()
def test_arguments_of_another_length_are_refused_whole(name: str, length: int) -> None:
    model = adapted(window=13, sinks=3, prefill_chunk_size=5)
    for columns in (length - 3, length + 20):
        given = torch.ones(1, columns, dtype=torch.long) if name == "attention_mask" else torch.arange(columns)[None]
        with pytest.raises((AHNError, RuntimeError), match=rf"{name} has {columns} columns|size of tensor"):
            model(tokens(1, length), **{name: given})


def test_exporting_is_refused() -> None:
    model, ids = adapted(window=13, sinks=3), tokens(1, 60)
    for export in (torch.export.export, torch.jit.trace):
        with pytest.raises(AHNError, match="cannot be exported or traced"):
            export(model, (ids,))


def test_continuous_batching_is_refused() -> None:
    model = adapted(window=13, sinks=3)
    with pytest.raises(AHNError, match="use `ahn serve`"):
        model.generate_batch([[1, 2, 3]])


def test_copies_in_threads_are_refused() -> None:
    """What torch.nn.DataParallel makes for the second GPU: it would run what is on the first."""
    model = adapted(window=13, sinks=3)
    with pytest.raises(AHNError, match="DataParallel copies a model to each GPU without its memory"):
        model._replicate_for_data_parallel()
    ahn.detach(model)
    model._replicate_for_data_parallel()


@pytest.mark.parametrize("training", [True, False])
def test_a_memory_is_in_the_mode_of_its_layer(training: bool) -> None:
    model = ahn.attach(base().train(training), ahn.AHNConfig(window=13, sinks=3, router=True))
    assert {module.training for module in model.modules()} == {training}


def test_models_that_attend_in_both_directions_are_refused() -> None:
    for plain in (base(is_causal=False), base("gemma3", use_bidirectional_attention=True)):
        with pytest.raises(AHNError, match="attends in both directions"):
            ahn.attach(plain, ahn.AHNConfig(window=13, sinks=3))


def test_a_model_of_an_adapted_ones_configuration_has_no_memory() -> None:
    """As trainers make a reference model."""
    model = adapted(window=13, sinks=3)
    with pytest.raises(AHNError, match="has no memory itself: attach or load one"):
        type(model)(model.config)(tokens(1, 60))


def test_fewer_layers_than_the_configuration_says_are_refused() -> None:
    plain = base(layer_types=["full_attention"] * 2)
    plain.model.layers = plain.model.layers[:1]
    with pytest.raises(AHNError, match="has 1 layers, and its configuration says what 2 are"):
        ahn.attach(plain, ahn.AHNConfig(window=13, sinks=3))


# -- what others put around a forward ----------------------------------------------------------------------------------


@torch.no_grad()
def test_a_forward_that_was_wrapped_meanwhile_is_the_bases_after_detach() -> None:
    """accelerate puts one around it for mixed precision, torch.compile and TRL likewise."""
    model, ids = adapted(window=13, sinks=3), tokens(1, 60)
    inner, expected = model.forward, base()(ids).logits
    model.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    assert relative_error(model(ids).logits, expected) > 0.003
    ahn.detach(model)
    assert torch.equal(model(ids).logits, expected)
