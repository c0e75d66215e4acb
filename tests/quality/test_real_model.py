"""The study of a pretrained model: what it reads and counts, what it does again, and in which ways."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import speaking
import torch
from models import adapted, awaken, base, tokens
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import ahn
from ahn.measure.method import Method
from ahn.training.calibration import calibrate

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "quality"))

import real_model
from real import reading, ruler, training
from real.ways import FULL, WINDOW, Shape, Ways

CHAT: dict[str, Any] = {
    "messages": [
        {"role": "user", "content": "The number of the canyon fern is 214989. What is it?"},
        {"role": "assistant", "content": "It is 214989."},
        {"role": "user", "content": "And again?"},
        {"role": "assistant", "content": "It is 214989, as I said: 214989."},
    ],
    "asked": [{"answer": "214989"}, {"answer": "214989"}],
}


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerBase:
    return speaking.tokenizer(speaking.CHATML)


def test_answers_are_found_in_a_chat(words: PreTrainedTokenizerBase) -> None:
    ids, answers = reading.asked(words, CHAT)
    assert [words.decode(ids[part]).strip() for part in answers] == ["214989", "214989"]
    told = words.decode(ids[: answers[1].start])
    assert told.endswith("as I said: ") and answers[0].start < answers[1].start


@torch.no_grad()
def test_losses_of_texts_are_the_models_own() -> None:
    model, ids = base(), tokens(3, 60)
    found, size = reading.text_losses(model, ids, exact=20, batch=2)
    logits = model(ids).logits
    expected = [torch.nn.functional.cross_entropy(x[20:-1], y[21:]).item() for x, y in zip(logits, ids, strict=True)]
    assert found == pytest.approx(expected, rel=1e-5) and size > 0
    remembering = adapted(window=6, sinks=2)
    one, smaller = reading.text_losses(remembering, ids[:1], exact=20, batch=1)
    assert one == pytest.approx(reading.text_losses(remembering, ids, exact=20, batch=3)[0][:1], rel=1e-4)
    assert smaller < size


@torch.no_grad()
def test_a_book_by_position(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "AFRESH", 25)
    model, ids = base(), tokens(1, 70)[0]
    whole, _ = reading.by_position(model, ids, 30, afresh=False)
    logits = model(ids[None]).logits[0]
    every = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")
    assert whole == pytest.approx([x.mean().item() for x in every.split(30)], rel=1e-5)
    pieces, _ = reading.by_position(model, ids, 30, afresh=True)
    assert len(pieces) == 3 and pieces[0] == pytest.approx(
        torch.cat([every[:24], _after(model, ids)[:5]]).mean().item()
    )


def _after(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Losses of the second 25 tokens, read by themselves."""
    part = ids[25:50]
    return torch.nn.functional.cross_entropy(model(part[None]).logits[0, :-1], part[1:], reduction="none")


@torch.no_grad()
def test_an_answer_is_recalled_where_every_token_is_likeliest() -> None:
    model, ids = base(), tokens(1, 40)[0]
    likely = model(ids[None]).logits[0].argmax(-1)
    ids[30], ids[20] = likely[29], likely[19]  # in this order: what follows hangs on what stands before
    likely = model(ids[None]).logits[0].argmax(-1)
    ids[30] = likely[29]
    answers = [slice(20, 21), slice(30, 31), slice(30, 32)]
    ids[31] = (model(ids[None]).logits[0, 30].argmax(-1) + 1) % model.config.vocab_size
    assert reading.recalled(model, [reading.Asked(ids, answers)])[0] == [True, True, False]


@pytest.mark.parametrize("memory", [None, "window_only", "retained"])
def test_chats_of_different_lengths_are_read_together_as_alone(memory: str | None) -> None:
    model = base() if memory is None else adapted(memory=memory, window=6, sinks=2)
    chats = []
    for n, length in enumerate((31, 40, 28)):
        ids = tokens(1, length, seed=n)[0]
        best = reading.logits_before(model, ids[None], torch.arange(1, length), None)[0].argmax(-1)
        at = 12 + 3 * n
        ids = torch.cat([ids[: length - at], best[length - at - 1 : length - at], ids[length - at + 1 :]])
        chats.append(reading.Asked(ids, [slice(length - at, length - at + 1), slice(length - 3, length)]))
    alone, size = reading.recalled(model, chats)
    assert True in alone and False in alone
    assert reading.recalled(model, chats, batch=2) == (alone, size)


