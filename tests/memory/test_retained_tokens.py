"""Retained tokens by themselves: scores, who stays, padding. Whole models are in tests/model, with the oracle."""

from __future__ import annotations

import dataclasses

import oracle
import pytest
import torch
from torch import Tensor

import ahn
from ahn import AHNError, memory
from ahn.attend import masked
from ahn.layout.evicted import Evicted, without_padding
from ahn.layout.visibility import Padding, Visibility
from ahn.memory.base import MemoryKeys
from ahn.memory.retained_tokens import RetainedTokens
from ahn.ops.quantize import decode, encode

D, H, HKV, P, SLOTS = 6, 4, 2, 8, 24
CPU = torch.device("cpu")


def fresh(slots: int = SLOTS, bits: tuple[int, int] = (16, 16)) -> RetainedTokens:
    return RetainedTokens(D, H, P, HKV, slots=slots, bits=bits)


@dataclasses.dataclass
class Shown:
    """What all queries of a forward see: keys and values (B, Hkv, C, P), visible (B, Hkv, n, C)."""

    key: Tensor
    value: Tensor
    visible: Tensor
    state: dict[str, Tensor]


def together(made: MemoryKeys) -> Shown:
    """The pieces side by side; their queries are all of the forward's, in order."""
    assert [x.first for x in made.pieces] == [0, *(x.last for x in made.pieces[:-1])]
    length, visible = made.pieces[-1].last, []
    for x in made.pieces:
        grown = torch.zeros(*x.key.shape[:2], length, x.key.shape[2], dtype=torch.bool)
        grown[:, :, x.first : x.last] = masked.of_all_keys(x.visible, x.key.shape[2])
        visible.append(grown)
    key, value = (torch.cat([getattr(x, name) for x in made.pieces], 2) for name in ("key", "value"))
    return Shown(key, value, torch.cat(visible, 3), made.state)


def shown(fn: RetainedTokens, view: Visibility, key: Tensor, score: Tensor) -> Shown:
    """What the queries of a forward over the whole text see; a value is its key."""
    parts = [view.evicted_slots(x) for x in (key, key, score)]
    left = without_padding(Evicted(*parts[:2], {"score": parts[2]}), fn.closed_gates, view)
    made = fn.extra_keys(left, view, {})
    assert made is not None
    return together(made)


def numbered(batch: int, length: int) -> Tensor:
    """Keys (B, Hkv, L, P) that say where they stand."""
    return torch.arange(length).float()[None, None, :, None].expand(batch, HKV, -1, P)


def seen(made: Shown, row: int, head: int, query: int) -> list[int]:
    return sorted(made.key[row, head, made.visible[row, head, query], 0].int().tolist())


