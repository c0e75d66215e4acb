"""What a memory of tokens learns: where full attention looks; and runs of `ahn train` that teach it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import torch.nn.functional as F
from support.processes import in_other_processes
from tiny_run import flags, words, write_rows
from tiny_student import freeze_base, student, tokens
from torch import Tensor
from transformers import PreTrainedModel

import ahn
from ahn import AHNError
from ahn.training import looks
from ahn.training.arguments import parse
from ahn.training.looks import SHARES, counted_tokens, looks_loss, most_looked
from ahn.training.settings import Settings

WINDOW, SINKS = 8, 2


def naive(query: Tensor, key: Tensor, scaling: float, window: int) -> Tensor:
    """Every probability at once, one row without padding: (Hkv, L)."""
    heads, length = key.shape[0], key.shape[1]
    best = torch.zeros(heads, length, dtype=torch.float64)
    for head, q in enumerate(query.double()):
        k = key[head * heads // len(query)].double()
        for t in range(length):
            shares = (k[: t + 1] @ q[t] * scaling).softmax(0)
            for p in range(t - window + 1):
                best[head * heads // len(query), p] = max(best[head * heads // len(query), p], shares[p])
    return best


@pytest.mark.parametrize("at_once", [1, 200, 1 << 20])
@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_most_looked(at_once: int, padding: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looks, "NUMBERS", at_once)
    L, pads = 20, 6
    query, key = torch.randn(2, 4, L, 8), torch.randn(2, 2, L, 8)
    mask, real = None, slice(0, L)
    if padding:
        real = slice(pads, L) if padding == "left" else slice(0, L - pads)
        mask = torch.zeros(2, L, dtype=torch.long)
        mask[0], mask[1, real] = 1, 1
    found = most_looked(query, key, 0.5, 5, mask)
    torch.testing.assert_close(found[0].double(), naive(query[0], key[0], 0.5, 5), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(
        found[1, :, real].double(), naive(query[1][:, real], key[1][:, real], 0.5, 5), rtol=1e-5, atol=1e-7
    )


def test_which_tokens_count() -> None:
    labels, mask = torch.zeros(3, 12, dtype=torch.long), torch.ones(3, 12, dtype=torch.long)
    mask[0, 9:], mask[1, :2] = 0, 0
    labels[2] = -100
    counted = counted_tokens(labels, mask, window=4, sinks=2)
    assert [row.nonzero()[:, 0].tolist() for row in counted] == [[2, 3, 4], [4, 5, 6, 7], []]
    # The last one that counts is seen by one query beyond the window, the next one by none.
    query, key = torch.randn(1, 1, 9, 4), torch.randn(1, 1, 9, 4)
    assert (most_looked(query, key, 1.0, 4)[0, 0] > 0).tolist() == [True] * 5 + [False] * 4


@torch.no_grad()
def test_the_loss_is_that_of_the_models_own_attention() -> None:
    """Of a batch without padding, from what the base model with eager attention says."""
    model, ids = student(memory="retained"), tokens(2, 40)
    for parameter in ahn.adapter_parameters(model).values():
        parameter += 0.3 * torch.randn_like(parameter)
    inputs: list[Tensor] = []
    layers = model.get_decoder().layers
    handles = [layer.input_layernorm.register_forward_hook(lambda _, __, out: inputs.append(out)) for layer in layers]
    found = looks_loss(model, ids, WINDOW, SINKS)
    for handle in handles:
        handle.remove()
    memories = [layer.ahn.fn for layer in layers]
    ahn.detach(model)
    model.set_attn_implementation("eager")
    weights = model(ids, output_attentions=True).attentions
    counted, errors, hits = slice(SINKS, 40 - WINDOW), [], []
    far = torch.ones(40, 40).tril(-WINDOW)
    for memory, x, shares in zip(memories, inputs, weights, strict=True):
        for row in range(2):
            best = (shares[row] * far).amax((0, 1))[counted]  # one key head
            tops = [set(best.topk(math.ceil(share * len(best))).indices.tolist()) for share in SHARES]
            logits, top = memory.logits(x)[row, 0, counted], tops[0]
            target = torch.tensor([sum(i in some for some in tops) / len(tops) for i in range(len(best))])
            errors.append(F.binary_cross_entropy_with_logits(logits, target))
            hits.append(len(top & set(logits.topk(len(top)).indices.tolist())) / len(top))
    assert found.valid == 2 * (40 - WINDOW - SINKS)
    assert float(found.loss) == pytest.approx(float(sum(errors)) / len(errors), rel=1e-4)
    assert float(found.recall) == pytest.approx(sum(hits) / len(hits), rel=1e-6)


def test_parts_add_up_and_padding_counts_for_nothing() -> None:
    model = freeze_base(student(memory="retained"))
    rows = [tokens(1, 40, seed=1), tokens(1, 31, seed=2)]

    def gradient() -> dict[str, Tensor]:
        found = {name: p.grad for name, p in ahn.adapter_parameters(model).items() if p.grad is not None}
        model.zero_grad()
        return found

    count = 40 + 31 - 2 * (WINDOW + SINKS)
    parts = [looks_loss(model, row, WINDOW, SINKS, count) for row in rows]
    sum(part.loss for part in parts).backward()
    expected = gradient()
    assert len(expected) == 2 * len(list(model.get_decoder().layers[0].ahn.fn.parameters()))
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, 31:] = 0
    batch = {"input_ids": torch.cat([rows[0], F.pad(rows[1], (0, 9))]), "attention_mask": mask}
    whole = looks_loss(model, batch, WINDOW, SINKS)
    whole.loss.backward()
    assert whole.valid == count
    torch.testing.assert_close(whole.loss, sum(part.loss for part in parts), rtol=1e-4, atol=0)
    for name, found in gradient().items():
        torch.testing.assert_close(found, expected[name], rtol=1e-3, atol=1e-6)


@torch.no_grad()
def planted(**config: Any) -> PreTrainedModel:
    """A Llama whose keys of six tokens of the vocabulary are so large that some query always looks at them."""
    model = models.base("llama")
    embedding, direction = model.get_input_embeddings().weight, F.normalize(torch.randn(32), dim=0)
    embedding[2:8] += 4 * direction
    for layer in model.model.layers:
        layer.self_attn.k_proj.weight += torch.randn(16, 1) @ direction[None]
    return ahn.attach(model, ahn.AHNConfig(memory="retained", window=WINDOW, sinks=SINKS, **config))


def test_scores_find_planted_tokens() -> None:
    model = freeze_base(planted())
    optimizer = torch.optim.Adam(list(ahn.adapter_parameters(model).values()), lr=1e-2)
    held_out = models.tokens(16, 64, seed=1000)
    with torch.no_grad():
        before = looks_loss(model, held_out, WINDOW, SINKS)
    for step in range(60):
        found = looks_loss(model, models.tokens(8, 64, seed=step), WINDOW, SINKS)
        optimizer.zero_grad()
        found.loss.backward()
        optimizer.step()
    with torch.no_grad():
        after = looks_loss(model, held_out, WINDOW, SINKS)
    assert float(after.loss) < 0.3669 < float(before.loss), "the entropy of 12 %: what blind scores reach at best"
    assert float(before.recall) < 0.25 and float(after.recall) > 0.5, (before, after)
    assert (model.ahn_config.window, model.ahn_config.sinks) == (WINDOW, SINKS)


def test_a_score_for_all_heads_learns_from_its_teachers() -> None:
    """As if each teacher had a score of its own, and all of them were the same."""
    every, one = (
        freeze_base(ahn.attach(models.base(), ahn.AHNConfig("retained", WINDOW, SINKS, score_layer=first)))
        for first in (None, 0)
    )
    ids, teachers = models.tokens(2, 40), ((1, 0), (0, 1), (1, 1))
    watches = [looks.Watch(every, WINDOW, None), looks.Watch(one, WINDOW, None, teachers)]
    for model, watch in zip((every, one), watches, strict=True):
        ahn.model.adapter.set_window(model, 40, 0)
        with torch.no_grad(), ahn.model.attached.observed(model, watch, first=True):
            model.get_decoder()(ids, use_cache=False)
    own, ((memory, x, looked),) = watches[0].lessons(), watches[1].lessons()
    assert memory is one.model.layers[0].ahn.fn and torch.equal(x, own[0][1])
    assert torch.equal(looked, torch.stack([own[0][2][:, 1], own[1][2][:, 0], own[1][2][:, 1]], dim=1))  # by layers
    counted = slice(SINKS, 40 - WINDOW)
    logits = memory.logits(x)[..., counted]
    some = torch.zeros(2, 3, 40, dtype=torch.bool)
    some[..., counted] = True
    wanted = looks.grades(looked, some)[..., counted].float().mean(1, keepdim=True) / len(SHARES)
    found = looks_loss(one, ids, WINDOW, SINKS, teachers=teachers)
    expected = F.binary_cross_entropy_with_logits(logits, wanted)
    torch.testing.assert_close(found.loss, expected, rtol=1e-5, atol=0)
    found.loss.backward()
    assert all(p.grad is not None for p in ahn.adapter_parameters(one).values())
    for model, given in ((one, ()), (every, teachers)):
        with pytest.raises(AHNError, match="teachers"):
            looks_loss(model, ids, WINDOW, SINKS, teachers=given)


def test_the_block_that_a_teacher_looks_at_gets_the_highest_score() -> None:
    """Of five blocks of ten tokens, the one in which words are said that queries always look at."""
    model = planted(score_layer=0)
    optimizer = torch.optim.Adam(list(ahn.adapter_parameters(freeze_base(model)).values()), lr=1e-2)

    def texts(seed: int) -> tuple[Tensor, Tensor]:
        ids = models.tokens(8, 50 + SINKS + WINDOW, seed).clamp_min(8)
        block = torch.randint(5, (8,), generator=torch.Generator().manual_seed(seed))
        for row, number in enumerate(block.tolist()):
            ids[row, SINKS + 10 * number + 3 : SINKS + 10 * number + 7] = torch.tensor([2, 5, 3, 7])
        return ids, block

    for step in range(60):
        found = looks_loss(model, texts(step)[0], WINDOW, SINKS, teachers=((1, 0),))
        optimizer.zero_grad()
        found.loss.backward()
        optimizer.step()
    ids, block = texts(1000)
    with torch.no_grad():
        gates = model.model.layers[0].ahn.fn
        x = model.model.layers[0].input_layernorm(model.get_input_embeddings()(ids))
        score = gates.logits(x).sigmoid()[:, 0, SINKS : SINKS + 50].unflatten(1, (5, 10)).mean(2)
    assert torch.equal(score.argmax(1), block)


def run(arguments: list[str]) -> dict[str, Any]:
    pytest.importorskip("transformers", minversion="5.23")  # as the `train` extra asks for
    from ahn.training.run import run

    return run(parse(arguments))


def test_a_finished_run(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    results = run(flags(
        tiny_model, tiny_data, output, ahn_implementation="RetainedTokens", window=96, sinks=16, slots=40, val_size=6,
        plot_loss=True, max_steps=12, per_device_train_batch_size=3, eval_strategy="steps", eval_steps=6,
        activation_checkpointing=True, sliding_window_type="fixed", sliding_window=40,
    ))  # fmt: skip
    before, after = results["before"], results["after"]
    assert after["eval_loss"] < 0.7 * before["eval_loss"] and after["eval_recall"] > before["eval_recall"]
    card = (output / "README.md").read_text()
    assert f"{after['eval_recall']:.4f}" in card and "looks at" in card and "attention" in card
    assert (output / "loss.png").stat().st_size > 10_000
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert all("recall" in entry for entry in history if "loss" in entry)
    model = ahn.from_pretrained(output, base=tiny_model)
    config = model.ahn_config
    assert (config.memory, config.window, config.sinks, config.slots) == ("retained", 96, 16, 40)
    with torch.no_grad():
        assert torch.isfinite(model(tokens(1, 300)).logits).all()


def test_a_run_finds_its_teachers_and_goes_on_with_them(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="ahn")
    chats = [
        [{"role": "user", "content": f"{said} {words(60, seed)}"}, {"role": "assistant", "content": said}]
        for seed in range(12)
        for said in [words(6, 100 + seed)]
    ]
    data = write_rows(tmp_path / "chats.jsonl", [{"messages": chat} for chat in chats])
    given = {
        "ahn_implementation": "RetainedTokens", "slots": 40, "passage": 5, "score_layer": 0, "score_teachers": 2,
        "sliding_window_type": "fixed", "sliding_window": 40, "save_total_limit": 1,
    }  # fmt: skip
    run(flags(tiny_model, data, tmp_path / "out", **given))
    assert "taught by 0.0 1.0" in caplog.text
    model = ahn.from_pretrained(tmp_path / "out", base=tiny_model)
    assert (model.ahn_config.score_layer, model.ahn_config.passage) == (0, 5)
    assert all("layers.0." in name for name in ahn.adapter_parameters(model))
    caplog.clear()
    run(flags(tiny_model, data, tmp_path / "out", **given | {"max_steps": 6}, resume_from_checkpoint=True))
    assert "taught by" not in caplog.text, "they are those of the checkpoint"
    with pytest.raises(AHNError, match="No reply says again"):
        run(flags(tiny_model, write_rows(tmp_path / "texts.jsonl", [{"text": words(99, 1)}]), tmp_path / "no", **given))


@pytest.mark.slow
def test_resumed_bits_are_the_same(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    def train(output: Path, **more: Any) -> None:
        given = {"ahn_implementation": "RetainedTokens", "slots": 40, **more}
        assert in_other_processes(lambda rank: run(flags(tiny_model, tiny_data, output, **given)) and None) == [0]

    train(tmp_path / "whole", max_steps=4)
    train(tmp_path / "cut", max_steps=4, save_total_limit=2)
    for file in (tmp_path / "cut" / "checkpoint-4").iterdir():
        file.unlink()
    (tmp_path / "cut" / "checkpoint-4").rmdir()
    train(tmp_path / "cut", max_steps=4, resume_from_checkpoint=True)
    assert (tmp_path / "cut" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ahn_implementation": "RetainedTokens", "loss_type": "kl"}, "learns by attention alone"),
        ({"ahn_implementation": "GatedDeltaNet", "loss_type": "attention"}, "learns by kl, ce, distill"),
        ({"ahn_implementation": "RetainedTokens", "use_q_proj": True}, "are for recurrent memories"),
        ({"score_layer": 0}, "slots, passage and score_layer are for RetainedTokens"),
        ({"passage": 2}, "slots, passage and score_layer are for RetainedTokens"),
        ({"ahn_implementation": "RetainedTokens", "score_layer": 0, "streaming": True}, "leave streaming out"),
        ({"ahn_implementation": "RetainedTokens", "score_layer": 0, "score_teachers": 0}, "at least 1"),
    ],
)
def test_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(AHNError, match=message):
        Settings(model_name_or_path="m", dataset="d", **given)


def test_the_loss_follows_the_memory() -> None:
    for name, loss in (("RetainedTokens", "attention"), ("DeltaNet", "kl")):
        assert Settings(model_name_or_path="m", dataset="d", ahn_implementation=name).loss_type == loss


def test_another_memory_has_no_scores() -> None:
    with pytest.raises(AHNError, match="this model's memory has none"):
        looks_loss(student(), tokens(1, 40), WINDOW, SINKS)
