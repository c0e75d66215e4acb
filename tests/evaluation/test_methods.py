"""A memory and its baselines: the same path, the same number of keys, and fingerprints that tell weights apart."""

from __future__ import annotations

import shutil
from pathlib import Path

import benchmark_files as files
import models
import pytest
import torch
from safetensors.torch import load_file, save_file

import ahn
from ahn.checkpoint import merge
from ahn.checkpoint.directory import Checkpoint
from ahn.errors import AHNError
from ahn.evaluation import methods
from ahn.evaluation.results import digest

TEXT = "The lamp of the old harbour was blue, and nobody asked why the mill stood still for seven winters."


@torch.no_grad()
def logits(evaluated: methods.Evaluated) -> torch.Tensor:
    ids = evaluated.tokenizer(TEXT, return_tensors="pt")["input_ids"]
    return evaluated.model(ids).logits


def test_the_adapter_is_at_work(tiny: tuple[str, str]) -> None:
    loaded = methods.load("ahn", *tiny, device="cpu")
    assert loaded.model.ahn_config.memory == "gated_deltanet"
    assert (loaded.settings["window"], loaded.settings["sinks"]) == (files.WINDOW, files.SINKS)
    assert loaded.settings["memory"] == "gated_deltanet"
    assert len(loaded.settings["weights"]) == 2
    other = methods.load("ahn", *tiny, window=20, sinks=4, device="cpu")
    assert (other.settings["window"], other.settings["sinks"], other.settings["budget"]) == (20, 4, 24)


def test_full_attention_is_the_base_model(tiny: tuple[str, str]) -> None:
    base = methods.load("full", tiny[0], device="cpu")
    assert not hasattr(base.model, "ahn_config")
    assert base.settings["memory"] is None
    assert "window" not in base.settings
    through_adapter = methods.load("full", *tiny, window=20, device="cpu")
    assert logits(through_adapter).equal(logits(base))
    # So one full run serves the comparison with every adapter.
    assert through_adapter.settings == base.settings
    assert methods.load("full", tiny[1], device="cpu").settings == base.settings


@pytest.mark.sample(4)
@pytest.mark.parametrize("method", ["window", "ct-max", "ct-avg"])
@pytest.mark.parametrize(("window", "sinks"), [(None, None), (40, 4), (2, 0), (7, 0)])
def test_baselines_keep_as_many_keys(method: str, window: int | None, sinks: int | None, tiny: tuple[str, str]) -> None:
    loaded = methods.load(method, *tiny, window=window, sinks=sinks, device="cpu")
    config, settings = loaded.model.ahn_config, loaded.settings
    memory = loaded.model.get_decoder().layers[0].ahn.fn
    budget = (files.WINDOW if window is None else window) + (files.SINKS if sinks is None else sinks)
    assert config.window + config.sinks + memory.slot_count(config.window) == settings["budget"] <= budget
    # The widest window that fits: one more token would not.
    assert config.window + 1 + config.sinks + memory.slot_count(config.window + 1) > budget
    assert settings["memory"] == memory.name == methods.BASELINES[method]
    assert settings["sinks"] == (files.SINKS if sinks is None else sinks)
    assert not list(memory.parameters())


@pytest.mark.parametrize("method", ["window", "ct-max", "ct-avg"])
def test_slots_that_quantized_tokens_bring_count_as_well(method: str, tiny: tuple[str, str]) -> None:
    """They reach back as far again as window and quantized tokens together."""
    loaded = methods.load(method, *tiny, window=40, sinks=4, quantized=24, device="cpu")
    config, layers = loaded.model.ahn_config, loaded.model.get_decoder().layers
    with torch.no_grad():
        cache = loaded.model(torch.randint(20, (1, 200)), use_cache=True).past_key_values
    slots = cache.layers[0].state.memory["keys"].shape[2] - 1 if layers[0].ahn.fn.slot_count(1) else 0
    assert loaded.settings["slots"] == slots
    assert config.window + config.sinks + slots == loaded.settings["budget"] <= 44
    assert config.window + 1 + config.sinks + layers[0].ahn.fn.slot_count(config.window + 1 + 24) > 44


def test_quantized_tokens_are_a_setting_only_where_there_are_some(tiny: tuple[str, str]) -> None:
    for method in ("ahn", "window"):
        without, coarse = (methods.load(method, *tiny, quantized=n, device="cpu") for n in (0, 16))
        assert without.settings == methods.load(method, *tiny, device="cpu").settings
        assert "quantized" not in without.settings and coarse.settings["quantized"] == 16
        assert coarse.settings["budget"] == without.settings["budget"]
        assert digest(coarse.settings) != digest(without.settings)


