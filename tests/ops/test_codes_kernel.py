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


INSTRUCTIONS: dict[str, Callable[..., int]] = {
    "mov": lambda a: a,
    "and": lambda a, b: a & b,
    "shr": lambda a, b: a >> b,
    "shl": lambda a, b: a << b & WORD,
    "prmt": permuted,
    "lop3": lambda a, b, c, table: a | b & c if table == 0xF8 else pytest.fail("another table"),
}


def run(assembly: str, word: int) -> torch.Tensor:
    """The eight outputs of a block of instructions for the input `$8`, as bfloat16."""
    registers = {"$8": word}
    for line in filter(None, (part.strip() for part in assembly.strip("{}").replace("{", "").split(";"))):
        line = line.replace("}", "")
        if line.startswith(".reg"):
            continue
        name, rest = line.split(" ", 1)
        name = name.split(".")[0]
        target, *sources = [part.strip() for part in rest.split(",")]
        if sources[0].startswith("$") and name == "mov" and len(sources) == 2:  # both halves of a register
            registers[target], registers[sources[0]] = registers[sources[1]] & 0xFFFF, registers[sources[1]] >> 16
            continue
        values = [registers[x] if x in registers else int(x, 0) for x in sources]
        registers[target] = INSTRUCTIONS[name](*values)
    bits = torch.tensor([registers[f"${n}"] for n in range(8)], dtype=torch.int32)
    return bits.to(torch.int16).view(torch.bfloat16)


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("bits", [2, 4])
def test_levels_that_are_looked_up_are_the_levels(bits: int) -> None:
    from ahn.ops.step import codes_kernel

    levels, random = torch.tensor(LEVELS[bits]).bfloat16(), Random(0)
    order = [codes_kernel.placed.fn(n, bits, True) for n in range(8)]
    for word in (0, WORD, *(random.getrandbits(32) for _ in range(300))):
        if bits == 4:
            found = run(codes_kernel._asm_of_four(), codes_kernel._by_size.fn(word, bits) & WORD)
        else:
            found = run(codes_kernel._asm_of_two(), word)
        codes = [word >> bits * n & 2**bits - 1 for n in order]
        assert torch.equal(found, levels[codes])
