"""merge and split: bytes, layout, atomicity, memory and refusals. No model is built by either."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import FAULTS
from safetensors.torch import save_file
from tiny_checkpoints import (
    LEFTOVERS,
    all_tensors,
    as_published,
    attached,
    edit_config,
    logits,
    make_adapter,
    make_base,
    publish,
    same_bits,
)
from transformers import AutoModelForCausalLM

import ahn
from ahn.checkpoint import from_pretrained, load_adapter, merge, split, stream

Copy = Callable[[Path], Path]


@pytest.fixture
def merged(tmp_path: Path, base: Path, adapter: Path) -> Path:
    return merge(base, adapter, tmp_path / "merged")


@pytest.mark.sample(4)
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_then_split_gives_both_back_bit_for_bit(
    tmp_path: Path, family: str, shard: str, dtype: torch.dtype
) -> None:
    base = make_base(tmp_path / "base", family, shard=shard, dtype=dtype)
    adapter = make_adapter(tmp_path / "adapter", base, memory="mamba2", full_attention_layers=(0,))
    assert len(list(base.glob("*.safetensors"))) == 1 or shard == "20KB"
    merge(base, adapter, tmp_path / "merged")
    assert same_bits(all_tensors(tmp_path / "merged"), all_tensors(base) | all_tensors(adapter))
    split(tmp_path / "merged", tmp_path / "parts")
    assert same_bits(all_tensors(tmp_path / "parts" / "base"), all_tensors(base))
    assert same_bits(all_tensors(tmp_path / "parts" / "adapter"), all_tensors(adapter))
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        read = (lambda file: json.loads(file.read_text())) if name.endswith("json") else Path.read_bytes
        assert read(tmp_path / "parts" / "base" / name) == read(base / name)
    own, given = (json.loads((p / "config.json").read_text()) for p in (tmp_path / "parts" / "adapter", adapter))
    assert own["ahn"] == given["ahn"] and own["base_model_name_or_path"] == "../base"


def test_weights_that_are_no_numbers_keep_their_bits_too(tmp_path: Path, base: Path, adapter: Path, copy: Copy) -> None:
    # A base may hold NaN, integers and 8-bit floats: merging is not the place to judge it.
    strange = copy(base)
    extra = {
        "strange.nan": torch.tensor([torch.nan, -0.0]),
        "strange.int": torch.tensor([[1, 2]], dtype=torch.int8),
        "strange.f8": torch.randn(4).to(torch.float8_e4m3fn),
        "strange.scalar": torch.tensor(3, dtype=torch.int64),
    }
    wanted = all_tensors(base) | extra
    save_file(wanted, strange / "model.safetensors", metadata={"format": "pt"})
    merge(strange, adapter, tmp_path / "out")
    split(tmp_path / "out", tmp_path / "parts")
    assert same_bits(all_tensors(tmp_path / "parts" / "base"), wanted)


def test_index_lists_every_tensor_where_it_is(merged: Path) -> None:
    index = json.loads((merged / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(all_tensors(merged))
    for name, file in index["weight_map"].items():
        assert name in stream.read_header(merged / file)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in all_tensors(merged).values())
    # transformers prefers a plain model.safetensors to the index: it would lose the adapter.
    assert not (merged / "model.safetensors").exists()


def test_the_index_decides_which_copy_of_a_tensor_counts(tmp_path: Path, adapter: Path) -> None:
    base = make_base(tmp_path / "base", shard="20KB")
    wanted = all_tensors(base)
    weight_map = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    stale, *_ = (name for name, file in weight_map.items() if file < SHARD)  # read earlier
    own = {name: tensor for name, tensor in wanted.items() if weight_map[name] == SHARD}
    save_file(own | {stale: torch.zeros(1)}, base / SHARD)
    merge(base, adapter, tmp_path / "out")
    assert same_bits(all_tensors(tmp_path / "out"), wanted | all_tensors(adapter))


def test_published_adapter_merges_without_its_leftovers(
    tmp_path: Path, base: Path, adapter: Path, copy: Copy, caplog: pytest.LogCaptureFixture
) -> None:
    merge(base, publish(copy(adapter), use_ahn_router=True), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["ahn"]["window"], config["ahn"]["sinks"]) == (32640, 128) and "256" in caplog.text
    assert not {"sliding_window_type", "_layer_implementation", "dy_sliding_window", "loss_type"} & set(config)
    assert config["sliding_window"] is None


def test_published_merged_splits(tmp_path: Path, base: Path, adapter: Path, merged: Path) -> None:
    split(as_published(merged), tmp_path / "parts")
    parts = tmp_path / "parts"
    assert same_bits(all_tensors(parts / "base"), all_tensors(base))
    assert same_bits(all_tensors(parts / "adapter"), all_tensors(adapter))
    config = json.loads((parts / "base" / "config.json").read_text())
    assert not (set(LEFTOVERS) - {"sliding_window"}) & set(config) and config["sliding_window"] is None
    again = from_pretrained(parts / "adapter", window=8, sinks=2)
    assert torch.equal(logits(again), logits(load_adapter(AutoModelForCausalLM.from_pretrained(base), adapter)))


def test_progress_ends_at_all_bytes(tmp_path: Path, base: Path, adapter: Path) -> None:
    for call, *arguments in ((merge, base, adapter, tmp_path / "out"), (split, tmp_path / "out", tmp_path / "parts")):
        seen: list[tuple[int, int]] = []
        call(*arguments, progress=lambda done, total, seen=seen: seen.append((done, total)))
        total = sum(t.nbytes for path in (base, adapter) for t in all_tensors(path).values())
        assert seen[-1] == (total, total) and seen == sorted(seen) and len({t for _, t in seen}) == 1


def test_memory_is_bounded(tmp_path: Path, base: Path, adapter: Path, copy: Copy, monkeypatch: Any) -> None:
    big = copy(base)
    save_file(all_tensors(base) | {"extra.weight": torch.zeros(6 << 20)}, big / "model.safetensors")  # 24 MiB
    monkeypatch.setattr(stream, "SLICE", 1 << 20)
    tracemalloc.start()
    merge(big, adapter, tmp_path / "merged")
    split(tmp_path / "merged", tmp_path / "parts")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 << 20  # a slice of 1 MiB, headers, and the modules that transformers imports on first use


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_adapters_are_refused(tmp_path: Path, base: Path, adapter: Path, copy: Copy, fault: str) -> None:
    damage, words = FAULTS[fault]
    damaged = copy(adapter)
    damage(damaged)
    with pytest.raises(ahn.AHNError, match=words):
        merge(base, damaged, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def _edit_index(path: Path, edit: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((path / "model.safetensors.index.json").read_text())
    edit(index["weight_map"])
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


SHARD = "model-00002-of-00006.safetensors"
BASE_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated shard": (lambda p: _cut(p / SHARD), rf"{SHARD} is truncated"),
    "missing shard": (lambda p: (p / SHARD).unlink(), rf"{SHARD} cannot be read: No such file"),
    "index promises too much": (
        lambda p: _edit_index(p, lambda m: m.update({"model.nothing": SHARD})),
        r"lacks model\.nothing",
    ),
    "index is empty": (lambda p: _edit_index(p, lambda m: m.clear()), "no weight_map"),
    "index leaves the directory": (
        lambda p: _edit_index(p, lambda m: m.update({"x": "../x.safetensors"})),
        "not a file of the same directory",
    ),
    "other layers": (
        lambda p: edit_config(p, lambda c: c.update(num_hidden_layers=2, layer_types=None)),
        "layers 2 instead of 3",
    ),
    "other heads": (lambda p: edit_config(p, lambda c: c.update(num_attention_heads=8)), "heads 8 instead of 4"),
    "other family": (lambda p: edit_config(p, lambda c: c.update(model_type="qwen3")), "model_type qwen3 instead of"),
}


@pytest.mark.parametrize("fault", BASE_FAULTS)
def test_faulty_bases_are_refused(tmp_path: Path, adapter: Path, fault: str) -> None:
    base = make_base(tmp_path / "base", shard="20KB")
    assert (base / SHARD).exists()
    damage, words = BASE_FAULTS[fault]
    damage(base)
    with pytest.raises(ahn.AHNError, match=words):
        merge(base, adapter, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_kinds_cannot_be_mixed_up(tmp_path: Path, base: Path, adapter: Path, merged: Path) -> None:
    out = tmp_path / "out"
    for wrong_base in (adapter, merged):
        with pytest.raises(ahn.AHNError, match="expected a plain model without AHN"):
            merge(wrong_base, adapter, out)
    for wrong_adapter in (base, merged):
        with pytest.raises(ahn.AHNError, match="expected an AHN adapter"):
            merge(base, wrong_adapter, out)
    for wrong_whole in (base, adapter):
        with pytest.raises(ahn.AHNError, match="expected a merged checkpoint"):
            split(wrong_whole, out)


def test_an_output_in_use_is_refused(tmp_path: Path, base: Path, adapter: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    merge(base, adapter, taken)  # empty is fine
    before = all_tensors(taken)
    with pytest.raises(ahn.AHNError, match="exists already"):
        merge(base, adapter, taken)
    assert same_bits(all_tensors(taken), before)
    with pytest.raises(ahn.AHNError, match="exists already"):
        split(taken, base / "config.json")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_merge_leaves_nothing(tmp_path: Path, base: Path, adapter: Path, error: type) -> None:
    def interrupt(done: int, total: int) -> None:
        assert any(".partial" in path.name for path in tmp_path.iterdir())
        if done > total // 2:
            raise error("stop")

    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else ahn.AHNError, match="stop"):
        merge(base, adapter, tmp_path / "out", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_noticed_before_writing(tmp_path: Path, base: Path, adapter: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(ahn.AHNError, match="MB free"):
        merge(base, adapter, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_code_that_a_base_comes_with_is_not_the_merged_models(
    tmp_path: Path, base: Path, adapter: Path, copy: Copy
) -> None:
    """It knows no memory: whoever loads with trust_remote_code would have full attention without a word."""
    source = copy(base)
    config = json.loads((source / "config.json").read_text())
    own = config | {"auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    (source / "config.json").write_text(json.dumps(own))
    (source / "own.py").write_text("raise SystemExit")
    merge(source, adapter, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert loaded.ahn_config is not None
    loaded.save_pretrained(tmp_path / "saved")
    for folder in ("out", "saved"):
        assert "auto_map" not in json.loads((tmp_path / folder / "config.json").read_text())
    split(tmp_path / "out", tmp_path / "parts")
    assert json.loads((tmp_path / "parts" / "base" / "config.json").read_text()) == own


def test_only_files_that_belong_to_the_model_are_copied(tmp_path: Path, base: Path, adapter: Path, copy: Copy) -> None:
    source = copy(base)
    for name in ("pytorch_model.bin", "model.gguf", "consolidated.safetensors", ".gitattributes"):
        (source / name).write_text("not wanted")
    (source / "LICENSE").write_text("wanted")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool.jinja").write_text("wanted")
    (source / "onnx").mkdir()
    (source / "linked.txt").symlink_to(source / "LICENSE")
    merge(source, adapter, tmp_path / "out")
    copied = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {"LICENSE", "tokenizer.json", "linked.txt", "additional_chat_templates/tool.jinja"} < copied
    assert not any("not wanted" in (tmp_path / "out" / name).read_bytes().decode(errors="replace") for name in copied)
    assert not (tmp_path / "out" / "linked.txt").is_symlink() and not (tmp_path / "out" / "onnx").exists()


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_other_architectures(tmp_path: Path, family: str) -> None:
    # Gemma's own sliding-window layers get no memory; the window of its configuration is real and must survive.
    own = {"layer_types": ["sliding_attention", "full_attention", "full_attention"], "sliding_window": 8}
    base = make_base(tmp_path / "base", family, **own if family == "gemma3_text" else {})
    adapter = make_adapter(tmp_path / "adapter", base)
    wanted = logits(from_pretrained(adapter))
    split(merge(base, adapter, tmp_path / "merged"), tmp_path / "parts")
    assert torch.equal(logits(from_pretrained(tmp_path / "merged")), wanted)
    assert torch.equal(logits(from_pretrained(tmp_path / "parts" / "adapter")), wanted)
    assert any(".layers.0." in name for name in all_tensors(adapter)) == (family == "llama")


def test_merged_equals_attached(base: Path, merged: Path, adapter: Path) -> None:
    model = attached(base, router=True)
    with torch.no_grad():
        for name, parameter in ahn.adapter_parameters(model).items():
            parameter.copy_(all_tensors(adapter)[name])
    assert torch.equal(logits(from_pretrained(merged)), logits(model))
