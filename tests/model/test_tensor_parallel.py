"""Two processes that share a model by transformers' own plan against one that holds it all: each has half of the heads.

All cases run in one pair of processes, for most of the time goes into starting them; the tests look at what they wrote.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from support.processes import in_other_processes
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import ahn
from ahn.checkpoint.adapter import load_adapter, save_adapter
from ahn.errors import AHNError

LENGTH, NEW = 40, 6
SETTINGS: dict[str, dict[str, Any]] = {
    **{name: {"memory": name} for name in models.EVERYTHING if ahn.memory.get(name).heads_apart},
    "tier": {"memory": "gated_deltanet", "quantized": 8},
    "router and q_proj": {"memory": "mamba2", "router": True, "q_proj": True},
}
SHARED = ("qwen3", "gated_deltanet")
"""The one that other tests look at."""
OTHERS = [("qwen3", name) for name in SETTINGS] + [(x, "gated_deltanet") for x in ("qwen2", "llama")]
CASES = [SHARED, *(case for case in OTHERS if case != SHARED)]


def base(architecture: str, **changes: Any) -> PreTrainedModel:
    """transformers divides the head's rows between processes, before 5.18 evenly."""
    return models.base(architecture, vocab_size=models.VOCABULARY + 1, **changes)


def refusals(model: PreTrainedModel, folder: Path, ids: Tensor) -> dict[str, str]:
    """What each thing says that needs all heads, or gradients."""
    cache = ahn.AHNCache.for_model(model)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    tries = {
        "gradients": lambda: model(ids),
        "adapter": lambda: save_adapter(model, folder / "refused"),
        "conversation": lambda: cache.save(folder / "refused.safetensors"),
        "whole": lambda: model.save_pretrained(folder / "refused"),
    }
    return {name: said(call) for name, call in tries.items()}


def said(call: Any) -> str:
    with pytest.raises(AHNError) as error:
        call()
    return str(error.value)


@torch.no_grad()
def read(model: PreTrainedModel, padded: bool) -> tuple[Tensor, Tensor]:
    """Logits of a prompt in chunks, a second one on the live cache and two steps; and what greedy decoding writes."""
    ids, mask, cache, found = models.tokens(2, LENGTH), None, ahn.AHNCache.for_model(model), []
    if padded:
        mask = torch.ones_like(ids)
        mask[1, :5] = 0
    for start, stop in ((0, 30), (30, LENGTH - 2), (LENGTH - 2, LENGTH - 1), (LENGTH - 1, LENGTH)):
        own = None if mask is None else mask[:, :stop]
        found.append(model(ids[:, start:stop], attention_mask=own, past_key_values=cache).logits)
    mask = torch.ones_like(ids) if mask is None else mask
    written = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    return torch.cat(found, dim=1), written


def adapter(architecture: str, name: str, folder: Path) -> PreTrainedModel:
    """A whole model, with the file of its adapter in `folder`."""
    settings: dict[str, Any] = {"window": 6, "sinks": 2, "prefill_chunk_size": 8} | SETTINGS[name]
    if settings["memory"] == "retained":
        settings |= models.FEW
    model = models.awaken(ahn.attach(base(architecture), ahn.AHNConfig(**settings)))
    model.save_pretrained(folder / "merged")
    if ahn.adapter_parameters(model):
        save_adapter(model, folder / "adapter")
    return model


