"""What can be asked about a text: for each kind what is put into it, the question, the reply, and its decisive part."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator

from chats.words import Words

QUOTED_START = 6
"""Words of a sentence that a quotation is asked for with; as many more must follow."""


@dataclasses.dataclass(frozen=True)
class Item:
    """One asked thing.

    Attributes:
        kind: one of `KINDS` or "quote".
        statements: sentences for the text, in this order; none if what is asked stands in the text itself.
        question, reply: the turns of the chat.
        answer: the part of the reply that has to be right.
    """

    kind: str
    statements: tuple[str, ...]
    question: str
    reply: str
    answer: str


def number(words: Words, names: Iterator[str], rng: random.Random) -> Item:
    """A fact with a number."""
    return _fact("number", words, next(names), rng.choice(words.numbers), [_number(words, rng)], rng)


def word(words: Words, names: Iterator[str], rng: random.Random) -> Item:
    """A fact with a word."""
    return _fact("word", words, next(names), rng.choice(words.names), [rng.choice(words.values)], rng)


def change(words: Words, names: Iterator[str], rng: random.Random) -> Item:
    """A fact that is stated and later changed, once or twice: the last value counts."""
    times = rng.randint(2, 3)
    key = next(names)
    if rng.random() < 0.5:
        return _fact("change", words, key, rng.choice(words.numbers), [_number(words, rng) for _ in range(times)], rng)
    return _fact("change", words, key, rng.choice(words.names), rng.sample(words.values, times), rng)


def _fact(kind: str, words: Words, key: str, thing: str, values: list[str], rng: random.Random) -> Item:
    phrasing = rng.choice(words.phrasings)
    fields = {"thing": thing, "key": key}
    statements = [phrasing.state.format(**fields, value=values[0])]
    for n, value in enumerate(values[1:]):
        statements.append(phrasing.change.format(**fields, value=value, old=values[n]))
    question, reply = phrasing.ask.format(**fields), phrasing.reply.format(**fields, value=values[-1])
    return Item(kind, tuple(statements), question, reply, values[-1])


def count(words: Words, names: Iterator[str], rng: random.Random) -> Item:
    """An event that the text tells several times."""
    key, times = next(names), rng.randint(2, 9)
    event, question, reply = (part.format(key=key, value=times) for part in rng.choice(words.counted))
    return Item("count", (event,) * times, question, reply, str(times))


def lookup(words: Words, names: Iterator[str], rng: random.Random) -> Item:
    """A list of entries, one of which is asked for."""
    heading, entry, question, reply = rng.choice(words.listed)
    values = {next(names): str(rng.randint(10, 999)) for _ in range(rng.randint(5, 10))}
    lines = "\n".join(entry.format(key=key, value=value) for key, value in values.items())
    key = rng.choice(list(values))
    asked = {"key": key, "value": values[key]}
    statement = f"\n{heading}\n{lines}\n"
    return Item("lookup", (statement,), question.format(**asked), reply.format(**asked), values[key])


def quote(words: Words, sentence: str, rng: random.Random) -> Item | None:
    """The rest of a sentence of the text; None if it is too short."""
    parts = sentence.split()
    if len(parts) < 2 * QUOTED_START:
        return None
    question, reply = rng.choice(words.quoted)
    start, rest = " ".join(parts[:QUOTED_START]), " ".join(parts[QUOTED_START:])
    return Item("quote", (), question.format(start=start), reply.format(value=rest), rest)


KINDS: dict[str, Callable[[Words, Iterator[str], random.Random], Item]] = {
    "number": number,
    "word": word,
    "change": change,
    "count": count,
    "lookup": lookup,
}


def fresh_names(words: Words, rng: random.Random) -> Iterator[str]:
    """What things are called: two of the split's nouns, never twice the same."""
    given: set[str] = set()
    while True:
        name = " ".join(rng.sample(words.keys, 2))
        if name not in given:
            given.add(name)
            yield name


def _number(words: Words, rng: random.Random) -> str:
    digits = rng.randint(*words.digits)
    return str(rng.randrange(10 ** (digits - 1), 10**digits))
