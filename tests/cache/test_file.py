"""Conversation files that nobody should trust: each wrong one is an AHNError, and none reaches a kernel."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import mutated_bytes, mutated_json
from models import FEW, adapted, awaken, base, tokens
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.effort import examples
from torch import Tensor
from transformers import PreTrainedModel

import ahn
from ahn import AHNCache, AHNError
from ahn.cache.file import FIRST_FORMAT, SECOND_FORMAT, checksum
from ahn.cache.origin import first_fingerprint
from ahn.shape import ModelShape

WINDOW, SINKS = 4, 2
Change = Callable[[dict[str, Any], dict[str, Tensor]], object]


@torch.no_grad()
def conversation(model: PreTrainedModel, path: Path, length: int = 30, rows: int = 1) -> Path:
    cache = AHNCache.for_model(model)
    model(tokens(rows, length), past_key_values=cache)
    cache.save(path)
    return path


@torch.no_grad()
def go_on(model: PreTrainedModel, cache: AHNCache) -> Tensor:
    return model(tokens(1, 7, seed=5), past_key_values=cache).logits


def rewrite(path: Path, change: Change, sign: bool = True) -> Path:
    """Change a file's description or tensors; with `sign`, as one would who knows how checksums are made."""
    with safe_open(path, framework="pt") as file:
        description = json.loads(file.metadata()["ahn"])
    tensors = load_file(path)
    change(description, tensors)
    if sign and description.get("format") != FIRST_FORMAT:
        description["checksum"] = checksum(sorted(tensors.items()), description)
    save_file(tensors, path, {"ahn": json.dumps(description)})
    return path


