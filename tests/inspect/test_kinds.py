"""Kinds of tokens, means over them, and the figures."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from speaking import tokenizer
from transformers import PreTrainedTokenizerBase

from ahn import AHNError, inspect
from ahn.inspect import KINDS, Reads, Trace, Writes, token_kinds
from ahn.measure import plots

CODE = 'x17 = [1.5, 0x1F]  # a 7\nif don:\n    return f"7 {y}"\n'


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerBase:
    return tokenizer()


def kinds_of(words: PreTrainedTokenizerBase, text: str) -> list[tuple[str, str]]:
    """Runs of (characters without spaces, kind)."""
    ids = words(text, add_special_tokens=False)["input_ids"]
    runs: list[tuple[str, str]] = []
    for i, kind in zip(ids, token_kinds(words, ids), strict=True):
        piece = words.decode([i]).strip()
        if kind == "whitespace":
            assert not piece
        elif runs and runs[-1][1] == kind:
            runs[-1] = (runs[-1][0] + piece, kind)
        else:
            runs.append((piece, kind))
    return runs


def test_code(words: PreTrainedTokenizerBase) -> None:
    assert kinds_of(words, CODE) == [
        ("x17", "name"), ("=[", "operator"), ("1.5", "number"), (",", "operator"), ("0x1F", "number"),
        ("]", "operator"), ("#a7", "text"), ("if", "keyword"), ("don", "name"), (":", "operator"),
        ("return", "keyword"), ('f"7{y}"', "text"),
    ]  # fmt: skip


def test_prose_and_what_is_cut_off(words: PreTrainedTokenizerBase) -> None:
    assert kinds_of(words, "don't, it's 5 o'clock") == [
        ("don't", "name"), (",", "operator"), ("it's", "name"), ("5", "number"), ("o", "name"),
        ("'", "operator"), ("clock", "name"),
    ]  # fmt: skip
    assert kinds_of(words, "self.add(x)")[0][1] == "name"  # ".add" too
    assert kinds_of(words, 'a "b\nc') == [("a", "name"), ('"', "operator"), ("bc", "name")]
    assert kinds_of(words, '"""b\nc') == [('"""bc', "text")]


def test_tokens_that_are_no_text(words: PreTrainedTokenizerBase) -> None:
    end = words.all_special_ids[0]
    whale = words("🦛", add_special_tokens=False)["input_ids"]
    assert len(whale) > 1  # bytes of one character
    kinds = token_kinds(words, [end, *whale])
    assert kinds == ["other"] * (1 + len(whale)) and "other" in KINDS
    assert token_kinds(words, []) == []


def test_ids_as_a_tokenizer_gives_them(words: PreTrainedTokenizerBase) -> None:
    ids = words(CODE, add_special_tokens=False, return_tensors="pt")["input_ids"]
    expected = token_kinds(words, ids[0].tolist())
    assert token_kinds(words, ids) == token_kinds(words, ids[0]) == expected
    with pytest.raises(AHNError, match=r"one text.*\(2, "):
        token_kinds(words, ids.expand(2, -1))


def made(strength: torch.Tensor, update: torch.Tensor) -> Trace:
    """A trace of (H, N) numbers, in two layers, the second twice as large in its updates."""
    trace = Trace()
    trace.window, trace.sinks = 4, 2
    H, N = strength.shape
    positions = torch.arange(2, 2 + N)[None]
    numbers = torch.rand(5, 1, H, N) + 0.1
    for layer in (0, 1):
        writes = Writes(positions, strength[None], numbers[0], (1 + layer) * update[None], numbers[1])
        reads = Reads(numbers[2, :, 0], numbers[3, :, 0], numbers[4, :, 0], numbers[2], numbers[3], positions + 4)
        trace.add(layer, writes, reads)
    return trace


def test_means_by_kind() -> None:
    strength = torch.tensor([[0.1, 0.3, 0.5, 0.9], [0.1, 0.3, 0.5, 0.9]])
    update = torch.tensor([[1.0, 1.0, 1.0, 5.0], [2.0, 2.0, 2.0, 2.0]])
    trace, kinds = made(strength, update), ["-", "-", "a", "a", "b", "b", "-"]
    b, a = trace.by_kind(kinds)
    assert (b.kind, b.tokens, a.kind, a.tokens) == ("b", 2, "a", 2)
    assert a.strength.value == pytest.approx(0.2) and b.strength.value == pytest.approx(0.7)
    assert a.update.value == pytest.approx((0.5 + 1) / 2) and b.update.value == pytest.approx((1.5 + 1) / 2)
    assert math.isnan(a.update.low)  # one block of text says nothing of others
    (second, first) = trace.by_kind(kinds, heads=[(1, 0)])
    assert second.update.value == pytest.approx(1.5) and first.update.value == pytest.approx(0.5)


def test_intervals_hold_the_true_mean_as_often_as_they_say() -> None:
    """Also where neighbours are alike: 64 tokens in a row share half of what they are."""
    generator = torch.Generator().manual_seed(0)
    N, inside, trials = 40 * 64 - 2, 0, 200
    for _ in range(trials):
        blocks = torch.randn(40, generator=generator).repeat_interleave(64)[2:]
        noise = torch.randn(N, generator=generator)
        strength = (blocks + noise)[None] + 3
        (entry,) = made(strength, strength).by_kind(["a"] * (N + 2))
        inside += entry.strength.low < 3 < entry.strength.high
    assert 0.89 < inside / trials < 0.99  # 0.95, and four deviations of 200 draws less a little for 40 blocks


def test_wrong_kinds_and_heads() -> None:
    trace = made(torch.rand(2, 6), torch.rand(2, 6))
    with pytest.raises(AHNError, match="position 7 was written, but only 5"):
        trace.by_kind(["a"] * 5)
    for heads, words in ([(2, 0)], "layer and head \\(2, 0\\)"), ([(0, 2)], "\\(0, 2\\)"), ([], "at least one"):
        with pytest.raises(AHNError, match=words):
            trace.by_kind(["a"] * 8, heads)


def test_figures(tmp_path: Path) -> None:
    trace = made(torch.rand(2, 600), torch.rand(2, 600))
    kinds = trace.by_kind(["a"] * 300 + ["b"] * 302)
    strength, states = inspect.strength_figure(trace, "t"), inspect.state_figure(trace, "t")
    picture = strength.axes[0].images[0].get_array()
    assert picture.shape == (4, 200)
    assert picture[0].mean() == pytest.approx(float(trace.writes[0].strength[0, 0].mean()), abs=1e-5)
    assert len(states.axes[0].lines) == 2
    reads = inspect.read_figure(trace, "t").axes[0]
    assert reads.patches[0].get_height() == pytest.approx(trace.reads[0].share, rel=1e-5)
    bars = inspect.kind_figure(kinds, "t").axes[1]
    assert [patch.get_width() for patch in bars.patches] == [entry.update.value for entry in reversed(kinds)]
    for n, figure in enumerate((strength, states, reads.figure, bars.figure)):
        plots.save(figure, tmp_path / f"{n}.png")
    short = made(torch.rand(2, 1), torch.rand(2, 1))
    for draw in (inspect.strength_figure, inspect.state_figure, inspect.read_figure):
        plots.save(draw(short, "one token"), tmp_path / "short.png")
