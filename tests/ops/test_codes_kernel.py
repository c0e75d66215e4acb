"""Levels that a GPU looks up by bytes: the interpreter cannot run its instructions, so they are done by hand here."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest
import torch

from ahn.ops.quantize import LEVELS

WORD = 0xFFFFFFFF


def permuted(a: int, b: int, chosen: int) -> int:
    """`prmt.b32`: four bytes of (a, b), each by four bits; the fourth asks for copies of the byte's sign instead."""
    found = 0
    for n in range(4):
        place = chosen >> 4 * n & 15
        byte = (a | b << 32) >> 8 * (place & 7) & 255
        found |= (byte if place < 8 else 255 * (byte >> 7)) << 8 * n
    return found


def of_three(a: int, b: int, c: int, table: int) -> int:
    """`lop3.b32`: each bit by a table of eight."""
    return sum((table >> (4 * (a >> n & 1) + 2 * (b >> n & 1) + (c >> n & 1)) & 1) << n for n in range(32))


INSTRUCTIONS: dict[str, Callable[..., int]] = {
    "and": lambda a, b: a & b,
    "shr": lambda a, b: a >> b,
    "mul": lambda a, b: a * b & WORD,
    "mad": lambda a, b, c: a * b + c & WORD,
    "prmt": permuted,
    "lop3": of_three,
}


def run(assembly: str, words: tuple[int, int], count: int) -> list[int]:
    """The outputs, so many, of a block of instructions for two words, which come after them."""
    registers = {f"${count + n}": word for n, word in enumerate(words)}
    for line in filter(None, (part.strip() for part in assembly.strip("{}").split(";"))):
        if not line.startswith(".reg"):
            name, rest = line.split(" ", 1)
            target, *sources = [part.strip() for part in rest.split(",")]
            values = [registers[x] if x in registers else int(x, 0) for x in sources]
            registers[target] = INSTRUCTIONS[name.split(".")[0]](*values)
    return [registers[f"${n}"] for n in range(count)]


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
def test_levels_that_are_looked_up_are_the_levels(bits: int, half: bool) -> None:
    from ahn.ops.step import codes_kernel

    assembly = codes_kernel._asm_of_two(half) if bits == 2 else codes_kernel._asm_of_four(half)
    levels = torch.tensor(LEVELS[bits]).to(torch.float16 if half else torch.bfloat16).view(torch.int16).tolist()
    random = Random(0)
    for words in ((0, WORD), *((random.getrandbits(32), random.getrandbits(32)) for _ in range(200))):
        for n, pair in enumerate(run(assembly, words, 32 // bits)):
            first, second = (levels[word >> bits * n & 2**bits - 1] & 0xFFFF for word in words)
            assert pair == first | second << 16


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize(("words", "codes"), [(16, 8), (8, 8), (8, 4), (8, 16), (4, 8), (1, 8)])
def test_a_row_has_each_number_once(words: int, codes: int) -> None:
    from ahn.ops.step import codes_kernel

    places = [codes_kernel.place_in_row.fn(k, words, codes) for k in range(words * codes)]
    assert sorted(places) == [(word, code) for word in range(words) for code in range(codes)]
