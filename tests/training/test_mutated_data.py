"""Training files that somebody else wrote, or that a disk has damaged: samples, rows that are skipped, or one error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hostile import mutated_bytes, mutated_json
from transformers import AutoTokenizer

from ahn.errors import AHNError
from ahn.training.data import load_data
from ahn.training.settings import Settings

MUTATIONS = 200
TURNS = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "a b"},
    {"role": "assistant", "content": "c d"},
]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
ROWS: list[dict[str, Any]] = [
    {"text": "some words of a text " * 8},
    {"messages": TURNS, "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
    {"messages": [TURNS[1], {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "4"}, TURNS[2]]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b " * 9}], "system": "S"},
    {"instruction": "a", "input": "b", "output": "c " * 9, "history": [["d", "e"]], "system": "S"},
    {"prompt": "a", "completion": "b c d"},
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_mutated_training_files(tiny_model: Path, tmp_path: Path) -> None:
    """Values and bytes: whatever is read has samples of token ids, and nothing ends in a traceback."""
    tokenizer, outcomes = AutoTokenizer.from_pretrained(tiny_model), {"samples": 0, "refused": 0}
    for seed in range(MUTATIONS):
        rows = json.loads(json.dumps(ROWS * 2))
        what = mutated_json(rows[seed % len(rows)], seed) if seed % 3 else "bytes"
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        file = tmp_path / f"{seed}.jsonl"
        file.write_bytes(content if seed % 3 else mutated_bytes(content, seed))
        settings = Settings(
            model_name_or_path="x", dataset=str(file), cutoff_len=64, filter_len=1, preprocessing_num_workers=1
        )
        try:
            samples = load_data(settings, tokenizer, seed=0).train
            assert all(0 <= token < len(tokenizer) for sample in samples for token in sample["input_ids"])
            outcomes["samples"] += 1
        except AHNError as error:
            assert len(str(error)) < 1000
            outcomes["refused"] += 1
        except Exception as error:
            error.add_note(f"seed {seed}: {what}")
            raise
    assert sum(outcomes.values()) == MUTATIONS and outcomes["samples"], outcomes
