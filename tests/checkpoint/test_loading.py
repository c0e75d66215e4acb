"""from_pretrained on every kind of directory, and what it says when it cannot."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import all_tensors, as_published, edit_config, edit_weights, logits, make_base, publish, same_bits
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

import ahn
from ahn.checkpoint import adapter as checkpoint_adapter
from ahn.checkpoint import from_pretrained, hub, load_adapter, merge, save_adapter
from ahn.checkpoint.directory import Checkpoint
from ahn.checkpoint.loading import ModelSource
from ahn.evaluation import methods

Copy = Callable[[Path], Path]


@pytest.fixture(scope="module")
def wanted(base: Path, adapter: Path) -> torch.Tensor:
    """Logits of base and adapter together."""
    return logits(load_adapter(AutoModelForCausalLM.from_pretrained(base), adapter))


@pytest.fixture
def merged(tmp_path: Path, base: Path, adapter: Path) -> Path:
    return merge(base, adapter, tmp_path / "merged")


def test_adapter_finds_its_base(base: Path, adapter: Path, wanted: torch.Tensor) -> None:
    model = from_pretrained(adapter)
    assert torch.equal(logits(model), wanted)
    assert not model.training and not any(module.training for module in model.modules())
    assert Path(model.name_or_path) == base == Path(model.config._name_or_path)


def test_adapter_and_base_can_move_together(tmp_path: Path, base: Path, adapter: Path, wanted: torch.Tensor) -> None:
    shutil.copytree(base, tmp_path / "moved" / "base")
    shutil.copytree(adapter, tmp_path / "moved" / "adapter")
    model = from_pretrained(tmp_path / "moved" / "adapter")
    assert Path(model.name_or_path) == tmp_path / "moved" / "base" and torch.equal(logits(model), wanted)


def test_base_can_be_given(base: Path, adapter: Path, copy: Copy, wanted: torch.Tensor) -> None:
    alone = edit_config(copy(adapter), lambda config: config.update(base_model_name_or_path="/not/here"))
    assert torch.equal(logits(from_pretrained(alone, base=base)), wanted)
    with pytest.raises(ahn.AHNError, match=r"pass base=.*'/not/here'"):
        from_pretrained(alone)


def test_published_adapters_name_their_base_in_another_key(base: Path, adapter: Path, copy: Copy) -> None:
    published = publish(copy(adapter), use_ahn_router=True, _name_or_path=str(base))
    assert from_pretrained(published).ahn_config.window == 32640


@pytest.mark.parametrize("name", [None, "", "nobody/no-such-model", "../gone"])
def test_an_unknown_base_is_one_clear_error(
    adapter: Path, copy: Copy, name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "snapshot_download", offline)
    alone = edit_config(copy(adapter), lambda config: config.update(base_model_name_or_path=name))
    with pytest.raises(ahn.AHNError, match="pass base="):
        from_pretrained(alone)


def offline(name: str, **options: object) -> str:
    from huggingface_hub.errors import LocalEntryNotFoundError

    raise LocalEntryNotFoundError(f"Cannot find {name} and outgoing traffic has been disabled.\nMore lines.")


def test_hub_ids_are_downloaded_with_the_callers_options(
    adapter: Path, base: Path, wanted: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(name: str, **options: object) -> str:
        asked.append((name, options.get("revision"), options.get("token")))
        return str({"me/adapter": adapter, "them/base": base}[name])

    monkeypatch.setattr(hub, "snapshot_download", download)
    model = from_pretrained("me/adapter", base="them/base", revision="v2", token="secret")
    assert asked == [("me/adapter", "v2", "secret"), ("them/base", None, "secret")]
    assert torch.equal(logits(model), wanted) and model.name_or_path == "them/base"


def test_an_unreachable_hub_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(
        ahn.AHNError, match=r"neither a directory nor a Hugging Face Hub repository.*Cannot find"
    ) as error:
        from_pretrained("nobody/no-such-adapter")
    assert "More lines" not in str(error.value)


def test_the_real_hub_client_fails_in_a_way_we_know(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("nobody/no-such-adapter", "/no/such/directory", "a b c"):
        with pytest.raises(ahn.AHNError, match="neither a directory nor"):
            from_pretrained(name, cache_dir=tmp_path)


def test_only_useful_files_are_downloaded(monkeypatch: pytest.MonkeyPatch, adapter: Path) -> None:
    from huggingface_hub.utils import filter_repo_objects

    kept: list[str] = []
    wanted = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json"]
    wanted += ["tokenizer.json", "vocab.txt", "tokenizer.model", "chat_template.jinja"]
    unwanted = [
        "pytorch_model.bin",
        "consolidated.safetensors",
        "original/model.safetensors",
        "model.gguf",
        "README.md",
    ]

    def download(name: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        kept.extend(
            filter_repo_objects(wanted + unwanted, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        )
        return str(adapter)

    monkeypatch.setattr(hub, "snapshot_download", download)
    hub.local_directory("me/adapter")
    assert kept == wanted


def test_merged_loads_alone(merged: Path, wanted: torch.Tensor, caplog: pytest.LogCaptureFixture) -> None:
    model = from_pretrained(merged)
    assert torch.equal(logits(model), wanted) and model.name_or_path == str(merged)
    assert "UNEXPECTED" not in caplog.text  # transformers' list of tensors it did not use
    with pytest.raises(ahn.AHNError, match="leave base out"):
        from_pretrained(merged, base="anything")


def test_published_merged_loads_without_remote_code(
    merged: Path, wanted: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    def customise(config: dict) -> None:
        config |= {
            "architectures": ["Qwen2MemForCausalLM"],
            "auto_map": {"AutoModelForCausalLM": "modeling_ahn.Qwen2MemForCausalLM"},
            "use_sliding_window": True,
            "max_window_layers": 0,
        }

    published = edit_config(as_published(merged), customise)
    model = from_pretrained(published, window=8, sinks=2)
    assert type(model) is Qwen2ForCausalLM and torch.equal(logits(model), wanted)
    assert "left-over" not in caplog.text  # window and sinks were given: no surprise
    assert from_pretrained(published).ahn_config.lossless == 32768
    assert "sliding_window 256" in caplog.text
    assert [record.levelname for record in caplog.records if "left-over" in record.message] == ["WARNING"]  # said once


def test_an_adapter_saved_from_a_merged_model_names_the_base(
    tmp_path: Path, base: Path, merged: Path, adapter: Path
) -> None:
    saved = save_adapter(from_pretrained(merged), tmp_path / "elsewhere" / "adapter")
    assert json.loads((saved / "config.json").read_text())["base_model_name_or_path"] == str(base)
    assert same_bits(all_tensors(saved), all_tensors(adapter))
    unnamed = edit_config(merged, lambda config: config.pop("base_model_name_or_path"))
    saved = save_adapter(from_pretrained(unnamed), tmp_path / "unnamed")
    assert json.loads((saved / "config.json").read_text())["base_model_name_or_path"] is None


def test_transformers_options_reach_transformers(adapter: Path, merged: Path) -> None:
    for path in (adapter, merged):
        model = from_pretrained(path, dtype=torch.bfloat16, device_map="cpu")
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert (model.ahn_config.window, model.ahn_config.sinks) == (8, 2)


def test_a_device_that_torch_was_built_without(merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("Torch not compiled with CUDA enabled")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    with pytest.raises(ahn.AHNError, match=r"cannot load .*: Torch not compiled with CUDA"):
        from_pretrained(merged, device_map="cuda")


def test_plain_models_and_wrong_bases_are_refused(
    tmp_path: Path, base: Path, adapter: Path, merged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ahn.AHNError, match="no AHN tensors"):
        from_pretrained(base)
    with pytest.raises(ahn.AHNError, match="expected a plain model"):
        from_pretrained(adapter, base=merged)
    deeper = make_base(tmp_path / "deeper", num_hidden_layers=4)
    # The check comes before the weights, which can take minutes to load.
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    with pytest.raises(ahn.AHNError, match="layers 4 instead of 3"):
        from_pretrained(adapter, base=deeper)


@pytest.mark.parametrize(
    ("file", "content", "match"),
    [
        ("adapter_config.json", {"base_model_name_or_path": "/somewhere/else"}, "holds a PEFT adapter beside"),
        ("generation_config.json", "{", "generation_config.json.* JSON"),
        ("generation_config.json", [], "must hold a JSON object"),
        ("generation_config.json", {"eos_token_id": "x"}, "eos_token_id must be a token's number, or a list, got 'x'"),
        ("generation_config.json", {"pad_token_id": [1, None]}, "pad_token_id must be a token's number"),
        ("config.json", {"_attn_implementation": "somebody/attention"}, "asks for code from the Hub"),
        ("config.json", {"dtype": 5}, "dtype must be the name of a dtype, got 5"),
    ],
)
def test_files_beside_the_weights_that_mislead_transformers_are_refused(
    file: str, content: object, match: str, base: Path, adapter: Path, copy: Copy
) -> None:
    """It would load other weights, leave settings out, or run a kernel of the Hub, and say nothing."""
    path = copy(base)
    if file == "config.json":
        edit_config(path, lambda config: config.update(content))
    else:
        (path / file).write_text(content if isinstance(content, str) else json.dumps(content))
    for memory in (None, str(adapter)):
        with pytest.raises(ahn.AHNError, match=match):
            ModelSource.open(str(path), memory).load()


def test_a_base_with_absent_weights_is_refused(base: Path, adapter: Path, copy: Copy) -> None:
    # transformers would initialise them at random and only warn
    holed = edit_weights(copy(base), lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ahn.AHNError, match=r"lacks 1 weights of Qwen2ForCausalLM.*layers\.1\.mlp\.up_proj"):
        from_pretrained(adapter, base=holed)
    wrong = edit_weights(copy(adapter), lambda tensors: None)
    reshaped = edit_weights(holed, lambda tensors: tensors.update({"model.norm.weight": torch.ones(5)}))
    with pytest.raises(ahn.AHNError, match=r"cannot load"):
        from_pretrained(wrong, base=reshaped)


# -- what a command line names


@pytest.fixture
def spoken(tmp_path: Path) -> tuple[Path, Path, Path]:
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


def test_a_model_and_its_adapter_or_both_merged(spoken: tuple[Path, Path, Path]) -> None:
    base, adapter, merged = map(str, spoken)
    for model, given in ((base, adapter), (merged, None), (adapter, None)):
        loaded, tokenizer = ModelSource.open(model, given, sinks=4).load_ready("cpu")
        assert loaded.ahn_config == ahn.AHNConfig("deltanet", window=24, sinks=4, max_distance=32768)
        assert loaded.dtype == torch.float32
        assert not loaded.training
        assert tokenizer("b")["input_ids"] == [1]
    assert ModelSource.open(merged).load_ready(dtype="bfloat16")[0].dtype == torch.bfloat16


def test_mistakes_have_one_clear_sentence(spoken: tuple[Path, Path, Path]) -> None:
    base, _, merged = map(str, spoken)
    with pytest.raises(ahn.AHNError, match="without a memory; name an adapter for it with --adapter"):
        ModelSource.open(base).load_ready()
    with pytest.raises(ahn.AHNError, match="There is no device 'abacus' here"):
        ModelSource.open(merged).load_ready("abacus")
    with pytest.raises(ahn.AHNError, match="Unknown dtype 'int8'; choose from float32"):
        ModelSource.open(merged).load_ready(dtype="int8")
    for file in Path(merged).glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ahn.AHNError, match="merged has no tokenizer"):
        ModelSource.open(merged).load_ready()


def test_everything_is_opened_and_checked_once(
    spoken: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter, merged = map(str, spoken)
    opened, checked = [], []
    real_open, real_check = Checkpoint.open.__func__, checkpoint_adapter.check_tensors

    def opening(cls: type[Checkpoint], path: Path) -> Checkpoint:
        opened.append(path.name)
        return real_open(cls, path)

    def checking(checkpoint: Checkpoint, *rest: Any) -> None:
        checked.append(checkpoint.path.name)
        real_check(checkpoint, *rest)

    monkeypatch.setattr(Checkpoint, "open", classmethod(opening))
    monkeypatch.setattr(checkpoint_adapter, "check_tensors", checking)
    for model, given in ((base, adapter), (adapter, None), (merged, None)):
        opened.clear()
        checked.clear()
        methods.load("ahn", model, given, device="cpu")
        parts = ["merged"] if model == merged else ["adapter", "base"]
        assert sorted(opened) == parts and checked == parts[:1]


def test_a_baseline_never_carries_the_memory(spoken: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is it read from the disk."""
    monkeypatch.setattr(checkpoint_adapter, "finite_tensors", None)
    base, adapter, _ = map(str, spoken)
    assert methods.load("window", base, adapter, device="cpu").model.ahn_config.memory == "window_only"
