"""What is made of a GGUF file is what transformers itself reads in it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_gguf import SPECIAL, write_small_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from ahn.errors import AHNError
from ahn.smollm2.gguf import convert

TEXT = "then the 1234 thé, 日本\n\n  the<|im_end|>\tend  of it"


@pytest.fixture(scope="module")
def converted(small_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("converted")
    convert(small_gguf, directory)
    return directory


def test_weights_are_those_that_transformers_decodes(small_gguf: Path, converted: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(small_gguf.parent, gguf_file=small_gguf.name, dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(converted, dtype="auto")
    expected = {name: weights.bfloat16() for name, weights in theirs.state_dict().items()}
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(dict(ours.state_dict()), expected, rtol=0, atol=0)


def test_logits_are_those_of_transformers_own_reading(small_gguf: Path, converted: Path) -> None:
    """The rotation's halves, the norm's epsilon and the RoPE base count here."""
    theirs = AutoModelForCausalLM.from_pretrained(small_gguf.parent, gguf_file=small_gguf.name, dtype=torch.float32)
    for weights in theirs.parameters():
        weights.data = weights.data.bfloat16().float()
    ours = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32)
    ids = torch.arange(100)[None] % 250
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits)


def test_tokens_are_those_of_transformers_own_reading(small_gguf: Path, converted: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(small_gguf.parent, gguf_file=small_gguf.name)
    ours = AutoTokenizer.from_pretrained(converted)
    ids = ours(TEXT)["input_ids"]
    assert ids == theirs(TEXT)["input_ids"]
    assert ours.decode(ids) == TEXT
    assert ours.convert_ids_to_tokens(ours(" 12")["input_ids"]) == ["Ġ", "1", "2"], "digits are tokens of their own"


def test_messages_end_with_the_models_own_token(converted: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted)
    model = AutoModelForCausalLM.from_pretrained(converted)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == SPECIAL.index("<|im_end|>")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False).count("<|im_end|>") == 1
    assert tokenizer.decode(tokenizer("<|im_start|>x")["input_ids"], skip_special_tokens=True) == "x"


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    write_small_gguf(tmp_path / "other.gguf", "falcon")
    with pytest.raises(AHNError, match="not a Llama model"):
        convert(tmp_path / "other.gguf", tmp_path)


def test_a_truncated_file_is_refused(small_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "half.gguf").write_bytes(small_gguf.read_bytes()[:5000])
    with pytest.raises(AHNError, match="not a whole GGUF file"):
        convert(tmp_path / "half.gguf", tmp_path)
