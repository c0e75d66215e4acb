"""Reading and writing with one cache, against transformers' own generate."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import speaking
import torch

from ahn.cache.conversation import AHNCache
from ahn.cli.session import LONG, Session, sentence, warn_beyond_training
from ahn.cli.writing import Interrupt, Sampling
from ahn.errors import AHNError

TEXT = "def main(arguments):\n    return parse(arguments)\n" * 3


def generated(session: Session, ids: list[int], seed: int = 0, **settings: Any) -> list[int]:
    """What `generate` continues these ids with."""
    torch.manual_seed(seed)
    ones = torch.ones(1, len(ids), dtype=torch.long)
    return session.model.generate(torch.tensor([ids]), attention_mask=ones, **settings)[0, len(ids) :].tolist()


@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 3.0}, {"no_repeat_ngram_size": 1}])
def test_greedy_text_is_generates_with_the_models_own_settings(settings: dict[str, Any]) -> None:
    session = speaking.session()
    session.model.generation_config.update(**settings)
    ids = session.encode(TEXT, start=True)
    session.read(ids)
    pieces: list[str] = []
    text = session.write(Sampling(20), pieces.append)
    assert session.written == generated(session, ids, max_new_tokens=20)
    assert text == "".join(pieces) == session.tokenizer.decode(session.written, skip_special_tokens=True)
    if settings:  # they do change what is said
        session.model.generation_config = type(session.model.generation_config)()
        assert generated(session, ids, max_new_tokens=20, do_sample=False) != session.written


def test_settings_about_text_or_of_outputs_are_no_mistake() -> None:
    """`stop_strings` want the tokenizer, `return_dict_in_generate` gives another kind of output."""
    session = speaking.session()
    ids = session.encode(TEXT, start=True)
    session.read(ids)
    whole = session.copy().write(Sampling(20))
    stop = whole[4:8]
    session.model.generation_config.update(stop_strings=[stop], return_dict_in_generate=True, output_scores=True)
    text = session.write(Sampling(20))
    assert stop in text and len(text) < len(whole) and whole.startswith(text)


def test_settings_that_want_code_from_the_hub_are_one_sentence() -> None:
    session = speaking.session()
    session.read(session.encode(TEXT, start=True))
    session.model.generation_config.update(penalty_alpha=0.6, top_k=4)
    with pytest.raises(AHNError, match=r"generation settings \(generation_config.json\) do not work here: Contrastive"):
        session.write(Sampling(4))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"stop_strings": 5}, "'int' object is not iterable"),
        ({"forced_eos_token_id": 99999}, "index 99999 is out of bounds"),
        ({"do_sample": True, "temperature": 1e-42}, "probability tensor contains"),
        ({"do_sample": True, "repetition_penalty": 1e-300}, "probability tensor contains"),
    ],
    ids=str,
)
def test_settings_that_transformers_does_not_check_are_one_sentence(settings: dict[str, Any], said: str) -> None:
    session = speaking.session()
    session.read(session.encode(TEXT, start=True))
    vars(session.model.generation_config).update(settings)
    with pytest.raises(AHNError, match=rf"generation settings \(generation_config.json\) do not work here: .*{said}"):
        session.write(Sampling(4))


def test_an_error_of_the_model_keeps_its_traceback() -> None:
    session = speaking.session()
    session.read(session.encode(TEXT, start=True))
    session.model.get_output_embeddings().register_forward_hook(lambda *_: {}["a defect"])
    with pytest.raises(KeyError, match="a defect"):
        session.write(Sampling(4))


def test_a_temperature_near_zero_takes_the_most_probable_token() -> None:
    session = speaking.session()
    ids = session.encode(TEXT, start=True)
    session.read(ids)
    best = session.copy().write(Sampling(12, 0.0))
    assert session.copy().write(Sampling(12, 1e-42)) == session.write(Sampling(12, 1e-320, top_p=0.9)) == best


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_scores_that_are_no_numbers_are_one_sentence_before_anything_is_written(temperature: float) -> None:
    """As of a model that was trained in bfloat16 and overflows in float16."""
    session = speaking.session()
    session.model.get_output_embeddings().weight.data[3] = torch.nan
    session.read(session.encode(TEXT, start=True))
    pieces: list[str] = []
    with pytest.raises(AHNError, match=r"not numbers \(NaN\).* float32 can hold"):
        session.write(Sampling(20, temperature), pieces.append)
    assert not pieces


def test_a_second_turn_goes_on_as_generate_does() -> None:
    session = speaking.session()
    session.model.generation_config.update(repetition_penalty=1.5)
    first, second = (session.encode(part, start) for part, start in ((TEXT, True), ("\nclass A:\n", False)))
    session.read(first)
    session.write(Sampling(7))
    said = list(session.written)
    session.read(second)
    session.write(Sampling(9))
    assert session.written == generated(session, [*first, *said, *second], max_new_tokens=9)


def test_flags_go_before_the_models_settings() -> None:
    session = speaking.session()
    session.model.generation_config.update(do_sample=True, temperature=5.0, top_k=7, num_beams=4)
    ids = session.encode(TEXT, start=True)

    def said(sampling: Sampling) -> list[int]:
        session.reset()
        session.read(ids)
        session.write(sampling)
        return session.written

    single = {"max_new_tokens": 12, "num_beams": 1}
    assert said(Sampling(12, 0.0)) == generated(session, ids, do_sample=False, **single)
    assert said(Sampling(12, seed=3)) == generated(session, ids, 3, **single)
    assert said(Sampling(12, 0.5, 0.9, 3)) == generated(session, ids, 3, temperature=0.5, top_p=0.9, **single)
    assert said(Sampling(12, seed=3)) != said(Sampling(12, seed=4))
    for mistake in ({"top_p": 0.0}, {"top_p": 1.1}, {"temperature": -1.0}):
        with pytest.raises(AHNError, match="top-p"):
            Sampling(**mistake)


def test_a_lookup_changes_no_text_also_after_a_conversation_was_loaded(tmp_path: Path) -> None:
    def said(lookup: int) -> list[int]:
        session, found = speaking.session(), []
        file = str(tmp_path / f"{lookup}.safetensors")
        for turn in (TEXT, TEXT, "x", TEXT):
            session.read(session.encode(turn, start=not session.seen))
            session.write(Sampling(12, 0.0, lookup=lookup))
            found += session.written
            if turn == "x":
                session.save(file)
                session.reset(AHNCache.load(file, session.model))
        assert session.seen == len(session._ids) + session._before
        return found

    assert said(lookup=4) == said(lookup=0)


def test_drawing_leaves_the_random_state_alone() -> None:
    session = speaking.session()
    session.read(session.encode(TEXT, start=True))
    before = torch.get_rng_state()
    session.write(Sampling(3, 1.0))
    assert torch.equal(torch.get_rng_state(), before)


def test_chunks_are_reported_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = speaking.session()
    ids = whole.encode(TEXT, start=True)
    whole.read(ids)
    monkeypatch.setattr("ahn.measure.reading.CPU_CHUNK", 7)
    parts = speaking.session()
    sizes: list[int] = []
    parts.read(ids, sizes.append)
    assert max(sizes) == 7 and sum(sizes) == len(ids)
    # float32 sums in another order
    torch.testing.assert_close(speaking.next_logits(parts), speaking.next_logits(whole), rtol=1e-4, atol=1e-4)


def test_every_written_token_counts() -> None:
    session = speaking.session()
    session.read(session.encode(TEXT, start=True))
    before = session.seen
    session.write(Sampling(max_new_tokens=5))
    assert session.seen == before + 5
    memory = session.memory()
    assert memory["tokens_in_memory"] == before + 5 - speaking.WINDOW - speaking.SINKS
    assert memory["cache_bytes"] == session.cache.nbytes() > 0


def test_a_character_of_several_tokens_comes_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    session = speaking.session()
    said = session.encode("naïve 猫 café", start=False)
    assert len(session.encode("猫", start=False)) > 1
    speaking.script(monkeypatch, said)
    session.read(session.encode("x", start=True))
    pieces: list[str] = []
    assert session.write(Sampling(max_new_tokens=len(said)), pieces.append) == "".join(pieces) == "naïve 猫 café"
    assert "猫" in "|".join(pieces) and not any("\ufffd" in piece for piece in pieces)


def test_an_end_token_ends_and_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    session = speaking.session()
    end = session.tokenizer.eos_token_id
    speaking.script(monkeypatch, [*session.encode("bye", start=False), end])
    session.read(session.encode("x", start=True))
    assert session.write(Sampling(max_new_tokens=50)) == "bye"
    assert session.finished and session.written[-1] == end


# -- Ctrl-C


def test_ctrl_c_stops_the_writing_and_the_conversation_goes_on() -> None:
    session = speaking.session()
    ids = session.encode(TEXT, start=True)
    session.read(ids)
    handler = signal.getsignal(signal.SIGINT)

    def show(text: str) -> None:
        os.kill(os.getpid(), signal.SIGINT) if not interrupt.wanted else None

    with Interrupt().watching() as interrupt:
        session.write(Sampling(400, 0.0), show, interrupt)
    assert signal.getsignal(signal.SIGINT) is handler
    assert session.interrupted and not session.finished and 0 < len(session.written) < 400
    said = list(session.written)
    session.write(Sampling(5, 0.0))
    assert said + session.written == generated(session, ids, max_new_tokens=len(said) + 5, do_sample=False)
    assert not session.interrupted


def test_ctrl_c_amid_a_chunk_leaves_it_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk takes seconds on a CPU: it ends before its second layer, and what was read before can be gone on from."""
    session, interrupt, chunks = speaking.session(), Interrupt(), []
    ids = session.encode(TEXT, start=True)
    monkeypatch.setattr("ahn.cli.session.chunk_size", lambda model: 16)

    def ask(*_: Any) -> None:
        chunks.append(session.cache.seen)
        interrupt.wanted = len(chunks) == 3

    hook = session.model.get_decoder().layers[0].register_forward_hook(ask)
    assert session.read(ids, interrupt=interrupt) == session.seen == session.cache.seen == 32
    hook.remove()
    assert chunks == [0, 16, 32]
    interrupt.wanted = False
    assert session.read(ids[32:], interrupt=interrupt) == len(ids) - 32
    session.write(Sampling(5, 0.0))
    assert session.written == generated(session, ids, max_new_tokens=5, do_sample=False)
    assert not any(layer._forward_pre_hooks for layer in session.model.get_decoder().layers)