def test_heads_are_a_setting_only_where_some_are_named() -> None:
    every, one = (
        methods.describe(ahn.attach(models.base(), ahn.AHNConfig("retained", 9, 2, slot_heads=heads)), "ahn")
        for heads in (None, ((0, 1),))
    )
    assert "slot_heads" not in every and one["slot_heads"] == ((0, 1),)
    assert digest(every) != digest(one)


def test_bits_are_a_setting_of_what_keeps_tokens() -> None:
    coded, exact = (
        methods.describe(ahn.attach(models.base(), ahn.AHNConfig("retained", 9, 2, key_bits=n, value_bits=n)), "ahn")
        for n in (4, 16)
    )
    assert (coded["key_bits"], exact["value_bits"]) == (4, 16) and digest(coded) != digest(exact)


def test_the_papers_budget() -> None:
    """128 + 32640 of the paper: a fifth of the window goes to slots, since they are a quarter of what remains."""
    config = methods.baseline("ct-avg", ahn.AHNConfig())
    assert (config.window, config.sinks) == (26112, 128)
    assert config.window + 26112 // 4 == 32640


def test_a_plain_model_serves_every_baseline_but_no_memory(tiny: tuple[str, str]) -> None:
    assert methods.load("window", tiny[0], window=20, sinks=2, device="cpu").settings["budget"] == 22
    coarse = [
        methods.load(method, tiny[0], window=20, sinks=2, quantized=9, device="cpu") for method in ("ahn", "window")
    ]
    assert [one.settings["quantized"] for one in coarse] == [9, 9] and logits(coarse[0]).equal(logits(coarse[1]))
    with pytest.raises(AHNError, match="is a plain model without a memory; name an adapter for it with --adapter"):
        methods.load("ahn", tiny[0])
    with pytest.raises(AHNError, match="Unknown method 'retrieval'; choose one of ahn, window, full, ct-max, ct-avg"):
        methods.load("retrieval", *tiny)
    with pytest.raises(AHNError, match="has no room for the slots of ct_max"):
        methods.load("ct-max", tiny[0], window=1, device="cpu")


def test_a_merged_checkpoint_serves_every_method(tiny: tuple[str, str], tmp_path: Path) -> None:
    merged = str(tmp_path / "merged")
    merge(*tiny, merged)
    assert logits(methods.load("ahn", merged, device="cpu")).equal(logits(methods.load("ahn", *tiny, device="cpu")))
    assert logits(methods.load("full", merged, device="cpu")).equal(logits(methods.load("full", *tiny, device="cpu")))


@pytest.mark.parametrize("dtype", ["float64", "int8"])
@pytest.mark.parametrize("method", ["ahn", "full"])
def test_mistakes_in_loading(method: str, dtype: str, tiny: tuple[str, str]) -> None:
    adapter = tiny[1] if method == "ahn" else None
    with pytest.raises(AHNError, match=f"Unknown dtype '{dtype}'"):
        methods.load(method, tiny[0], adapter, device="cpu", dtype=dtype)


# -- fingerprints --------------------------------------------------------------------------------------------------


def fingerprint(path: Path) -> str:
    return methods.fingerprint(Checkpoint.open(path))


def test_a_fingerprint_is_of_the_content_not_of_the_place(tiny: tuple[str, str], tmp_path: Path) -> None:
    for source in map(Path, tiny):
        moved = Path(shutil.copytree(source, tmp_path / f"moved-{source.name}"))
        assert fingerprint(moved) == fingerprint(source)
        tensors = load_file(moved / "model.safetensors")
        list(tensors.values())[-1].view(-1)[-1] += 1e-3
        save_file(tensors, moved / "model.safetensors", metadata={"format": "pt"})
        assert fingerprint(moved) != fingerprint(source)


def test_a_large_file_is_sampled(tiny: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Header, first and last bytes are always looked at; training changes all that lies between."""
    monkeypatch.setattr(methods, "SAMPLED", 64)
    moved = Path(shutil.copytree(tiny[0], tmp_path / "moved"))
    before = fingerprint(moved)
    weights = moved / "model.safetensors"
    assert weights.stat().st_size > 64 * methods.PLACES
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert fingerprint(moved) != before
    tensors = load_file(moved / "model.safetensors")
    save_file({name: 1.01 * tensor for name, tensor in tensors.items()}, weights, metadata={"format": "pt"})
    assert fingerprint(moved) != before


def test_without_an_ahn_a_baseline_keeps_what_the_base_bears() -> None:
    model = models.base(max_position_embeddings=512)
    for given, window in ({}, 224), ({"window": 20}, 20):
        with methods.make("window", methods.of_base(model), **given).on(model):
            assert (model.ahn_config.window, model.ahn_config.sinks) == (window, 32)