def calibrated_ways(directory: Path, model: PreTrainedModel) -> list[Method]:
    """Of an adapter that is made here."""
    config = ahn.AHNConfig("window_only", 24, 8, quantized=60, key_bits=2, value_bits=2, calibrated_keys=True)
    other = ahn.attach(base(), config)
    calibrate(other, [tokens(1, 120)])
    ahn.save_adapter(other, directory)
    return [way for way in Ways(Shape(24, 8, 300, None, keys=directory), model).within() if "calibrated" in way.name]


def test_ways_are_told_apart_and_can_be_had(tmp_path: Path) -> None:
    for folder, first in (("scores", None), ("shared", 1)):
        ahn.save_adapter(ahn.attach(base(), ahn.AHNConfig("retained", 24, 8, score_layer=first)), tmp_path / folder)
    model = base()
    ways = Ways(Shape(24, 8, 300, tmp_path / "scores", shared=tmp_path / "shared"), model)
    for some in (ways.within, ways.beyond, ways.book):
        found = list(some())
        assert len({way.name for way in found}) == len(found) and any("retained" in way.name for way in found)
        assert all(way.config is None or way.config.lossless in (32, 32 + 1024) for way in found)
    coded, finer = calibrated_ways(tmp_path / "keys", model)
    without = Ways(Shape(24, 8, 300, tmp_path / "none"), model)
    assert not [way for way in without.within() if "retained" in way.name]
    (kept,) = ways.retained(64, (4, 2), tier=16)
    (shared,) = ways.retained(64, (4, 2), passage=8, shared=True)
    assert shared.name == "retained 64 4/2, passages of 8, scores of layer 1" and shared.config.score_layer == 1
    assert coded.name == "tier 268 2/2, calibrated" and not list(without.calibrated(268, 2))
    assert finer.config.value_bits == 4 and finer.name == "tier 268 2/4, calibrated"
    for way in (kept, shared, coded, finer):
        with way.on(model), torch.no_grad():
            assert torch.isfinite(model(tokens(1, 200)).logits).all()


@pytest.mark.parametrize("memory", [None, "window_only", "retained"])
@torch.no_grad()
def test_answers_to_ruler_are_the_models_greedy_ones(
    words: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: str | None
) -> None:
    model, file = base(vocab_size=len(words)), tmp_path / "ruler.jsonl"
    if memory:
        kept = {"slots": 32, "passage": 2, "score_layer": 1, "key_bits": 16, "value_bits": 16, "max_distance": 128}
        config = ahn.AHNConfig(memory, window=13, sinks=3, **kept if memory == "retained" else {})
        awaken(ahn.attach(model, config))
    prompts = [torch.randint(5, len(words), (length,)) for length in (60, 47, 55)]
    new = [model.generate(x[None], max_new_tokens=6, do_sample=False)[0, len(x) :] for x in prompts]
    said = [words.decode(x, skip_special_tokens=True) for x in new]
    lines = [
        {"task": "ruler/vt/4k", "ids": x.tolist(), "new_tokens": 6, "answers": [y]}
        for x, y in zip(prompts, said, strict=True)
    ]
    lines[1]["answers"] = ["not what it says"]
    file.write_text("\n".join(map(json.dumps, lines)), "utf-8")
    monkeypatch.setattr(ruler, "AT_ONCE", 2)
    assert ruler.scores(model, words, file) == {"ruler/vt/4k": [1.0, 0.0, 1.0]}
    assert ruler.scores(model, words, file, most=1) == {"ruler/vt/4k": [1.0]}