@pytest.mark.slow
def test_ctrl_c_gets_through_while_a_long_text_is_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokenizer itself lets no signal through: half a minute for five megabytes."""
    session = speaking.session()

    def deaf(*_: Any, **__: Any) -> dict[str, list[int]]:
        while not over.is_set():
            with contextlib.suppress(KeyboardInterrupt):
                over.wait(0.01)
        return {"input_ids": [0]}

    over = threading.Event()
    monkeypatch.setattr(session, "tokenizer", deaf)
    threading.Timer(10, over.set).start()
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        session.encode("x" * LONG, start=True)
    over.set()
    assert time.monotonic() - start < 5


def test_the_real_tokenizer_lets_other_threads_run() -> None:
    words, text, ticks = speaking.tokenizer(), "word" * (1 << 16), 0
    worker = threading.Thread(target=lambda: words(text, verbose=False))
    worker.start()
    while worker.is_alive():
        time.sleep(0.01)
        ticks += 1
    assert ticks > 5  # a few at most, were Python stopped meanwhile


def test_a_long_text_is_tokenised_as_a_short_one(monkeypatch: pytest.MonkeyPatch) -> None:
    session = speaking.session()
    short = session.encode(TEXT, start=True)
    monkeypatch.setattr("ahn.cli.session.LONG", 10)
    assert session.encode(TEXT, start=True) == short
    monkeypatch.setattr(session, "tokenizer", None)
    with pytest.raises(TypeError):  # what goes wrong there is not lost
        session.encode(TEXT, start=True)


def test_nothing_to_read() -> None:
    with pytest.raises(AHNError, match="no text"):
        speaking.session().read([])


def test_words_about_the_cache() -> None:
    session = speaking.session()
    session.read(session.encode("x y", start=True))
    assert "all of them exact" in sentence(session.memory())
    session.read(session.encode(TEXT, start=True))
    written = session.seen - speaking.WINDOW - speaking.SINKS
    assert f"{written} in the memory (gated_deltanet)" in sentence(session.memory())
    assert warn_beyond_training(session, 512) is None
    assert warn_beyond_training(session, 513) is None  # no query sees a token from farther than 512
    published = speaking.session(max_distance=0)
    assert warn_beyond_training(published, 512) is None and "513 tokens" in str(warn_beyond_training(published, 513))
