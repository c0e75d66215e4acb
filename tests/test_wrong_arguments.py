"""Public functions that are given another kind of thing than they take: one AHNError that says what to pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

import ahn
from ahn import inspect as looking
from ahn import tiny, training

WRONG = {
    "None": None,
    "path": "some/path",
    "Path": Path("x"),
    "class": Qwen2ForCausalLM,
    "module": torch.nn.Linear(2, 2),
    "configuration": Qwen2Config(),
    "number": 3,
}
OF_MODELS: dict[str, Callable[[Any], Any]] = {
    "attach": ahn.attach,
    "detach": ahn.detach,
    "disabled": lambda model: ahn.disabled(model).__enter__(),
    "set_window": lambda model: ahn.set_window(model, 4, 1),
    "adapter_parameters": ahn.adapter_parameters,
    "save_adapter": lambda model: ahn.save_adapter(model, "never"),
    "load_adapter": lambda model: ahn.load_adapter(model, tiny.adapter_path("gated_deltanet")),
    "AHNCache.for_model": ahn.AHNCache.for_model,
    "AHNCache.load": lambda model: ahn.AHNCache.load("never", model),
    "inspect.record": lambda model: looking.record(model).__enter__(),
    "inspect.without": lambda model: looking.without(model, write=True).__enter__(),
    "training.check_head": training.check_head,
}
OF_PATHS: dict[str, Callable[[Any], Any]] = {
    "from_pretrained": ahn.from_pretrained,
    "from_pretrained, base": lambda path: ahn.from_pretrained(tiny.adapter_path("gated_deltanet"), base=path),
    "merge, base": lambda path: ahn.merge(path, tiny.adapter_path("gated_deltanet"), "never"),
    "merge, adapter": lambda path: ahn.merge(tiny.path(), path, "never"),
    "merge, out": lambda path: ahn.merge(tiny.path(), tiny.adapter_path("gated_deltanet"), path),
    "split": lambda path: ahn.split(path, "never"),
    "split, out": lambda path: ahn.split(tiny.path(), path),
}


def small() -> Qwen2ForCausalLM:
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": 16}
    return Qwen2ForCausalLM(Qwen2Config(hidden_size=8, intermediate_size=8, **sizes))


@pytest.mark.parametrize("function", OF_MODELS)
@pytest.mark.parametrize("what", WRONG)
def test_what_takes_a_model_says_so(function: str, what: str) -> None:
    with pytest.raises(ahn.AHNError, match=r"takes a loaded transformers model, not .*from_pretrained"):
        OF_MODELS[function](WRONG[what])


@pytest.mark.parametrize("function", OF_PATHS)
@pytest.mark.parametrize("what", ["model", "number", "list"])
def test_what_takes_a_directory_says_so(function: str, what: str) -> None:
    with pytest.raises(ahn.AHNError, match="takes a directory or a Hub id"):
        OF_PATHS[function]({"model": WRONG["module"], "number": 3, "list": ["x"]}[what])


@pytest.mark.parametrize(
    "ids", [torch.ones(5, dtype=torch.long), [1, 2, 3], {"input_ids": 1}], ids=["one row", "list", "dict"]
)
def test_tokens_are_rows(ids: Any) -> None:
    """As a first try often has them: without the dimension of rows, or as the tokenizer gives them by itself."""
    model = ahn.attach(small(), ahn.AHNConfig(window=4, sinks=1))
    for use in (model, lambda given: model(input_ids=given, use_cache=False), model.generate):
        with pytest.raises(ahn.AHNError, match=r"input_ids must be a tensor of two dimensions, rows and tokens, got"):
            use(ids)


def test_swapped_arguments() -> None:
    with pytest.raises(ahn.AHNError, match="takes a loaded transformers model, not the string 'x'"):
        ahn.load_adapter("x", small())  # type: ignore[arg-type]
    with pytest.raises(ahn.AHNError, match="takes a directory or a Hub id"):
        ahn.load_adapter(small(), small())  # type: ignore[arg-type]


@pytest.mark.parametrize("config", ["gated_deltanet", {"window": 4}, 0, ahn.AHNConfig])
def test_settings_are_a_configuration(config: Any) -> None:
    for use in (
        lambda: ahn.attach(small(), config),
        lambda: ahn.cost(Qwen2Config(), config, 10),
        lambda: ahn.count_parameters(Qwen2Config(), config),
    ):
        with pytest.raises(ahn.AHNError, match=r"takes? an ahn\.AHNConfig"):
            use()


@pytest.mark.parametrize("dtype", ["bf16", "half-ish", "Tensor", 16])
def test_a_dtype_that_there_is_not(dtype: Any) -> None:
    with pytest.raises(ahn.AHNError, match=r"Unknown dtype .*bfloat16"):
        ahn.from_pretrained(tiny.adapter_path("gated_deltanet"), base=tiny.path(), dtype=dtype)


def test_a_class_without_source() -> None:
    from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

    scope: dict[str, Any] = {"Qwen2Attention": Qwen2Attention}
    exec("class Own(Qwen2Attention):\n    def forward(self, *args, **kwargs):\n        return 0", scope)
    model = small()
    model.model.layers[0].self_attn.__class__ = scope["Own"]
    with pytest.raises(ahn.AHNError, match="has no source to read"):
        ahn.attach(model)
    assert not hasattr(model, "ahn_config")


def test_a_plain_model_stays_as_it_is(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(small().config)
    with pytest.raises(ahn.AHNError, match="has no AHN"):
        ahn.save_adapter(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()