def test_chats_teach_their_replies_and_texts_everything() -> None:
    texts, asked = [torch.arange(100, 200)], [reading.Asked(torch.arange(40), [slice(30, 33)])]
    longer = [reading.Asked(torch.arange(60), [slice(10, 12), slice(50, 54)])]
    plain, chat = training.batches(texts, asked, length=50, rows=2, steps=2, seed=3)
    assert isinstance(plain, torch.Tensor) and plain.shape == (2, 50) and (plain.diff() == 1).all()
    assert isinstance(chat, dict) and chat["input_ids"].shape == (2, 50)
    assert (chat["input_ids"][:, :40] == torch.arange(40)).all() and (chat["input_ids"][:, 40:] >= 100).all()
    learned = chat["labels"] != training.IGNORED
    assert (chat["labels"][learned].reshape(2, 3) == torch.arange(30, 33)).all()
    _, cut = training.batches(texts, longer, length=50, rows=1, steps=2, seed=3)
    assert (cut["input_ids"][0] == torch.arange(10, 60)).all() and (cut["labels"][0] >= 0).sum() == 6


def test_a_memory_is_distilled_and_read(tmp_path: Path) -> None:
    model = base()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    source = training.batches([tokens(1, 400)[0]], [reading.Asked(tokens(1, 90)[0], [slice(80, 84)])], 100, 2, 12, 0)
    about = training.trained(model, ahn.AHNConfig("deltanet", 24, 8), source, 12, 1e-2, tmp_path / "deltanet")
    assert about["texts_kl"] > 0 and about["chats_kl"] > 0
    assert all((x == before[name]).all() for name, x in model.state_dict().items())
    missing = tmp_path / "mamba2"
    ways = Ways(Shape(24, 8, 300, None, {"deltanet": tmp_path / "deltanet", "mamba2": missing}), model)
    (way,) = ways.recurrent()
    with way.on(model):
        read = [x for name, x in ahn.adapter_parameters(model).items() if name.endswith("o_proj.weight")]
        assert all(x.abs().max() > 0 for x in read)


class Study(real_model.Study):
    """One with nothing to read."""

    def items(self) -> Any:
        for name in (FULL, WINDOW, "broken", "last"):
            yield real_model.Item("rows", name, lambda name=name: self.one(name))

    def one(self, name: str) -> dict[str, Any]:
        if name == "broken":
            raise ValueError("no\nsuch thing")
        return {"prose_loss": {FULL: 3.0, WINDOW: 4.0}.get(name, 3.25), "one_right": 3, "one_asked": 4}


def test_what_is_done_is_not_done_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = Study(real_model.parsed(["--out", str(tmp_path), "--model", "tiny", "--code", "stdlib"]))
    assert not real_model.run(study, 100)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["name"] for row in rows] == [FULL, WINDOW, "broken", "last"]
    assert rows[2]["error"] == "ValueError: no" and "packages" in rows[0]
    assert not real_model.run(study, 100)
    assert [row["name"] for row in study.rows[4:]] == ["broken"]
    shown = real_model.table(study.rows)
    assert "prose 3.250 (75 %)" in shown and "one 75 % [30, 95]" in shown and "broken" not in shown
    (tmp_path / "rows.jsonl").unlink()
    assert not real_model.run(study, -1) and not study.rows
    assert "call again" in capsys.readouterr().out


def test_processes_share_what_is_to_be_done(tmp_path: Path) -> None:
    for part, names in (("1/3", [FULL, "last"]), ("2/3", [WINDOW])):
        study = Study(real_model.parsed(["--out", str(tmp_path / part[0]), "--model", "tiny", "--part", part]))
        real_model.run(study, 100)
        assert [row["name"] for row in study.rows] == names


@pytest.mark.parametrize("part", ["0/2", "3/2", "2", "a/b"])
def test_parts_are_checked(tmp_path: Path, part: str) -> None:
    with pytest.raises(SystemExit):
        real_model.parsed(["--out", str(tmp_path), "--part", part])


def test_stages_are_known(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        real_model.parsed(["--out", str(tmp_path), "--only", "riddles"])
