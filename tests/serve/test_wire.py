"""What is read of a request's JSON: token ids as an array, and all else, right or wrong, as Python reads it."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ahn.serve.api import wire

PADDED = {"padding": "x" * wire.LONG}
"""Makes a body long enough for its token ids to be looked for."""


def read(body: bytes) -> Any:
    """As JSON types, or that it is none."""
    try:
        found = wire.parsed(body)
    except (ValueError, RecursionError):
        return ValueError
    if isinstance(found, dict) and isinstance(found.get("prompt"), np.ndarray):
        assert found["prompt"].dtype == np.int32
        found["prompt"] = found["prompt"].tolist()
    return found


def as_python_reads(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return ValueError


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": "), (" ,\n", " : ")])
def test_many_token_ids_are_an_array(separators: tuple[str, str]) -> None:
    ids = [0, 9, 10, (1 << 31) - 1, *random.Random(0).choices(range(151_936), k=3_000)]
    fields = {"model": "m", "prompt": ids, "stream": True, "stop": ["]", '"prompt": [5]']}
    body = json.dumps(fields, separators=separators).encode()
    found: NDArray[np.int32] = wire.parsed(body)["prompt"]
    assert isinstance(found, np.ndarray) and len(body) > wire.LONG and read(body) == fields


@pytest.mark.parametrize(
    "prompt",
    [
        *("[]", "[ ]", "[5", "[1,,2]", "[1,2,]", "[,1]", "[1 2]", "[01]", "[0,00]", "[1]]", "[1\x0b,2]", "[1,\t2]"),
        *("[-1]", "[1.0]", "[1e3]", "[2147483648]", "[99999999999999999999999,1]", "[[1],[2]]", "[null]", '["a"]'),
    ],
)
def test_what_is_no_list_of_token_ids_is_read_as_before(prompt: str) -> None:
    body = f'{{"prompt":{prompt},{json.dumps(PADDED)[1:]}'.encode()
    assert read(body) == as_python_reads(body)


@pytest.mark.parametrize(
    "fields",
    [
        '"a\\"prompt": [1, 2], "prompt": [3]',
        '"metadata": {"prompt": [1, 2]}',
        '"metadata": {"prompt": [1, 2]}, "prompt": []',
        '"metadata": {"prompt": [1, 2]}, "prompt": [3]',
        '"prompt": [1, 2], "prompt": [3]',
        '"prompt": [1, 2], "prompt": "text"',
        '"prompt": "text", "prompt": [1, 2]',
        '"content": "\\"prompt\\": [1, 2]"',
        '"content": "\\\\", "prompt": [1, 2]',
        '"prompt": [1, 2]} {"prompt": [3]',
    ],
)
def test_token_ids_are_those_of_the_request_itself(fields: str) -> None:
    body = f"{{{fields}, {json.dumps(PADDED)[1:]}".encode()
    assert read(body) == as_python_reads(body)


def test_damaged_bodies_are_read_as_before() -> None:
    draw = random.Random(1)
    body = json.dumps({"prompt": [0, 10, 7, 123], "n": 1, "x": [2, 3]} | PADDED).encode()
    for _ in range(500):
        place, new = draw.randrange(60), draw.choice(b'0123456789, \n\t[]{}":-.eE\\x')
        damaged = body[:place] + bytes([new]) + body[place + draw.randint(0, 1) :]
        assert read(damaged) == as_python_reads(damaged), damaged[:80]


@pytest.mark.parametrize(
    "path, status, said",
    [
        ("/v1/completions", 200, ""),
        ("/v1/chat/completions", 400, "prompt: this server does not know this field"),
        ("/tokenize", 400, "prompt: Input should be a valid string"),
    ],
)
def test_every_route_takes_an_array_as_it_takes_a_list(
    served: Any, monkeypatch: pytest.MonkeyPatch, path: str, status: int, said: str
) -> None:
    for length in (0, wire.LONG):
        monkeypatch.setattr(wire, "LONG", length)
        response = served.post(path, prompt=[5, 6, 7, 8])
        assert response.status_code == status and said in response.text
