"""From files and flags to settings: what is accepted, which wins, and a clear sentence for everything that is wrong."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from tiny_run import PUBLISHED

from ahn.errors import AHNError
from ahn.training.arguments import Arguments, parse
from ahn.training.schedule import WindowDraw

pytest.importorskip("transformers", minversion="5.23")  # as the `train` extra asks for

NEEDED = ["--model_name_or_path", "ahn-tiny", "--dataset", "stdlib", "--use_cpu"]

"""The flags of a training script of the old style, less its report_to and its DeepSpeed file (tested below)."""


def parsed(*words: Any) -> Arguments:
    return parse([*NEEDED, *(str(word) for word in words)])


def test_the_paper_is_the_default() -> None:
    settings, trainer = parsed()
    assert (settings.loss_type, settings.filter_len, settings.cutoff_len) == ("kl", 288, 24576)
    assert (settings.sliding_window_type, settings.ahn_position, settings.save_ahn_only) == ("random", "random", True)
    assert settings.ahn_config.memory == "gated_deltanet"
    assert (settings.ahn_config.window, settings.ahn_config.sinks) == (32640, 128)
    assert (trainer.learning_rate, trainer.weight_decay, trainer.num_train_epochs) == (1e-4, 0.1, 1)
    assert trainer.get_warmup_steps(740) == 74 and trainer.lr_scheduler_type == "cosine"


def test_window_and_sinks_follow_the_base_where_none_are_asked_for() -> None:
    for words, expected in (([], (3968, 128)), (["--window", 500], (500, 128)), (["--sinks", 4], (3968, 4))):
        config = parsed(*words).settings.config_for(8192)
        assert (config.window, config.sinks) == expected
    assert parsed().settings.config_for(32768).lossless == 32768


def test_published_flags_run_unchanged(tmp_path: Path) -> None:
    zero = tmp_path / "ds_z3_config.json"
    zero.write_text('{"zero_optimization": {"stage": 3}}')
    settings, trainer = parse([*PUBLISHED.split(), "--deepspeed", str(zero), "--report_to", "none", "--use_cpu", " "])
    assert settings.model_name_or_path == "Qwen/Qwen2.5-3B-Instruct" and settings.dataset == "chatqa2"
    assert settings.attn_implementation == "flash_attention_2" and settings.plot_loss
    assert (settings.max_samples, settings.preprocessing_num_workers) == (100000, 16)
    assert trainer.get_warmup_steps(100) == 10 and trainer.gradient_accumulation_steps == 4
    assert trainer.bf16 and trainer.mixed_precision == "no", "the base is bfloat16, the memory is not cast"
    assert any("ZeRO stage 3" in note for note in settings.notes)


def test_dashes_and_underscores_are_one() -> None:
    assert parsed("--cutoff-len", "1024", "--use-ahn-router").settings.cutoff_len == 1024
    assert parsed("--cutoff_len=1024").settings.cutoff_len == 1024


def test_a_flag_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "model_name_or_path: ahn-tiny\ndataset: stdlib\nuse_cpu: true\ncutoff-len: 2048\nlearning_rate: 1e-3\n"
        "activation_checkpointing_kwargs: {use_reentrant: false}\nmax_samples: null\nreport_to: none\n"
        "save_strategy: no\n"
    )
    settings, trainer = parse([str(file), "--cutoff_len", "1024", "--ahn_implementation", "mamba2"])
    assert (settings.cutoff_len, trainer.learning_rate, settings.max_samples) == (1024, 1e-3, None)
    assert settings.ahn_config.memory == "mamba2" and trainer.save_strategy == "no"
    assert trainer.activation_checkpointing_kwargs == {"use_reentrant": False}


def test_a_trainer_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclasses.dataclass
    class Older:
        gradient_checkpointing: bool = False

    monkeypatch.setattr("ahn.training.arguments.TrainingArguments", Older)
    with pytest.raises(AHNError, match=r"needs transformers 5\.23 or later, this is .*\[train\]"):
        parsed()


def test_activation_checkpointing_is_never_reentrant() -> None:
    assert parsed("--gradient_checkpointing", "true").trainer.activation_checkpointing
    assert parsed().trainer.activation_checkpointing_kwargs == {"use_reentrant": False}


@pytest.mark.parametrize(
    ("flags", "draw"),
    [
        ([], WindowDraw(4096, 0)._replace(window=4096 - 512, sinks=512)),
        (["--sliding_window", 256], WindowDraw(224, 32)),
        (["--sliding_window", 256, "--ahn_position", "prefix"], WindowDraw(256, 0)),
        (["--cutoff_len", 512], WindowDraw(128, 0)),
    ],
)
def test_held_out_data_has_one_window(flags: list[Any], draw: WindowDraw) -> None:
    found = parsed(*flags).settings.evaluation_draw
    assert (found.lossless, found.sinks) == (draw.lossless, draw.sinks)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("dataset: [", "not valid YAML"),
        ("window: 48\nsinks: 0\nwindow: 64\n", "has window twice, in lines 1 and 3"),
        ("max-steps: 1\nmax_steps: 2\n", "has max_steps twice, in lines 1 and 2"),
        ("- chatqa2", "names and values"),
        (b"\xff\xfe\x00", "is not UTF-8"),
        ("datasett: chatqa2", "Unknown setting 'datasett'; did you mean dataset?"),
        ("cutoff_len: many", "invalid int value: 'many'"),
        ("learning_rate: fast", "invalid float value: 'fast'"),
        ("bf16: perhaps", "Truthy value expected"),
    ],
)
def test_wrong_files(content: str | bytes, words: str, tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(AHNError) as error:
        parse([str(file), *NEEDED])
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--cutof_len 3", "did you mean cutoff_len?"),
        ("--totally-unheard-of 3", "ahn train --help"),
        ("--dataset a.jsonl b.jsonl", "dataset takes one value, got a.jsonl b.jsonl"),
        ("--dataset a.jsonl debug.yaml", "the configuration file comes first, before all flags"),
        ("--loss_type mse", "choose from kl, ce, distill"),
        ("--ahn_implementation GRU", "Unknown AHN implementation 'GRU'"),
        ("--sliding_window_type often", "random, fixed, linear"),
        ("--sliding_window_type fixed", "needs sliding_window"),
        ("--ahn_position middle", "random, prefix"),
        ("--sliding_window 24576", "not below cutoff_len"),
        ("--cutoff_len 288", "cuts every sample"),
        ("--cutoff_len 512 --sliding_window_type linear", "cuts every sample"),
        ("--cutoff_len 65536", "must stay below 65536"),
        ("--fa_layer_ids one", "layer indices"),
        ("--val_size 0.1 --eval_dataset stdlib-held-out", "leave one of them out"),
        ("--val_size 2.5", "whole number of rows"),
        ("--filter_len -1", "at least 0"),
        ("--window 0", "integer ≥ 1"),
        ("--streaming true", "needs max_steps"),
        ("--streaming true --max_steps 5 --val_size 0.1", "number of rows"),
        ("--eval_strategy steps", "needs held-out data"),
        ("--fp16 true", "use bf16"),
        ("--learning_rate -1", "learning_rate must be a number of at least 0, got -1.0"),
        ("--learning_rate nan", "learning_rate must be a number"),
        ("--learning_rate inf", "learning_rate must be a number"),
        ("--weight_decay -0.1", "weight_decay must be a number of at least 0"),
        ("--max_grad_norm -1", "max_grad_norm must be a number of at least 0"),
        ("--gradient_accumulation_steps 0", "gradient_accumulation_steps must be a number of at least 1"),
        ("--per_device_train_batch_size 0", "per_device_train_batch_size must be a number of at least 1"),
        ("--save_total_limit 0", "save_total_limit must be a number of at least 1"),
        ("--save_steps 0", "save_steps"),
        ("--logging_steps 0", "logging_steps"),
        ("--num_train_epochs -1", "num_train_epochs must be above 0"),
        ("--max_steps 0", "max_steps must be at least 1"),
        ("--seed -1", "seed must be a number of at least 0"),
        ("--seed 4294967296", "seed must be below 4294967296"),
        ("--data_seed 99999999999", "data_seed must be below 4294967296"),
        ("--load_best_model_at_end", "but found - Evaluation strategy"),
        ("--adam_beta1 1.5", "The optimizer or its schedule cannot be made: Invalid beta"),
        ('--lr_scheduler_kwargs {"nonsense":1}', "The optimizer or its schedule cannot be made"),
        ("--load_best_model_at_end --save_strategy steps --eval_strategy steps --val_size 2", "is an adapter"),
        ("--push_to_hub", "hf upload"),
        ("--stage dpo", "stage dpo is not what this training does"),
        ("--warmup_ratio 3", "below 1"),
        ("--warmup_ratio 0.1 --warmup_steps 3", "the same setting"),
        ("--report_to nowhere", "report_to nowhere"),
        ("--deepspeed none.json", "Cannot read a ZeRO stage"),
        ("--fsdp true", "several processes"),
        ("--lr_scheduler_type zigzag", "invalid choice: 'zigzag'"),
    ],
)
def test_wrong_settings(flags: str, words: str) -> None:
    with pytest.raises(AHNError) as error:
        parsed(*flags.split())
    assert words in str(error.value)


def test_two_files_are_one_too_many(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("dataset: stdlib\n")
    with pytest.raises(AHNError, match="give one configuration file first"):
        parse([str(file), str(file), *NEEDED])


@pytest.mark.parametrize("missing", ["model_name_or_path", "dataset"])
def test_missing_settings(missing: str) -> None:
    given = {"model_name_or_path": "ahn-tiny", "dataset": "stdlib"}
    flags = [f"--{name}={value}" for name, value in given.items() if name != missing]
    with pytest.raises(AHNError, match=f"{missing} is missing"):
        parse([*flags, "--use_cpu"])


def test_bf16_wants_a_gpu_or_an_explicit_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: False)
    with pytest.raises(AHNError, match="use_cpu"):
        parse(["--model_name_or_path", "ahn-tiny", "--dataset", "stdlib", "--bf16"])
    assert parsed("--bf16").trainer.bf16


def test_horizons() -> None:
    assert parsed().settings.horizons == (256.0, 16384.0)
    assert parsed("--memory_horizons", "1,2").settings.horizons == (1.0, 2.0)
    assert parsed("--memory_horizons", "published").settings.horizons is None


@pytest.mark.parametrize(
    ("flags", "said"),
    [([], False), (["--memory-horizons", "256,16384"], True), (["--memory_horizons", "published"], False)],
)
def test_horizons_of_a_memory_that_never_forgets(flags: list[str], said: bool) -> None:
    settings = parsed("--ahn_implementation", "DeltaNet", *flags).settings
    assert any("memory_horizons changes nothing for DeltaNet" in note for note in settings.notes) == said


@pytest.mark.parametrize(
    ("flags", "note"),
    [
        (["--ahn_implementation", "RoutedDeltaNet"], "learns none from cutoff_len 24,576 on"),
        (["--ahn_implementation", "RoutedDeltaNet", "--memory_positions", "65536"], None),
        (["--memory_positions", "65536"], "memory_positions changes nothing for GatedDeltaNet"),
        ([], None),
    ],
)
def test_positions_are_for_memories_that_see_them(flags: list[str], note: str | None) -> None:
    settings = parsed(*flags).settings
    assert settings.schedule(0).positions == (65536 if "65536" in flags else 0)
    found = [text for text in settings.notes if "positions" in text]
    assert [note in text for text in found] == ([] if note is None else [True])


def test_positions_below_zero_are_refused() -> None:
    with pytest.raises(AHNError, match="memory_positions must be at least 0, got -1"):
        parsed("--memory_positions", "-1")


@pytest.mark.parametrize("text", ["256", "a,b", "2,1", "0,5", "1,inf", "1,2,3", "none"])
def test_horizons_that_are_none(text: str) -> None:
    with pytest.raises(AHNError, match=r"memory_horizons must be two numbers of tokens.*, or published; got"):
        parsed("--memory_horizons", text)
