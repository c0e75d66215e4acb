"""What prompts begin with."""

from __future__ import annotations

from ahn.serve.engine.prefixes import BLOCK, Prefixes, SeenBlocks


def test_digests_are_of_the_beginning() -> None:
    one, other = Prefixes([1, 2, 3, 4]), Prefixes([1, 2, 9])
    assert one.key(2) == other.key(2) and one.key(3) != other.key(3)
    assert one.digests([9, 0, 4]).keys() == {4}
    assert one.digests([1, 3]) == {n: one.key(n)[1] for n in (1, 3)}  # whatever was asked before


def test_shared() -> None:
    assert Prefixes([1, 2, 3]).shared(Prefixes([1, 2, 4, 5])) == 2
    assert Prefixes([1, 2]).shared(Prefixes([1, 2, 4, 5])) == 2


def test_where_prompts_part_is_learned_in_blocks() -> None:
    seen, document = SeenBlocks(), list(range(3 * BLOCK + 5))
    assert seen.add("", Prefixes([*document, 7, 8])) == 0
    assert seen.add("", Prefixes([*document, 9, 9])) == 3 * BLOCK
    assert seen.add("", Prefixes([*document[: BLOCK + 3], 1])) == BLOCK
    assert seen.add("else", Prefixes(document)) == 0


def test_the_oldest_are_forgotten() -> None:
    seen = SeenBlocks(limit=2)
    for start in range(5):
        seen.add("", Prefixes([start] * BLOCK))
    assert seen.add("", Prefixes([4] * BLOCK)) == BLOCK and seen.add("", Prefixes([0] * BLOCK)) == 0
