"""The study of a pretrained model: what it reads and counts, what it does again, and in which ways."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import speaking
import torch
from models import adapted, base, tokens
from transformers import PreTrainedTokenizerBase

import ahn
from ahn.evaluation.report.collect import collect
from ahn.training.calibration import calibrate

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "quality"))

import real_model
from real import reading, study, tasks, training
from real.table import table
from real.ways import FULL, WINDOW, Ways

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


def ways_at(directory: Path, length: int = 300, **memories: Path) -> Ways:
    return Ways(24, 8, length, directory / "scores", directory / "shared", directory / "keys", memories)


def make_adapters(directory: Path) -> None:
    """What `scores` would write, without training."""
    for folder, first in (("scores", None), ("shared", 1)):
        ahn.save_adapter(ahn.attach(base(), ahn.AHNConfig("retained", 24, 8, score_layer=first)), directory / folder)
    config = ahn.AHNConfig("window_only", 24, 8, quantized=60, key_bits=2, value_bits=2, calibrated_keys=True)
    calibrate(other := ahn.attach(base(), config), [tokens(1, 120)])
    ahn.save_adapter(other, directory / "keys")


def test_ways_are_told_apart_and_can_be_had(tmp_path: Path) -> None:
    make_adapters(tmp_path)
    ways, model = ways_at(tmp_path, deltanet=tmp_path / "deltanet"), base()
    for some in (ways.within, ways.beyond, ways.book):
        found = list(some())
        assert len({way.name for way in found}) == len(found) and any("retained" in way.name for way in found)
        assert all(way.config is None or way.config.lossless in (32, 32 + 1024) for way in found)
    assert {way.adapter for way in ways.within()} == {
        None, *(tmp_path / name for name in ("scores", "shared", "keys", "deltanet"))
    }  # fmt: skip
    assert sum(way.main for way in ways.within()) == 7
    kept = ways.retained(64, (4, 2), tier=16)
    shared = ways.retained(64, (4, 2), passage=8, shared=True)
    coded, finer = ways.calibrated(268, 2), ways.calibrated(268, 4)
    assert shared.name == PASSAGES
    assert [way.name for way in (coded, finer)] == ["tier 268 2/2, calibrated", "tier 268 2/4, calibrated"]
    layers = {}
    for way in (ways.full(), kept, shared, coded, finer):
        method = way.method(model)
        layers[way.name] = method.config and method.config.score_layer
        with method.on(model), torch.no_grad():
            assert torch.isfinite(model(tokens(1, 200)).logits).all()
    assert [*layers.values()] == [None, None, 1, None, None]


PASSAGES = "retained 64 4/2, passages of 8, one score for all heads"
NEEDLES = "ruler/niah_single_1/1k"


@pytest.mark.parametrize("name", [FULL, WINDOW, "tier 64 4/2", PASSAGES])
def test_tasks_are_answered_as_ahn_eval_would(words: PreTrainedTokenizerBase, tmp_path: Path, name: str) -> None:
    make_adapters(tmp_path)
    base(vocab_size=len(words)).save_pretrained(tmp_path / "base")
    model, ways, text = base(vocab_size=len(words)), ways_at(tmp_path), tmp_path / "text.txt"
    text.write_text("The fern grows. " * 900, "utf-8")
    some = (ways.full(), ways.forgetting(), ways.tier(64, (4, 2)), ways.retained(64, (4, 2), passage=8, shared=True))
    way = next(way for way in some if way.name == name)
    with way.method(model).on(model):
        evaluated = tasks.evaluated(model, words, str(tmp_path / "base"), way)
        found, again = (tasks.scores(evaluated, NEEDLES, text, tmp_path / "tasks", samples=3, batch=2) for _ in "ab")
        other = next(other for other in some if other is not way)
        apart = tasks.evaluated(model, words, str(tmp_path / "base"), other).settings != evaluated.settings
    assert found == again and len(found[NEEDLES]) == 3 and apart
    table = collect([tmp_path / "tasks"])
    labels = {"tier 64 4/2": "AHN window_only + 64 at 4/2 bits", PASSAGES: "AHN retained 64 in passages of 8"}
    assert [row.label for row in table.rows] == [labels.get(name, name)]


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
    (way,) = ways_at(tmp_path, deltanet=tmp_path / "deltanet").recurrent()
    with way.method(model).on(model):
        read = [x for name, x in ahn.adapter_parameters(model).items() if name.endswith("o_proj.weight")]
        assert all(x.abs().max() > 0 for x in read)


def test_no_chat_comes_again_before_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    chats = [reading.Asked(torch.full((40,), n), [slice(30, 33)]) for n in range(6)]
    source = training.batches([torch.arange(100, 200)], chats, length=40, rows=2, steps=12, seed=3)
    drawn = [row[0].item() for batch in source if isinstance(batch, dict) for row in batch["input_ids"]]
    assert sorted(drawn[:6]) == sorted(drawn[6:]) == [*range(6)] and drawn[:6] != drawn[6:]


class Study(study.Study):
    """One with nothing to read."""

    def items(self) -> Any:
        for name in (FULL, WINDOW, "broken", "last"):
            yield study.Item("rows", name, lambda name=name: self.one(name))
        yield study.Item("far", "never", lambda: {}, (("rows", "broken"),))

    def one(self, name: str) -> dict[str, Any]:
        if name == "broken":
            raise ValueError("no\nsuch thing")
        return {"prose_loss": {FULL: 3.0, WINDOW: 4.0}.get(name, 3.25), "one_right": 3, "one_asked": 4}


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    some = Study(real_model.parsed(["--out", str(tmp_path), "--model", "tiny", "--code", "stdlib"]))
    names = [FULL, WINDOW, "broken", "last"]
    assert [job.name for job in some.jobs()] == [*(f"rows: {name}" for name in names), "far: never"]
    for job in some.jobs()[:4]:
        with pytest.raises(ValueError) if "broken" in job.name else contextlib.nullcontext():
            some.do(job.work)
    assert [row["name"] for row in some.rows] == names
    assert some.rows[2]["error"] == "ValueError: no" and "packages" in some.rows[0]
    assert [(job.name, job.needs) for job in some.jobs()] == [
        ("rows: broken", ()), ("far: never", ("rows: broken",))
    ]  # fmt: skip
    some.options.only = ["far"]
    assert not some.jobs()  # what it needs neither is there nor comes
    shown = table(some.rows)
    assert "prose 3.250 (75 %)" in shown and "one 75 % [30, 95]" in shown and "broken" not in shown


def test_everything_waits_for_what_it_needs(tmp_path: Path) -> None:
    jobs = study.Study(real_model.parsed(["--out", str(tmp_path), "--model", "tiny", "--code", "stdlib"])).jobs()
    by_name = {job.name: job for job in jobs}
    assert len(by_name) == len(jobs) and all(by_name[name] for job in jobs for name in job.needs)
    large = [job.name for job in jobs if job.name.startswith("memories") or job.name == "scores: scores of each head"]
    assert [job.name for job in jobs if job.turn] == large
    needs = {job.name: job.needs for job in jobs}
    assert needs["rows: deltanet"] == ("memories: deltanet", "chats: one", "chats: several")
    assert needs["tasks: ruler/4k: full attention"] == () and len(needs["book: tier 7680 2/4, calibrated"]) == 1
    brought = ["--scores", str(tmp_path / "a"), "--keys", str(tmp_path / "b"), "--only", "book"]
    jobs = study.Study(real_model.parsed(["--out", str(tmp_path), "--model", "tiny", *brought])).jobs()
    assert [job.name for job in jobs if "passages" not in job.name] == [job.name for job in jobs] and len(jobs) == 5


def test_texts_read_at_once_fit_and_are_of_equal_shares(tmp_path: Path) -> None:
    make_adapters(tmp_path)
    some = study.Study(real_model.parsed(["--out", str(tmp_path), "--model", "tiny"]))
    some.__dict__["model"] = model = base()
    ways = ways_at(tmp_path)
    assert [some._at_once(ways.full(), length, 100) for length in (256, 8192, 65536)] == [50, 25, 4]
    for way, most in ((ways.retained(64, (4, 2)), 8), (ways.passages(), 50), (ways.tier(64, (4, 2)), 25)):
        with way.method(model).on(model):
            assert some._at_once(way, 65536, 100) == most


@pytest.mark.slow
def test_a_whole_study_of_a_small_model(
    words: PreTrainedTokenizerBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every stage once, in a process of its own; a second call finds nothing to do."""
    words.save_pretrained(tmp_path / "model")
    base(vocab_size=len(words)).save_pretrained(tmp_path / "model")
    (tmp_path / "text").mkdir()
    for name in "abcdefgh":  # of some is learned, of the others asked
        lines = " ".join(f"The fern {name} of line {n} says {n * 7919 % 1000}." for n in range(500))
        (tmp_path / "text" / f"{name}.txt").write_text(lines, "utf-8")
    text = str(tmp_path / "text")
    arguments = [
        "--out", str(tmp_path / "out"), "--model", str(tmp_path / "model"), "--texts", text,
        "--book", text, "--code", text,
        "--window", "56", "--sinks", "8", "--length", "1024", "--count", "2", "--batch", "2", "--chats", "2",
        "--far-length", "2048", "--far-chats", "1", "--train-chats", "3", "--score-chats", "2", "--steps", "2",
        "--memories", "deltanet", "--memory-steps", "2", "--tasks", NEEDLES,
        "--task-samples", "2", "--book-tokens", "3000",
    ]  # fmt: skip
    real_model.main(arguments)
    shown = capsys.readouterr().out
    assert "FAILED" not in shown and "book" in shown
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text("utf-8").splitlines()]
    assert not [row for row in rows if "error" in row] and (tmp_path / "out" / "report" / "report.html").is_file()
    real_model.main(arguments)
    assert len((tmp_path / "out" / "rows.jsonl").read_text("utf-8").splitlines()) == len(rows)


@pytest.mark.parametrize("wrong", [("--only", "riddles"), ("--tasks", "riddles")])
def test_stages_and_tasks_are_known(tmp_path: Path, wrong: tuple[str, str]) -> None:
    with pytest.raises(SystemExit):
        real_model.parsed(["--out", str(tmp_path), *wrong])
