"""Which rows of `ahn bench` are of the same measurement."""

from __future__ import annotations

import json
from pathlib import Path

from ahn.bench import records


def test_bits_tell_rows_apart_where_there_are_codes(tmp_path: Path) -> None:
    """Rows from before they said it are of two bits, and without quantized tokens bits mean nothing."""
    rows = [
        {"method": "window", "quantized": 0, "ms": 1},
        {"method": "window", "quantized": 0, "key_bits": 4, "value_bits": 2, "ms": 2},
        {"method": "codes", "quantized": 9, "ms": 3},
        {"method": "codes", "quantized": 9, "key_bits": 2, "value_bits": 2, "ms": 4},
        {"method": "codes", "quantized": 9, "key_bits": 4, "value_bits": 2, "ms": 5},
    ]
    lines = [json.dumps({"kind": "row", "measurement": "decode", **row}) for row in rows]
    (tmp_path / records.FILE).write_text("\n".join(lines))
    assert [row["ms"] for row in records.read(tmp_path)] == [2, 4, 5]