def as_first_format(path: Path, model: PreTrainedModel) -> Path:
    """The file as the first version of this package wrote it."""

    def change(description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        kept = {name: description[name] for name in ("config", "seen")}
        description.clear()
        description |= kept | {"format": FIRST_FORMAT, "fingerprint": first_fingerprint(model), "tensors": [*tensors]}

    return rewrite(path, change)


def as_second_format(description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """The description as the second version of this package wrote it."""
    description["format"] = SECOND_FORMAT


def settings(**changes: Any) -> Change:
    return lambda description, _: description["config"].update(changes)


def tensor(name: str, change: Callable[[Tensor], Tensor]) -> Change:
    return lambda _, tensors: tensors.update({name: change(tensors[name]).contiguous()})


KEYS, VALUES, GATE, STATE = (f"layers.1.{name}" for name in ("keys", "values", "gates.beta", "state.state"))
FAULTS: dict[str, Change] = {
    "window + 1": settings(window=WINDOW + 1),
    "window - 1": settings(window=WINDOW - 1),
    "window 0": settings(window=0),
    "window huge": settings(window=10**30),
    "window true": settings(window=True),
    "window text": settings(window="4"),
    "sinks + 1": settings(sinks=SINKS + 1),
    "sinks for window": settings(sinks=SINKS + 1, window=WINDOW - 2),
    "quantized": settings(quantized=3),
    "quantized huge": settings(quantized=2**39),
    "memory": settings(memory="mamba2"),
    "memory list": settings(memory=[]),
    "memory forgets": settings(memory="window_only"),
    "router": settings(router=True),
    "layers": settings(full_attention_layers=[0]),
    "layers text": settings(full_attention_layers="01"),
    "layers nested": settings(full_attention_layers=[[0]]),
    "chunk": settings(prefill_chunk_size=0),
    "unknown setting": settings(more=1),
    "no settings": lambda d, _: d.pop("config"),
    "settings list": lambda d, _: d.update(config=[]),
    "seen fewer": lambda d, _: d.update(seen=3),
    "seen 0": lambda d, _: d.update(seen=0),
    "seen huge": lambda d, _: d.update(seen=10**30),
    "seen text": lambda d, _: d.update(seen="30"),
    "seen fraction": lambda d, _: d.update(seen=30.0),
    "no seen": lambda d, _: d.pop("seen"),
    "keys shorter": tensor(KEYS, lambda x: x[:, :, 1:]),
    "keys and values shorter": lambda d, t: t.update({name: t[name][:, :, 1:].contiguous() for name in (KEYS, VALUES)}),
    "no keys": tensor(KEYS, lambda x: x[:, :, :0]),
    "no rows": lambda d, t: t.update({name: x[:0].contiguous() for name, x in t.items()}),
    "rows of one layer": tensor(KEYS, lambda x: torch.cat([x, x])),
    "more heads": tensor(VALUES, lambda x: torch.cat([x, x], dim=1)),
    "head dimension": tensor(KEYS, lambda x: x[..., 1:]),
    "flat": tensor(KEYS, lambda x: x.flatten()),
    "integer keys": tensor(KEYS, lambda x: x.to(torch.int32)),
    "half keys": tensor(KEYS, lambda x: x.half()),
    "half gates": tensor(GATE, lambda x: x.half()),
    "gate's heads": tensor(GATE, lambda x: x[:, 1:]),
    "gate's tokens": tensor(GATE, lambda x: x[:, :, 1:]),
    "state's shape": tensor(STATE, lambda x: x[..., 1:]),
    "state's heads": tensor(STATE, lambda x: x[:, 1:]),
    "half state": tensor(STATE, lambda x: x.half()),
    "no state": lambda d, t: t.pop(STATE),
    "no gates": lambda d, t: t.pop(GATE),
    "no values": lambda d, t: t.pop(VALUES),
    "more state": lambda d, t: t.update({"layers.1.state.more": torch.zeros(1)}),
    "another layer": lambda d, t: t.update({"layers.7.keys": t[KEYS].clone()}),
    "layer of a huge number": lambda d, t: t.update({f"layers.{'9' * 5000}.keys": torch.zeros(1)}),
    "other tensor": lambda d, t: t.update(other=torch.zeros(1)),
    "half a padding": lambda d, t: t.update({"padding.leading": torch.zeros(1, dtype=torch.long)}),
}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return adapted(window=WINDOW, sinks=SINKS)


@pytest.mark.sample(30)
@pytest.mark.parametrize("first", [False, True], ids=["signed", "first format"])
@pytest.mark.parametrize("fault", FAULTS)
def test_each_field_is_checked_against_the_tensors(
    fault: str, first: bool, model: PreTrainedModel, tmp_path: Path
) -> None:
    path = conversation(model, tmp_path / "cache")
    path = rewrite(as_first_format(path, model) if first else path, FAULTS[fault])
    with pytest.raises(AHNError) as error:
        AHNCache.load(path, model)
    assert len(str(error.value)) < 600 and "checksum" not in str(error.value)


def test_values_that_become_positions(model: PreTrainedModel, tmp_path: Path) -> None:
    def pad(leading: int, moved: int) -> Change:
        more = {"leading": torch.tensor([leading]), "ended": torch.tensor([False]), "moved": torch.tensor([moved])}
        return lambda _, tensors: tensors.update({f"padding.{name}": x for name, x in more.items()})

    AHNCache.load(rewrite(conversation(model, tmp_path / "cache"), pad(3, 1)), model)
    for wrong in ((-2, 0), (31, 0), (2**40, 0), (3, 4), (3, -1)):
        with pytest.raises(AHNError, match="damaged"):
            AHNCache.load(rewrite(conversation(model, tmp_path / "cache"), pad(*wrong)), model)
    pooled = adapted(window=WINDOW, sinks=SINKS, memory="ct_avg")
    path = conversation(pooled, tmp_path / "pooled")
    groups = "layers.1.state.groups"
    with pytest.raises(AHNError, match="outside"):
        AHNCache.load(rewrite(path, tensor(groups, lambda x: x.index_fill(1, torch.tensor([0]), -(2**40)))), pooled)


@pytest.mark.sample(12)
@pytest.mark.parametrize("memory", ahn.memory.recurrent() + ahn.memory.baselines())
@pytest.mark.parametrize("length", [1, 5, 30])
@pytest.mark.parametrize("quantized", [0, 8])
def test_files_of_the_first_format_still_load(memory: str, length: int, quantized: int, tmp_path: Path) -> None:
    model = adapted(window=WINDOW, sinks=SINKS, memory=memory, quantized=quantized)
    path = conversation(model, tmp_path / "cache", length)
    wanted = go_on(model, AHNCache.load(path, model))
    assert torch.equal(go_on(model, AHNCache.load(as_first_format(path, model), model)), wanted)


def test_files_of_the_second_format_still_load(model: PreTrainedModel, tmp_path: Path) -> None:
    path = rewrite(conversation(model, tmp_path / "cache"), as_second_format)
    with safe_open(path, framework="pt") as file:
        description = json.loads(file.metadata()["ahn"])
    rest = {name: value for name, value in description.items() if name != "checksum"}
    whole = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for name, x in sorted(load_file(path).items()):
        whole.update(
            f"\0{name} {x.dtype} {tuple(x.shape)}\0".encode() + x.reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    assert description["checksum"] == whole.hexdigest()
    wanted = go_on(model, AHNCache.load(conversation(model, tmp_path / "newer"), model))
    assert torch.equal(go_on(model, AHNCache.load(path, model)), wanted)
    with pytest.raises(AHNError, match="checksum"):
        AHNCache.load(rewrite(path, tensor(KEYS, lambda x: x + 1), sign=False), model)


@pytest.mark.sample(4)
@pytest.mark.parametrize("seed", range(8))
def test_flipped_bits_are_noticed(seed: int, model: PreTrainedModel, tmp_path: Path) -> None:
    path = conversation(model, tmp_path / "cache")
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    for place in random.Random(seed).sample(range(start, len(content)), 1 if seed else 10):
        content[place] ^= 1 << place % 8
    path.write_bytes(content)
    with pytest.raises(AHNError, match="checksum"):
        AHNCache.load(path, model)


def test_a_base_that_differs_in_any_tensor_is_noticed(tmp_path: Path) -> None:
    model = adapted(window=WINDOW, sinks=SINKS)
    path = conversation(model, tmp_path / "cache")
    for name, parameter in model.named_parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.mul_(1.01).add_(1e-3)
        with pytest.raises(AHNError, match="another base model or adapter"):
            AHNCache.load(path, model)
        with torch.no_grad():
            parameter.copy_(kept)
        assert name
    AHNCache.load(path, model)


def test_a_base_with_other_tensors_or_precision_is_noticed(tmp_path: Path) -> None:
    model = adapted(window=WINDOW, sinks=SINKS)
    path = conversation(model, tmp_path / "cache")
    with pytest.raises(AHNError, match="bfloat16"):
        AHNCache.load(path, adapted(window=WINDOW, sinks=SINKS).bfloat16().float().to(torch.bfloat16))
    more = adapted(window=WINDOW, sinks=SINKS)
    more.model.layers[0].mlp.bias = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(AHNError, match="different tensors"):
        AHNCache.load(path, more)


def test_weights_that_lie_elsewhere_are_not_compared(tmp_path: Path) -> None:
    model = adapted(window=WINDOW, sinks=SINKS)
    path = conversation(model, tmp_path / "cache")
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.to("meta"))
    AHNCache.load(path, model)


def test_another_tokenizer_is_noticed(model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def folder(name: str, vocabulary: dict[str, int], indent: int | None = None) -> str:
        (tmp_path / name).mkdir()
        content = {"model": {"vocab": vocabulary}, "added_tokens": [{"id": 9, "content": "<end>"}]}
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(content, indent=indent))
        return str(tmp_path / name)

    monkeypatch.setattr(model, "name_or_path", folder("one", {"a": 0, "b": 1}))
    path = conversation(model, tmp_path / "cache")
    for place in (folder("laid out otherwise", {"b": 1, "a": 0}, indent=2), "", str(tmp_path)):
        monkeypatch.setattr(model, "name_or_path", place)
        AHNCache.load(path, model)
    monkeypatch.setattr(model, "name_or_path", folder("other", {"a": 1, "b": 0}))
    with pytest.raises(AHNError, match="another tokenizer"):
        AHNCache.load(path, model)


def test_a_memory_without_weights_is_told_from_another(tmp_path: Path) -> None:
    # None of the two has a parameter, so only the settings tell them apart.
    path = conversation(adapted(window=WINDOW, sinks=SINKS, memory="ct_max"), tmp_path / "cache")
    with pytest.raises(AHNError, match="ct_max"):
        AHNCache.load(path, adapted(window=WINDOW, sinks=SINKS, memory="ct_avg"))


@pytest.mark.parametrize("heads, kinds", [(None, 1), (((0, 1), (2, 1)), 2)])
def test_layers_that_are_alike_are_checked_against_one_memory(
    heads: tuple[tuple[int, int], ...] | None, kinds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To make one takes milliseconds, which a large model's conversation would wait for once a layer."""
    settings = ahn.AHNConfig("retained", WINDOW, SINKS, slot_heads=heads, **FEW)
    model = awaken(ahn.attach(base(num_hidden_layers=3), settings))
    path = conversation(model, tmp_path / "cache")
    made, right = [], ahn.memory.make

    def counted(config: ahn.AHNConfig, shape: ModelShape, layer: int = 0) -> ahn.memory.Memory:
        made.append(layer)
        return right(config, shape, layer)

    monkeypatch.setattr(ahn.memory, "make", counted)
    assert AHNCache.load(path, model).seen == 30 and len(made) == kinds


def test_what_is_no_file(model: PreTrainedModel, tmp_path: Path) -> None:
    deep = conversation(model, tmp_path / "deep")
    save_file(load_file(deep), deep, {"ahn": "[" * 100_000})
    for path in (deep, tmp_path, Path("/dev/zero"), tmp_path / "absent"):
        with pytest.raises(AHNError):
            AHNCache.load(path, model)


MUTATIONS = examples(40, 200)


@pytest.mark.parametrize("first", [False, True], ids=["signed", "first format"])
def test_mutated_files(first: bool, model: PreTrainedModel, tmp_path: Path) -> None:
    """Bytes at random: all refused. Descriptions at random, signed again: refused, or a conversation that goes on."""
    whole = conversation(model, tmp_path / "whole")
    whole = as_first_format(whole, model) if first else whole
    content, outcomes = whole.read_bytes(), {"refused": 0, "goes on": 0}
    for seed in range(MUTATIONS):
        path = tmp_path / "mutant"
        path.write_bytes(mutated_bytes(content, seed) if seed % 2 and not first else content)
        if path.read_bytes() == content:
            rewrite(path, lambda description, _, seed=seed: mutated_json(description, seed))
        try:
            assert go_on(model, AHNCache.load(path, model)).isfinite().all()
            outcomes["goes on"] += 1
            assert not seed % 2 or first, f"seed {seed}: changed bytes were not noticed"
        except AHNError as error:
            assert len(str(error)) < 1000
            outcomes["refused"] += 1
    assert outcomes["refused"] >= 0.7 * MUTATIONS, outcomes


def test_a_conversation_of_one_base_is_not_anothers(tmp_path: Path) -> None:
    path = conversation(adapted(window=WINDOW, sinks=SINKS), tmp_path / "cache")
    with pytest.raises(AHNError, match="another base model or adapter"):
        AHNCache.load(path, awaken(ahn.attach(base(seed=1), ahn.AHNConfig(window=WINDOW, sinks=SINKS))))
