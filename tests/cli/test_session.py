"""Reading and writing with one cache, against transformers' own generate."""

from __future__ import annotations

import pytest
import speaking
import torch

from ahn.cli.session import Sampling, sentence, warn_beyond_training
from ahn.errors import AHNError

TEXT = "def main(arguments):\n    return parse(arguments)\n" * 3


def test_continues_as_generate_does() -> None:
    session = speaking.session()
    ids = session.encode(TEXT, start=True)
    session.read(ids)
    text = "".join(session.write(Sampling(max_new_tokens=20)))
    output = session.model.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False)[0, len(ids) :].tolist()
    assert session.written == output
    assert text == session.tokenizer.decode(output, skip_special_tokens=True)


def test_chunks_are_reported_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = speaking.session()
    ids = whole.encode(TEXT, start=True)
    whole.read(ids)
    monkeypatch.setattr("ahn.cli.session.CPU_CHUNK", 7)
    parts = speaking.session()
    sizes: list[int] = []
    parts.read(ids, sizes.append)
    assert sizes == [7] * (len(ids) // 7) + [len(ids) % 7]
    # float32 sums in another order
    torch.testing.assert_close(parts._logits, whole._logits, rtol=1e-4, atol=1e-4)


def test_every_written_token_is_in_the_cache() -> None:
    session = speaking.session()
    session.read(session.encode(TEXT, start=True))
    before = session.cache.seen
    list(session.write(Sampling(max_new_tokens=5)))
    assert session.cache.seen == before + 5
    memory = session.memory()
    assert memory["tokens_in_memory"] == before + 5 - speaking.WINDOW - speaking.SINKS
    assert memory["cache_bytes"] == session.cache.nbytes() > 0


def scripted(monkeypatch: pytest.MonkeyPatch, tokens: list[int]) -> None:
    """Make the model say these tokens."""
    queue = iter(tokens)
    monkeypatch.setattr(Sampling, "choose", lambda *_: next(queue))


def test_a_character_of_several_tokens_comes_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    session = speaking.session()
    said = session.encode("naïve 猫 café", start=False)
    assert len(session.encode("猫", start=False)) > 1
    scripted(monkeypatch, said)
    session.read(session.encode("x", start=True))
    pieces = list(session.write(Sampling(max_new_tokens=len(said))))
    assert "".join(pieces) == "naïve 猫 café"
    assert "猫" in "|".join(pieces) and not any("\ufffd" in piece for piece in pieces)


def test_an_end_token_ends_and_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    session = speaking.session()
    end = session.tokenizer.eos_token_id
    scripted(monkeypatch, [*session.encode("bye", start=False), end])
    session.read(session.encode("x", start=True))
    assert "".join(session.write(Sampling(max_new_tokens=50))) == "bye"
    assert session.finished and session.written[-1] == end


def test_drawing() -> None:
    logits = torch.tensor([3.0, 2.0, 1.0, -50.0])  # shares 0.665, 0.245, 0.090, 0

    def drawn(seed: int = 0, **settings: float) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return [Sampling(**settings).choose(logits, generator) for _ in range(200)]  # type: ignore[arg-type]

    assert set(drawn()) == {0}
    assert set(drawn(temperature=1.0)) == {0, 1, 2}
    assert set(drawn(temperature=1.0, top_p=0.7)) == {0, 1}  # 0.665 falls short of 0.7
    assert set(drawn(temperature=1.0, top_p=0.6)) == {0}
    assert drawn(temperature=1.0) == drawn(temperature=1.0) != drawn(1, temperature=1.0)
    with pytest.raises(AHNError, match="top-p"):
        Sampling(top_p=0.0)


def test_nothing_to_read() -> None:
    with pytest.raises(AHNError, match="no text"):
        speaking.session().read([])


def test_words_about_the_cache() -> None:
    session = speaking.session()
    session.read(session.encode("x y", start=True))
    assert "all of them exact" in sentence(session.memory())
    session.read(session.encode(TEXT, start=True))
    written = session.cache.seen - speaking.WINDOW - speaking.SINKS
    assert f"{written} in the memory (gated_deltanet)" in sentence(session.memory())
    assert warn_beyond_training(session, 512) is None
    assert "513 tokens" in str(warn_beyond_training(session, 513))