def divided(path: Path) -> PreTrainedModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # a newer name exists, which older versions lack
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, tp_plan="auto")
    return model.eval()


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes found, in a file per case that runs and process."""
    folder = tmp_path_factory.mktemp("tensor_parallel")
    chosen = [
        item.callspec.id for item in request.session.items if item.path == request.path and hasattr(item, "callspec")
    ]
    cases = [case for case in CASES if case == SHARED or "-".join(case) in chosen]
    for architecture in {architecture for architecture, _ in cases} | {"phi3"}:
        base(architecture).save_pretrained(folder / architecture)
    base("qwen3", num_key_value_heads=1).save_pretrained(folder / "one head")
    settings = {}
    for architecture, name in cases:
        whole = adapter(architecture, name, folder / f"{architecture} {name}")
        settings[architecture, name] = whole.ahn_config

    def share(rank: int) -> None:
        for case, config in settings.items():
            model, files = divided(folder / case[0]), folder / " ".join(case)
            if (files / "adapter").exists():
                load_adapter(model, files / "adapter")
            else:
                ahn.attach(model, config)
            found = [read(model, padded) for padded in (False, True)]
            heads = {n: tuple(p.shape) for n, p in ahn.adapter_parameters(model).items()}
            torch.save({"found": found, "heads": heads}, files / f"{rank}.pt")
        files = folder / "qwen3 gated_deltanet"
        for name, more in {"adapter": {"base": folder / "qwen3"}, "merged": {}}.items():
            loaded = ahn.from_pretrained(files / name, tp_plan="auto", **more)
            torch.save(read(loaded, False)[0], files / f"{name}{rank}.pt")
        words = refusals(model, folder, models.tokens(1, LENGTH))
        words |= {name: said(lambda name=name: ahn.attach(divided(folder / name))) for name in ("phi3", "one head")}
        fresh = divided(folder / "qwen3")
        for name, own in (("few heads", {"slot_heads": ((0, 1),)}), ("one score", {"score_layer": 0})):
            some = ahn.AHNConfig("retained", window=6, sinks=2, **own)
            words[name] = said(lambda some=some: ahn.attach(fresh, some))
        torch.save(words, folder / f"words{rank}.pt")
        torch.manual_seed(7)
        ahn.attach(fresh, ahn.AHNConfig(window=6, sinks=2))
        torch.save(dict(ahn.adapter_parameters(fresh)), folder / f"fresh{rank}.pt")
        torch.distributed.barrier()  # the first process holds the store, which the other may still talk to
        torch.distributed.destroy_process_group()

    assert in_other_processes(share, ranks=2, timeout=300) == [0, 0]
    return folder


@pytest.mark.sample(1)
@pytest.mark.parametrize(("architecture", "name"), CASES)
def test_two_processes_give_what_one_gives(architecture: str, name: str, folder: Path) -> None:
    files = folder / f"{architecture} {name}"
    whole = ahn.from_pretrained(files / "merged")
    expected = [read(whole, padded) for padded in (False, True)]
    one, two = (torch.load(files / f"{rank}.pt") for rank in (0, 1))
    for ours, theirs, (logits, written) in zip(one["found"], two["found"], expected, strict=True):
        torch.testing.assert_close(ours[0], logits, rtol=0, atol=2e-4)
        torch.testing.assert_close(ours[1], written, rtol=0, atol=0)
        torch.testing.assert_close(theirs[0], ours[0], rtol=0, atol=0)
        torch.testing.assert_close(theirs[1], ours[1], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["adapter", "merged"])
def test_our_own_loading_takes_a_plan(name: str, folder: Path) -> None:
    files = folder / "qwen3 gated_deltanet"
    expected = torch.load(files / "0.pt")["found"][0][0]
    for rank in (0, 1):
        torch.testing.assert_close(torch.load(files / f"{name}{rank}.pt"), expected, rtol=0, atol=1e-5)


def test_each_holds_its_heads_of_the_memory(folder: Path) -> None:
    """Half of every parameter that has heads; what has none is there whole. And a new memory is drawn alike."""
    files = folder / "qwen3 gated_deltanet"
    own, whole = torch.load(files / "0.pt")["heads"], ahn.adapter_parameters(ahn.from_pretrained(files / "merged"))
    assert {name for name, shape in own.items() if shape == whole[name].shape} == {
        name for name in whole if name.endswith("o_norm.weight")
    }
    for name, x in whole.items():
        assert own[name] in (x.shape, (len(x) // 2, *x.shape[1:]))
    one = base("qwen3")
    torch.manual_seed(7)
    fresh = ahn.adapter_parameters(ahn.attach(one, ahn.AHNConfig(window=6, sinks=2)))
    halves = [torch.load(folder / f"fresh{rank}.pt", weights_only=False) for rank in (0, 1)]
    for name, x in fresh.items():
        joined = torch.cat([half[name] for half in halves]) if own[name] != whole[name].shape else halves[0][name]
        torch.testing.assert_close(joined, x, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("gradients", "read under torch.no_grad()"),
        ("adapter", "Saving an adapter needs all heads of a model, of which this process holds 1/2"),
        ("conversation", "A conversation's file needs all heads"),
        ("whole", "merge base and adapter with ahn merge"),
        ("phi3", "leaves no process heads of its own (qkv_proj colwise_gather_output"),
        ("few heads", "all heads keep tokens: load the model on one device, or with slot_heads=None"),
        ("one score", "each layer scores for itself: load the model on one device, or with score_layer=None"),
        ("one head", "2 processes cannot share 1 key heads evenly"),
    ],
)
def test_what_needs_all_heads_is_refused(what: str, words: str, folder: Path) -> None:
    for rank in (0, 1):
        assert words in torch.load(folder / f"words{rank}.pt")[what]
