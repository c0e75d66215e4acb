"""What the verbs share: loading a model by what a user types, and errors that fit in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

import ahn
from ahn.checkpoint import merge, save_adapter
from ahn.cli import common


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Directories of a base model with its tokenizer, an adapter and both merged."""
    config = Qwen2Config(
        hidden_size=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_hidden_layers=2,
        intermediate_size=16,
        vocab_size=3,
    )
    base, adapter, merged = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    words = Tokenizer(WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(base)
    save_adapter(ahn.attach(model, ahn.AHNConfig("deltanet", window=24, sinks=8)), adapter)
    merge(base, adapter, merged)
    return base, adapter, merged


def test_a_model_and_its_adapter_or_both_merged(saved: tuple[Path, Path, Path]) -> None:
    base, adapter, merged = map(str, saved)
    for model, given in ((base, adapter), (merged, None), (adapter, None)):
        loaded, tokenizer = common.load_model(model, given, sinks=4, device="cpu")
        assert loaded.ahn_config == ahn.AHNConfig("deltanet", window=24, sinks=4)
        assert loaded.dtype == torch.float32
        assert not loaded.training
        assert tokenizer("b")["input_ids"] == [1]
    assert common.load_model(merged, dtype="bfloat16")[0].dtype == torch.bfloat16


def test_mistakes_have_one_clear_sentence(saved: tuple[Path, Path, Path]) -> None:
    base, _, merged = map(str, saved)
    with pytest.raises(ahn.AHNError, match="without a memory; name an adapter for it with --adapter"):
        common.load_model(base)
    with pytest.raises(ahn.AHNError, match="There is no device 'abacus' here"):
        common.load_model(merged, device="abacus")
    with pytest.raises(ahn.AHNError, match="Unknown dtype 'int8'; choose from float32"):
        common.load_model(merged, dtype="int8")
    for file in Path(merged).glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ahn.AHNError, match="merged has no tokenizer"):
        common.load_model(merged)


def test_progress_stays_off_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    with common.progress() as bar:
        bar.advance(bar.add_task("reading", total=2))
    assert capsys.readouterr() == ("", "")  # nor an empty line in a log
