"""RULER's variable tracking: a chain of assignments scattered over noise."""

import itertools
import random
import string

from ahn.evaluation.tasks.generated import Problem
from ahn.evaluation.tasks.ruler.needles import NOISE

HOPS = 4
EXAMPLE_LINES = 15
"""Noise in the example that precedes the question: about 500 tokens."""
EXAMPLE_LETTERS, LETTERS = 3, 5
MESSAGE = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: Find "
    "all variables that are assigned the value {value} in the text above."
)
PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assigned the "
    "value {value}, they are: "
)


def make(rng: random.Random, size: int) -> Problem:
    """One solved example, then a question with `size` lines of noise."""
    example = _chain(rng, EXAMPLE_LINES, EXAMPLE_LETTERS)
    problem = _chain(rng, size, LETTERS)
    shown = f"{example.message}{example.prefix} {' '.join(example.answers)}\n\n"
    return Problem(shown + problem.message, problem.prefix, problem.answers)


def _chain(rng: random.Random, size: int, letters: int) -> Problem:
    names: list[str] = []
    while len(names) <= HOPS:
        name = "".join(rng.choices(string.ascii_uppercase, k=letters))
        if name not in names:
            names.append(name)
    value = str(rng.randint(10_000, 99_998))
    links = [f"VAR {name} = VAR {before}" for before, name in itertools.pairwise(names)]
    lines = [NOISE] * size
    assignments = [f"VAR {names[0]} = {value}", *links]
    places = sorted(rng.choices(range(size + 1), k=len(assignments)))
    for shift, (place, line) in enumerate(zip(places, assignments, strict=True)):
        lines.insert(place + shift, line)
    return Problem(
        MESSAGE.format(context="\n".join(lines), value=value),
        PREFIX.format(count=len(names), value=value),
        tuple(names),
    )
