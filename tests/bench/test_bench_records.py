"""Which rows of `ahn bench` are of the same measurement."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ahn.bench import records
from ahn.errors import AHNError


def test_bits_tell_rows_apart_where_there_are_codes(tmp_path: Path) -> None:
    """Rows from before they said it are of two bits, and without quantized tokens bits mean nothing."""
    rows = [
        {"method": "window", "quantized": 0, "ms": 1},
        {"method": "window", "quantized": 0, "key_bits": 4, "value_bits": 2, "ms": 2},
        {"method": "codes", "quantized": 9, "ms": 3},
        {"method": "codes", "quantized": 9, "key_bits": 2, "value_bits": 2, "ms": 4},
        {"method": "codes", "quantized": 9, "key_bits": 4, "value_bits": 2, "ms": 5},
    ]
    lines = [json.dumps({"kind": "row", **dict.fromkeys(records.NEEDED), **row}) for row in rows]
    (tmp_path / records.FILE).write_text("\n".join(lines))
    assert [row["ms"] for row in records.read(tmp_path)] == [2, 4, 5]


@pytest.mark.parametrize("line", ['{"kind": "row"}', "[1]", "3", '{"kind": "row", "measurement": "decode"}', "{"])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    good = json.dumps({"kind": "row", **dict.fromkeys(records.NEEDED)})
    (tmp_path / records.FILE).write_text(f"{good}\n{line}\n")
    with pytest.raises(AHNError, match=r"rows\.jsonl: "):
        records.read(tmp_path)
