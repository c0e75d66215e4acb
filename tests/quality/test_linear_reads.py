"""Reads of tokens that left the window: what they have in common with the model's attention, and what they store."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import speaking
import torch
from models import base, tokens
from torch import Tensor
from transformers import PreTrainedModel

import ahn
from ahn.measure.texts import Text as Source
from ahn.memory.base import l2_norm, rms_norm
from ahn.memory.retained_tokens import Scorer

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "quality"))

import linear_reads
from chats.writer import ChatWriter, Plan
from linear_reads import FULL, WAYS, WINDOW, Study, Text
from real import mixing
from real.mixing import Mixer, Way, read

W, S = 8, 2


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return base("llama")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixing, "CHUNK", 16)
    monkeypatch.setattr(linear_reads, "PASSAGE", 6)


def mixer(way: Way, length: int, places: Tensor | None = None, **more: Any) -> Mixer:
    return Mixer(way, W, S, torch.tensor([length]), places, **more)


def logits(model: PreTrainedModel, ids: Tensor, way: Way, places: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.lm_head(read(model, ids, mixer(way, ids.shape[1], places)))
    return found


def study(model: PreTrainedModel) -> Study:
    texts = chats()
    return Study(model, W, S, Scorer(model.config.hidden_size, 1), 1, texts[:2], batch=2)


def chats() -> list[Text]:
    """Of unequal lengths, with facts of unequal lengths."""
    shape = ((60, slice(10, 16)), (57, slice(20, 24)), (60, slice(5, 11)))
    return [Text(tokens(1, n, seed=n)[0, :n], torch.arange(n - 3, n), fact) for n, fact in shape]


@torch.no_grad()
def test_softmax_over_all_tokens_is_full_attention(model: PreTrainedModel) -> None:
    ids = tokens(2, 60)
    expected = model(ids).logits
    torch.testing.assert_close(logits(model, ids, WAYS[FULL]), expected)
    every = torch.arange(60).expand(2, -1)
    torch.testing.assert_close(logits(model, ids, WAYS["fact, softmax"], every), expected)


@torch.no_grad()
def test_nothing_else_is_the_packages_sinks_and_window(model: PreTrainedModel) -> None:
    ids = tokens(2, 60)
    found = logits(model, ids, WAYS[WINDOW])
    attached = ahn.attach(base("llama"), ahn.AHNConfig("window_only", W, S))
    torch.testing.assert_close(found, attached(ids).logits)
    assert not torch.allclose(found, logits(model, ids, WAYS[FULL]), atol=1e-2)


def keys_and_values(count: int, length: int = 40) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2, heads, length, 8, generator=generator) for heads in (count, 2, 2)]


@pytest.mark.parametrize("norm", ["scaled", "normalised"])
def test_a_lossless_state_gives_each_value_for_its_key(norm: str) -> None:
    _, k, v = keys_and_values(4)
    places = torch.tensor([[5, 6, 7, 8, 9], [12, 13, 14, -1, -1]])
    some = mixer(Way("fact", "lossless", norm=norm), 40, places)
    k[0, :, 9], v[0, :, 9] = k[0, :, 6], v[0, :, 6]  # a word that is said twice, before any layer looked around
    found = some.lossless(k.repeat_interleave(2, dim=1), k, v)
    for row, at in enumerate(places):
        at = at[at >= 0]
        torch.testing.assert_close(found[row, ::2, at], v[row, :, at], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found[1, ::2, 0], v[1, :, 0], atol=0.1)  # it stands for no token in places
    longest = v.norm(dim=-1).amax()
    assert found.norm(dim=-1).max() <= longest * 1.001


def test_the_delta_rule_writes_what_left_and_nothing_else() -> None:
    q, k, v = keys_and_values(4)
    places = torch.tensor([[5, 6, 7], [12, 13, -1]])
    for chosen in (places, None):
        found = mixer(Way("fact", "delta"), 40, chosen).delta(q, k, v)
        for row in range(2):
            state = torch.zeros(2, 8, 8)
            for t in range(40):
                j = t - W
                if j >= S and (chosen is None or j in chosen[row]):
                    key = l2_norm(k[row, :, j])
                    error = v[row, :, j] - torch.einsum("hkv,hk->hv", state, key)
                    state = state + key[:, :, None] * error[:, None, :]
                o = torch.einsum("hkv,hgk->hgv", state, l2_norm(q[row, :, t]).unflatten(0, (2, 2))) * 8**-0.5
                expected = rms_norm(o.flatten(0, 1), torch.ones(8))
                torch.testing.assert_close(found[row, :, t], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("every", [0, 16])
def test_hindsight_finds_the_state_that_made_the_reads(every: int) -> None:
    q, *_ = keys_and_values(4, 60)
    share = torch.rand(2, 4, 60, 1, generator=torch.Generator().manual_seed(1))
    states = torch.randn(2, 4, -(-60 // (every or 60)), 8, 8, generator=torch.Generator().manual_seed(2))
    wanted = torch.einsum("bhtp,bhtpv->bhtv", q, states.repeat_interleave(every or 60, dim=2)[:, :, :60])
    some = Mixer(Way("all", "hindsight", every=every), W, S, torch.tensor([60, 60]), None)
    error = (some.hindsight(q, wanted, share) - wanted).norm() / wanted.norm()
    assert error < 20 * mixing.RIDGE  # ridge over the smallest eigenvalue, which is not far below the mean
    wrong = wanted.clone()
    wrong[:, :, 57:] += 100
    assert torch.equal(
        Mixer(some.way, W, S, torch.tensor([57, 57]), None).hindsight(q, wrong, share)[:, :, :57],
        Mixer(some.way, W, S, torch.tensor([57, 57]), None).hindsight(q, wanted, share)[:, :, :57],
    )


def test_scales_are_fitted_to_the_softmax(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of reads that are half of the softmax's: 2, and with it everything is as by softmax."""
    ours, way = study(model), WAYS["fact, delta"]
    monkeypatch.setattr(Mixer, "delta", lambda self, q, k, v: self.attended(q, k, v, near=False)[0] / 2)
    assert len(ours.scales(way)) == model.config.num_hidden_layers
    for scale in ours.scales(way):
        torch.testing.assert_close(scale, torch.full_like(scale, 2))
    a, b = (
        ours.read(x, ours.fitted, **more)
        for x, more in ((way, {"scales": ours.scales(way)}), (WAYS["fact, softmax"], {}))
    )
    torch.testing.assert_close(a, b)


