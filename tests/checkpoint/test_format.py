"""Configurations: our block, the published keys with their left-overs, and which base an adapter belongs to."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import HEADS, LAYERS, LEFTOVERS, SIZES
from transformers import Gemma3TextConfig, Qwen2Config, Qwen3Config

import ahn
from ahn import memory
from ahn.checkpoint import format
from ahn.checkpoint.directory import Checkpoint, is_ahn, short_name
from ahn.checkpoint.validate import expected_shapes
from ahn.model import saving
from ahn.shape import ModelShape

PUBLISHED = {"model_type": "qwen2", "_ahn_implementation": "GatedDeltaNet"} | SIZES | LEFTOVERS


def checkpoint(config: dict[str, Any]) -> Checkpoint:
    return Checkpoint(Path("somewhere"), config, {})


def test_the_trap_of_published_windows_is_avoided_and_reported(caplog: pytest.LogCaptureFixture) -> None:
    published = checkpoint(PUBLISHED)
    settings = format.read_settings(published)
    assert (settings.window, settings.sinks) == (32640, 128)
    with caplog.at_level(logging.INFO, logger="ahn"):
        format.report_window(published, settings, given=False)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert all(word in record.getMessage() for word in ("32640", "128", "256", "left-over"))


def test_given_window_and_sinks_win_and_are_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    settings = format.read_settings(checkpoint(PUBLISHED), window=9, sinks=0)
    assert (settings.window, settings.sinks) == (9, 0)
    with caplog.at_level(logging.INFO, logger="ahn"):
        format.report_window(checkpoint(PUBLISHED), settings, given=True)
    assert [record.levelno for record in caplog.records] == [logging.INFO]
    assert format.read_settings(checkpoint(PUBLISHED), window=9).sinks == 128
    assert format.read_settings(checkpoint(PUBLISHED)).quantized == 0
    assert format.read_settings(checkpoint(PUBLISHED), quantized=7).quantized == 7
    assert format.read_settings(checkpoint(PUBLISHED)).max_distance == 0
    assert format.read_settings(checkpoint(PUBLISHED), max_distance=512).max_distance == 512
    assert format.read_settings(checkpoint(PUBLISHED), sinks=9).window == 32640


@pytest.mark.parametrize("name", memory.names())
@pytest.mark.parametrize("router", [False, True])
def test_settings_survive_saving(name: str, router: bool) -> None:
    settings = ahn.AHNConfig(
        memory=name,
        window=5,
        sinks=3,
        full_attention_layers=(1,),
        router=router,
        q_proj=not router,
        prefill_chunk_size=7,
        quantized=11,
        max_distance=64,
    )
    config = saving.with_ahn({"model_type": "qwen2"} | SIZES, settings, "base")
    assert format.read_settings(checkpoint(config)) == settings
    # The published names must say the same to tools that know only those.
    published = {key: value for key, value in config.items() if key not in ("ahn", "base_model_name_or_path")}
    given = {"window": 5, "sinks": 3, "quantized": 11, "max_distance": 64}
    read = format.read_settings(checkpoint(published), **given)
    assert read.replace(prefill_chunk_size=7) == settings
    assert saving.base_config(config) == {"model_type": "qwen2"} | SIZES


def test_bits_survive_saving_and_older_files_mean_two() -> None:
    """Adapters from before the options were measured with two bits of keys after RoPE, sinks where they stand."""
    settings = ahn.AHNConfig(quantized=5, key_bits=3, value_bits=4, keys_before_rope=False, max_distance=64)
    config = saving.with_ahn({}, settings, None)
    assert format.read_settings(checkpoint(config)) == settings
    for name in ("key_bits", "value_bits", "keys_before_rope", "max_distance"):
        del config["ahn"][name]
    older = {"key_bits": 2, "value_bits": 2, "keys_before_rope": False, "max_distance": 0}
    assert format.read_settings(checkpoint(config)) == settings.replace(**older)


def test_unknown_fields_of_our_block_are_ignored_and_said(caplog: pytest.LogCaptureFixture) -> None:
    config = saving.with_ahn({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}, ahn.AHNConfig(), None)
    with caplog.at_level(logging.WARNING, "ahn"):
        assert format.read_settings(checkpoint(config)) == ahn.AHNConfig(max_distance=None)
        assert not caplog.messages
        config["ahn"] |= {"of_the_future": 1}
        assert format.read_settings(checkpoint(config)) == ahn.AHNConfig(max_distance=None)
    assert "does not know ['of_the_future']" in caplog.text


@pytest.mark.parametrize(
    "changes",
    [
        {"_attn_implementation": "kernels-community/flash-attn3"},
        {"attn_implementation": "somebody/attention@main:run"},
        {"attn_implementation": {"": "sdpa", "vision_config": "somebody/attention"}},
        {"experts_implementation": "somebody/experts"},
        {"text_config": {"_attn_implementation": "somebody/attention"}},
    ],
)
def test_kernels_of_the_hub_that_a_file_asks_for_are_refused(changes: dict[str, Any]) -> None:
    """transformers would fetch and run them, whatever `trust_remote_code` says."""
    config = {"model_type": "qwen2"} | changes
    with pytest.raises(ahn.AHNError, match="asks for code from the Hub"):
        format.transformers_config(config, Path("model"))
    format.transformers_config({"model_type": "qwen2", "attn_implementation": "sdpa"}, Path("model"))


@pytest.mark.parametrize(
    ("value", "layers"),
    [(None, ()), ("", ()), ([], ()), ("0,1", (0, 1)), ("0, 1", (0, 1)), ([2, 0], (0, 2)), (["1"], (1,)), (..., ())],
)
def test_full_attention_layers_in_every_published_form(value: object, layers: tuple[int, ...]) -> None:
    config = PUBLISHED | ({} if value is ... else {"fa_layer_ids": value})
    assert format.read_settings(checkpoint(config)).full_attention_layers == layers


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"fa_layer_ids": "first"}, "fa_layer_ids"),
        ({"fa_layer_ids": 3}, "fa_layer_ids"),
        ({"_ahn_implementation": "Elephant"}, "Elephant"),
        ({"_ahn_implementation": None}, "names no memory"),
        ({"ahn": {"window": 4}}, "names no memory"),
        ({"ahn": {"memory": "deltanet", "window": -4}}, "window"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ahn.AHNError, match=match):
        format.read_settings(checkpoint(PUBLISHED | changes))


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_leftovers_never_reach_the_base_model(family: str) -> None:
    # use_sliding_window and layer_types are set too: a user of the published code had to switch its window on.
    leftovers = {"use_sliding_window": True, "max_window_layers": 0, "layer_types": ["sliding_attention"] * LAYERS}
    config = PUBLISHED | leftovers | {"model_type": family, "architectures": ["Qwen2MemForCausalLM"], "auto_map": {}}
    base = format.transformers_config(config, Path("somewhere"))
    assert isinstance(base, Qwen2Config if family == "qwen2" else Qwen3Config)
    assert base.sliding_window is None and set(base.layer_types) == {"full_attention"}
    assert base.architectures == [f"{family.title()}ForCausalLM"]
    for name in ("_ahn_implementation", "_layer_implementation", "loss_type", "dy_sliding_window", "auto_map"):
        assert not hasattr(base, name), name


def test_a_base_with_a_window_of_its_own_keeps_it() -> None:
    own = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1} | SIZES
    config = saving.with_ahn(own, ahn.AHNConfig(), None)
    assert saving.base_config(config) == own
    assert format.transformers_config(config, Path("x")).layer_types == ["full_attention"] + ["sliding_attention"] * 2


def test_unusable_base_configurations_are_refused() -> None:
    with pytest.raises(ahn.AHNError, match="model_type 'elephant'"):
        format.transformers_config({"model_type": "elephant"}, Path("x"))
    with pytest.raises(ahn.AHNError, match="not a valid qwen2"):
        format.transformers_config({"model_type": "qwen2", "hidden_size": "large"}, Path("x"))


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 64},
        {"num_hidden_layers": 4},
        {"num_attention_heads": 2},
        {"num_key_value_heads": 1},
        {"head_dim": 16},
    ],
)
def test_a_base_of_another_shape_is_refused(change: dict[str, int]) -> None:
    base = Qwen3Config(**SIZES | change)
    adapter = checkpoint(PUBLISHED | {"model_type": "qwen3"})
    with pytest.raises(ahn.AHNError, match=r"does not fit the base model other: it has .* instead of"):
        format.check_base(adapter, base, "other")


def test_another_vocabulary_fits_but_another_family_does_not() -> None:
    adapter = checkpoint(PUBLISHED | {"model_type": "qwen3"})
    assert format.check_base(adapter, Qwen3Config(**SIZES | {"vocab_size": 99}), "x").heads == HEADS
    with pytest.raises(ahn.AHNError, match="model_type gemma3 instead of qwen3"):
        format.check_base(adapter, Gemma3TextConfig(**SIZES), "x")


def test_expected_tensors_are_those_of_an_attached_model() -> None:
    from transformers import Qwen2ForCausalLM

    for name in memory.names():
        settings = ahn.AHNConfig(memory=name, full_attention_layers=(1,), router=True, q_proj=True)
        config = Qwen2Config(**SIZES)
        model = ahn.attach(Qwen2ForCausalLM(config), settings)
        found = {short_name(key): tuple(p.shape) for key, p in ahn.adapter_parameters(model).items()}
        assert found == expected_shapes(ModelShape.from_config(config), settings)


def test_expected_tensors_of_the_published_3b() -> None:
    config = Qwen2Config(hidden_size=2048, num_attention_heads=16, num_key_value_heads=2, num_hidden_layers=36)
    shapes = expected_shapes(ModelShape.from_config(config), ahn.AHNConfig())
    assert len(shapes) == 288  # docs/spec.md, section 7
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 12_982_464  # docs/spec.md, section 4


def test_only_ahn_names_are_taken_for_ahn() -> None:
    assert is_ahn("model.layers.12.ahn.fn.A_log") and is_ahn("language_model.model.layers.0.ahn_router.alpha")
    assert short_name("a.b.layers.3.ahn.fn.o_proj.weight") == "layers.3.ahn.fn.o_proj.weight"
    for name in ("model.layers.1.self_attn.q_proj.weight", "lm_head.weight", "model.ahn.fn.x", "model.layers.1.mahn.x"):
        assert not is_ahn(name)


def test_bases_are_named_so_that_neighbours_can_move(tmp_path: Path) -> None:
    (tmp_path / "models" / "base").mkdir(parents=True)
    base = tmp_path / "models" / "base"
    assert saving.base_reference(base, tmp_path / "models" / "adapter") == "../base"
    assert saving.base_reference(base, tmp_path / "models") == "./base"
    assert saving.base_reference(base, tmp_path / "elsewhere" / "adapter") == str(base)
    assert saving.base_reference("Qwen/Qwen2.5-3B-Instruct", tmp_path) == "Qwen/Qwen2.5-3B-Instruct"
