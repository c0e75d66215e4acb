"""What may come in a file: bytes and JSON changed at random, by a seed."""

from __future__ import annotations

import random
from typing import Any

VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2, 2**31, 2**63, 10**30, 1.5, float("inf"), float("nan"), "", "x", "4", "\ud800", "<script>",
    [], [0], [[]], {}, {"a": {}}, [None] * 5, "x" * 3000,
)  # fmt: skip


def mutated_bytes(content: bytes, seed: int) -> bytes:
    """Never the same as before: bits flipped, a stretch overwritten or taken out or doubled, or the end cut off."""
    draw = random.Random(seed)
    start = draw.randrange(len(content))
    stop = min(len(content), start + draw.choice((1, 2, 7, 100)))
    kind = draw.choice(("flip", "overwrite", "remove", "double", "cut"))
    if kind == "flip":
        return content[:start] + bytes([content[start] ^ (1 << draw.randrange(8))]) + content[start + 1 :]
    if kind == "overwrite":
        return content[:start] + bytes(byte ^ draw.randrange(1, 256) for byte in content[start:stop]) + content[stop:]
    if kind == "remove":
        return content[:start] + content[stop:]
    return content[:start] if kind == "cut" else content[:stop] + content[start:]


def mutated_json(value: dict[str, Any], seed: int) -> str:
    """Change one value somewhere inside an object, in place: another one, of any type, or none. Says which."""
    draw = random.Random(seed)
    at: Any = value
    where: list[str] = []
    while True:
        key = draw.choice(sorted(at)) if isinstance(at, dict) else draw.randrange(len(at))
        where.append(str(key))
        if isinstance(at[key], (dict, list)) and at[key] and draw.random() < 0.8:
            at = at[key]
        elif draw.random() < 0.1:
            del at[key]
            return f"without {'.'.join(where)}"
        else:
            at[key] = draw.choice([other for other in VALUES if other != at[key]])
            return f"{'.'.join(where)} = {str(at[key])[:40]!r}"