@torch.no_grad()
def test_a_way_is_a_row(model: PreTrainedModel) -> None:
    ours, texts = study(model), {"chats": chats(), "prose": [Text(tokens(1, 60)[0], torch.arange(11, 60))]}
    rows: dict[str, Any] = {}
    names = [FULL, WINDOW, "fact, lossless, normalised", "passage, delta", "all, delta"]
    for name in names:
        rows[name] = linear_reads.row_of(ours, name, texts, rows)
    assert len(linear_reads.table(rows).splitlines()) == len(names)
    assert "prose" not in rows["passage, delta"]
    own = torch.nn.functional.cross_entropy(model(tokens(1, 60)).logits[0, 10:-1], tokens(1, 60)[0, 11:])
    assert rows[FULL]["prose"]["loss"] == pytest.approx(own.item(), rel=1e-5)
    losses = [rows[name]["prose"]["loss"] for name in (WINDOW, "all, delta", FULL)]
    assert rows["all, delta"]["prose"]["won"] == pytest.approx(
        (losses[0] - losses[1]) / (losses[0] - losses[2]), rel=1e-2
    )


def test_what_is_done_is_not_done_again(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(linear_reads, "study_of", lambda options: (study(model), {"chats": chats()}))
    out = tmp_path / "new" / "rows.jsonl"
    for only in (WINDOW, f"{WINDOW}|fact, softmax$"):
        linear_reads.main(["--out", str(out), "--only", only.replace("+", "."), "--device", "cpu"])
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["name"] for row in rows] == [WINDOW, "fact, softmax"]
    assert all(row["chats"]["n"] == 3 and row["packages"]["torch"] for row in rows)
    assert "[80]" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        linear_reads.main(["--out", str(out), "--chats", "5"])
    with pytest.raises(SystemExit):
        linear_reads.main(["--out", str(tmp_path / "other.jsonl"), "--model", str(tmp_path)])


@torch.no_grad()
def test_padding_changes_nothing(model: PreTrainedModel) -> None:
    ours, way = study(model), WAYS["all, hindsight every 1024"]
    together = ours.read(way, ours.fitted)
    for x, text in zip(together, ours.fitted, strict=True):
        torch.testing.assert_close(x[: len(text.ids)], ours.read(way, [text])[0], rtol=1e-4, atol=1e-4)


def test_the_best_rated_passage_has_left_the_window(model: PreTrainedModel) -> None:
    ours, texts = study(model), chats()
    for peak, expected in ((30, 30), (55, None), (0, None)):

        def scored(x: Tensor, peak: int = peak) -> Tensor:
            near = (torch.arange(x.shape[1]) - peak - 2.5).abs() < 3
            return torch.where(near, 5.0, -5.0)[None, None].expand(len(x), 1, -1)

        ours.scorer = scored  # type: ignore[assignment]
        places = ours.places(WAYS["passage, softmax"], texts)
        assert places is not None and places.shape == (3, 6)
        answers = torch.tensor([int(text.wanted[0]) for text in texts])
        assert (places >= S).all() and (places[:, -1] < answers - W).all()
        assert expected is None or (places[:, 0] == expected).all()


def test_the_sentence_with_the_answer_is_found() -> None:
    words = speaking.tokenizer(speaking.CHATML)
    plain = "The ship number {n} came into the harbour with {m} barrels of oil and nobody saw it.\n"
    sources = [Source(f"part-{n}", "".join(plain.format(n=n, m=m) for m in range(200))) for n in range(12)]
    writer = ChatWriter(words, sources, "evaluation")
    for seed in range(3):
        chat = writer.write(Plan(1500, ("number",), 1, 200), seed)
        text = linear_reads.chat_of(words, chat)
        assert text.fact is not None
        answer = chat["asked"][0]["answer"]
        said = words.decode(text.ids[text.fact]).strip()
        assert said.startswith(("The ", "It was agreed")) and said.endswith(".") and answer in said
        assert said.count(".") == 1 and "harbour" not in said
        assert words.decode(text.ids[text.wanted]).strip() == answer and len(text.ids) == text.wanted[-1] + 1
