"""The engine: many at once as one alone, conversations found again, and faults that are one request's alone."""

from __future__ import annotations

from engines import alone, ask, engine, model, prompt, request, text, whole


def test_one_reply() -> None:
    of = model()
    with engine(of) as running:
        got = ask(running, prompt(30), 12)
    assert got.tokens == alone(of, prompt(30), 12)
    assert got.text == text(got.tokens) and got.finish == "length" and got.error is None


def test_many_at_once_write_what_each_writes_alone() -> None:
    of = model()
    lengths = [1, 2, 5, 11, 12, 30, 45, 60]
    with engine(of, conversations=3) as running:
        replies = [running.submit(request(prompt(n, seed=n), 10 + n % 7)) for n in lengths]
        got = [whole(reply) for reply in replies]
    for n, one in zip(lengths, got, strict=True):
        assert one.tokens == alone(of, prompt(n, seed=n), 10 + n % 7), n