@torch.no_grad()
def test_scores() -> None:
    fn = fresh()
    for parameter in fn.parameters():
        parameter += torch.randn_like(parameter)
    x = torch.randn(2, 7, D)
    score = fn.write_gates(x)["score"]
    assert score.dtype == torch.float32 and score.shape == (2, HKV, 7)
    assert torch.equal(score, score.bfloat16().float())
    weights = {name: p.double() for name, p in fn.state_dict().items()}
    torch.testing.assert_close(score.double(), oracle.scores(weights, x.double()), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("slots", [2, 9, 24])
def test_of_equal_scores_the_older_stay(slots: int) -> None:
    window, sinks, length = 5, 2, 60
    fn, view = fresh(slots), Visibility(window, sinks, 0, length, CPU)
    made = shown(fn, view, numbered(1, length), torch.zeros(1, HKV, length))
    for query in range(window + sinks, length):
        left = list(range(sinks, query - window + 1))
        assert seen(made, 0, 1, query) == oracle.retained([0.0] * length, left, slots)
    assert seen(made, 0, 1, length - 1)[: fn.kept] == list(range(sinks, sinks + fn.kept))


@pytest.mark.parametrize("counted", [1, 3, 64])
def test_each_head_keeps_its_own(counted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many blocks are looked at together, and in pieces of nine queries."""
    monkeypatch.setattr("ahn.layout.blocks.COUNTED", counted)
    monkeypatch.setattr("ahn.layout.blocks.QUERIES", 9)
    window, sinks, length = 5, 2, 80
    fn, view = fresh(), Visibility(window, sinks, 0, length, CPU)
    score = torch.randn(1, HKV, length).bfloat16().float()
    made = shown(fn, view, numbered(1, length), score)
    found = [seen(made, 0, head, length - 1) for head in range(HKV)]
    left = list(range(sinks, length - window))
    assert found == [oracle.retained(score[0, head].tolist(), left, SLOTS) for head in range(HKV)]
    assert found[0] != found[1]


@pytest.mark.parametrize("counted", [1, 64])
def test_passages_stay_and_go_whole(counted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ahn.layout.blocks.COUNTED", counted)
    monkeypatch.setattr("ahn.layout.blocks.QUERIES", 9)
    window, sinks, length, slots, passage = 5, 2, 150, 48, 3
    fn = RetainedTokens(D, H, P, HKV, slots=slots, bits=(16, 16), passage=passage)
    score = torch.randn(1, 1, length).expand(1, HKV, length).bfloat16().float()
    made = shown(fn, Visibility(window, sinks, 0, length, CPU), numbered(1, length), score)
    for query in range(window + sinks, length):
        left = list(range(sinks, query - window + 1))
        stay = seen(made, 0, 0, query)
        assert stay == seen(made, 0, 1, query) == oracle.retained(score[0, 0].tolist(), left, slots, passage)
        whole = [token for token in stay if token - sinks < len(left) // fn.block * fn.block]
        assert all((token - sinks) % passage == n % passage for n, token in enumerate(whole))


@pytest.mark.parametrize(("slots", "passage"), [(24, 2), (48, 4), (4096, 3), (4096, 256)])
def test_passages_fill_blocks_and_what_is_kept(slots: int, passage: int) -> None:
    with pytest.raises(AHNError, match=f"passage={passage} must divide"):
        RetainedTokens(D, H, P, HKV, slots=slots, passage=passage)


def test_passages_have_scores_of_all_heads_and_no_bias() -> None:
    fn = RetainedTokens(D, H, P, HKV, slots=16, passage=2)
    for parameter in fn.parameters():
        parameter.data += torch.randn_like(parameter)
    x = torch.randn(2, 7, D)
    score = fn.write_gates(x)["score"]
    expected = fn.logits(x).sigmoid().mean(1, keepdim=True).bfloat16().float()
    assert torch.equal(score, expected.expand(2, HKV, 7))


def test_the_state_is_what_the_last_query_sees() -> None:
    window, sinks, length = 5, 2, 80
    fn, view = fresh(), Visibility(window, sinks, 0, length, CPU)
    made = shown(fn, view, numbered(1, length), torch.randn(1, HKV, length))
    positions = made.state["positions"][0, 0]
    keys = torch.cat([made.state["keys"], made.state["block_keys"]], 2)[0, 0, :, 0]
    used = positions >= 0
    assert sorted(positions[used].tolist()) == seen(made, 0, 0, length - 1)
    assert torch.equal(keys[used], positions[used].float()) and not keys[~used].any()
    assert positions[: fn.kept].tolist() == sorted(positions[: fn.kept].tolist())


BITS = pytest.mark.parametrize("bits", [(16, 16), (4, 2), (2, 3), (16, 4)], ids=str)


@pytest.mark.sample(2)
@BITS
def test_codes_are_those_of_the_token_less_the_first_blocks_mean(bits: tuple[int, int]) -> None:
    window, sinks, length = 5, 2, 80
    fn, view = fresh(bits=bits), Visibility(window, sinks, 0, length, CPU)
    key, score = torch.randn(1, HKV, length, P), torch.randn(1, HKV, length)
    made = shown(fn, view, key, score)
    first = key[:, :, sinks : sinks + fn.block].mean(2, keepdim=True)

    def coded(bits: int, unbiased: bool) -> Tensor:
        return key if bits == 16 else decode(*encode(key - first, unbiased, bits), torch.float32, bits) + first

    expected = coded(bits[0], True), coded(bits[1], False)
    for query in range(window + sinks, length):
        left = list(range(sinks, query - window + 1))
        block = len(left) - len(left) % fn.block
        for head in range(HKV):
            stay = oracle.retained(score[0, head].bfloat16().tolist(), left, SLOTS)
            wanted = [(x if p in left[:block] else key)[0, head, p] for x in expected for p in stay]
            seen = made.visible[0, head, query]
            found = torch.cat([made.key[0, head, seen], made.value[0, head, seen]])
            torch.testing.assert_close(_sorted(found), _sorted(torch.stack(wanted)), rtol=1e-5, atol=1e-5)


def _sorted(rows: Tensor) -> Tensor:
    return rows[rows[:, 0].argsort()]


@BITS
@pytest.mark.sample(6)
@pytest.mark.parametrize("pieces", [[1] * 80, [8, 1, 1, 30, 2, 38], [50, 30]], ids=len)
def test_in_pieces_or_at_once(bits: tuple[int, int], pieces: list[int]) -> None:
    window, sinks, length = 5, 2, 80
    fn = fresh(bits=bits)
    key, value, score = torch.randn(2, HKV, length, P), torch.randn(2, HKV, length, P), torch.randn(2, HKV, length)
    left = Evicted(*(x[:, :, sinks : length - window] for x in (key, value)), {"score": score[:, :, sinks:-window]})
    whole = fn.extra_keys(left, Visibility(window, sinks, 0, length, CPU), {})
    assert whole is not None
    all_at_once = together(whole)
    state, seen = {}, 0
    for piece in pieces:
        view = Visibility(window, sinks, seen, piece, CPU)
        gone = slice(seen + piece - window - view.evicted, seen + piece - window) if view.evicted else slice(0, 0)
        left = Evicted(key[:, :, gone], value[:, :, gone], {"score": score[:, :, gone]})
        made = fn.extra_keys(left, view, state)
        seen += piece
        if made is not None:
            state = made.state
            own, expected = together(made), all_at_once.visible[0, 1, seen - 1]
            found = own.key[0, 1, own.visible[0, 1, -1]]
            assert torch.equal(_sorted(found), _sorted(all_at_once.key[0, 1, expected]))
    assert state.keys() == whole.state.keys()
    assert all(torch.equal(state[name], x) for name, x in whole.state.items())


@BITS
def test_poisoned_padding_reaches_nothing(bits: tuple[int, int]) -> None:
    window, sinks, length = 3, 1, 70
    pads = torch.tensor([0, 23])
    real = torch.arange(length) >= pads[:, None]
    none = Padding.none(2, CPU)
    fn, view = fresh(bits=bits), Visibility(window, sinks, 0, length, CPU, none, none.advance(real))
    key, score = torch.randn(2, HKV, length, P), torch.randn(2, HKV, length)
    poison = ~real[:, None]
    made = shown(fn, view, key.masked_fill(poison[..., None], float("nan")), score.masked_fill(poison, float("nan")))
    alone = shown(fn, Visibility(window, sinks, 0, length - 23, CPU), key[1:, :, 23:], score[1:, :, 23:])
    assert all(torch.isfinite(x).all() for x in (made.key, made.value))
    assert all(torch.equal(made.state[name][1:], x) for name, x in alone.state.items())


def test_room_for_slots() -> None:
    assert memory.slot_count("retained", 100, 24) == 24
    assert memory.window_within("retained", 100) == 100  # they are its state, and counted in bytes
    with pytest.raises(AHNError, match="2, 3 or 4, got 16"):
        ahn.AHNConfig(memory="retained", key_bits=16, quantized=8)
    with pytest.raises(AHNError, match=r"AHNConfig\.slots must be an integer ≥ 2"):
        ahn.AHNConfig(memory="retained", slots=1)


def test_it_is_trainable_and_not_recurrent() -> None:
    assert "retained" in memory.names() and "retained" not in memory.recurrent() + memory.baselines()
    assert memory.by_published_name("RetainedTokens") is RetainedTokens


@torch.no_grad()
def test_beyond_the_trained_length_they_weigh_as_in_a_text_of_it() -> None:
    """By position: a padded row's tokens have left later."""
    window, sinks, length, trained, pads = 4, 2, 100, 40, 30
    padding = [Padding(torch.tensor([0, n]), torch.tensor([False, False]), torch.tensor([0, 0])) for n in (0, pads)]
    view = Visibility(window, sinks, 0, length, CPU, *padding, reach=trained)
    key, score = numbered(2, length), torch.randn(2, HKV, length)
    parts = [view.evicted_slots(x) for x in (key, key, score)]
    made = fresh().extra_keys(Evicted(*parts[:2], {"score": parts[2]}), view, {})
    assert made is not None
    found = torch.cat([x.bias for x in made.pieces if x.bias is not None], dim=1)
    left = torch.arange(length) - torch.tensor([[0], [pads]]) - window - sinks + 1
    expected = torch.where(left > trained - window - sinks, (trained - window - sinks) / left, 1.0).log()
    torch.testing.assert_close(found, expected)
    for shorter in (dataclasses.replace(view, reach=length), dataclasses.replace(view, reach=0)):
        made = fresh().extra_keys(Evicted(*parts[:2], {"score": parts[2]}), shorter, {})
        assert made is not None and all(x.bias is None for x in made.pieces)
