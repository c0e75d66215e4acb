"""A whole run: it learns, touches nothing but the memory, keeps it in float32, and leaves an adapter that loads."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import PUBLISHED, flags, words, write_rows
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

import ahn
from ahn.training import distillation_loss
from ahn.training.arguments import parse
from ahn.training.distillation import Distillation
from ahn.training.run import run
from ahn.training.student import MicroBatch, Student
from ahn.training.trainer import DistillationTrainer

pytest.importorskip("transformers", minversion="5.23")  # as the `train` extra asks for


@pytest.fixture
def train(tiny_model: Path, tiny_data: Path, tmp_path: Path):  # type: ignore[no-untyped-def]
    def trained(**settings: Any) -> dict[str, Any]:
        return run(parse(flags(tiny_model, tiny_data, tmp_path / "out", **settings)))

    return trained


def log(output: Path) -> list[dict[str, Any]]:
    return json.loads((output / "trainer_state.json").read_text())["log_history"]


def test_a_finished_run(train: Any, tmp_path: Path, tiny_model: Path) -> None:
    results = train(
        val_size=6, plot_loss=True, window=96, sinks=16, max_steps=12, learning_rate=2e-2, warmup_steps=1,
        per_device_train_batch_size=3, per_device_eval_batch_size=4, eval_strategy="steps", eval_steps=6,
        sliding_window_type="fixed", sliding_window=40, ahn_position="prefix",
    )  # fmt: skip
    output = tmp_path / "out"
    before, after = results["before"], results["after"]
    assert after["eval_kl"] < 0.97 * before["eval_kl"], "better than sinks + window"
    assert after["eval_teacher_ce"] == before["eval_teacher_ce"]
    assert json.loads((output / "results.json").read_text()) == results

    card = (output / "README.md").read_text()
    assert f"{after['eval_kl']:.4f}" in card and "12 steps of 3 samples" in card
    assert (output / "loss.png").stat().st_size > 10_000

    model = ahn.from_pretrained(output, base=tiny_model)
    assert (model.ahn_config.window, model.ahn_config.sinks) == (96, 16), "what was asked for, not a step's window"
    for entry in log(output):
        if "kl" in entry:
            assert (entry["window"], entry["sinks"]) == (40, 0)
            assert entry["gap"] == pytest.approx(entry["ce"] - entry["teacher_ce"], abs=1e-4)
            assert entry["tokens_per_second"] > 0 and entry["memory_gib"] > 0 and entry["grad_norm"] > 0
    assert [entry["step"] for entry in log(output) if "eval_kl" in entry] == [0, 6, 12]


def test_held_out_numbers_are_the_models(train: Any, tmp_path: Path, tiny_model: Path, tiny_data: Path) -> None:
    """The finished adapter gives what was logged: means over positions, not over batches."""
    after = train(eval_dataset=tiny_data, per_device_eval_batch_size=5, sliding_window=32, max_steps=2)["after"]
    model = ahn.from_pretrained(tmp_path / "out", base=tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    texts = [json.loads(line)["text"] for line in tiny_data.read_text().splitlines()]
    sums, count = torch.zeros(4), 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        for piece in ids.split(128, dim=1):
            if piece.shape[1] > 34:
                with torch.no_grad():
                    found = distillation_loss(model, piece, window=32, sinks=0)
                sums, count = sums + torch.stack(found[:4]) * found.valid, count + found.valid
    assert after["eval_positions"] == count
    expected = dict(zip(("loss", "kl", "ce", "teacher_ce"), (sums / count).tolist(), strict=True))
    # float32 sums in another order; the log rounds to six digits.
    assert {name: after[f"eval_{name}"] for name in expected} == pytest.approx(expected, rel=2e-5)


def test_the_base_is_not_touched(train: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither its weights nor its configuration; gradients and optimizer state are the memory's alone."""
    seen: dict[str, Any] = {}
    finish = DistillationTrainer._save_checkpoint

    def looked_at(self: DistillationTrainer, model: Any, trial: Any) -> None:
        memory = self.student.memory()
        base = {name: p for name, p in self.student.model.named_parameters() if name not in memory}
        seen["base"] = {name: p.detach().clone() for name, p in base.items()}
        seen["frozen"] = not any(p.requires_grad or p.grad is not None for p in base.values())
        seen["dtypes"] = {p.dtype for p in base.values()}, {p.dtype for p in memory.values()}
        state = self.optimizer.optimizer.state
        seen["state"] = {name for name, p in memory.items() if p in state}, len(state)
        seen["state dtypes"] = {x.dtype for values in state.values() for x in values.values()}
        finish(self, model, trial)

    monkeypatch.setattr(DistillationTrainer, "_save_checkpoint", looked_at)
    train(bf16=True)
    assert seen["frozen"]
    assert seen["dtypes"] == ({torch.bfloat16}, {torch.float32})
    assert seen["state dtypes"] == {torch.float32}
    stored = load_file(tiny_model / "model.safetensors")
    assert all(torch.equal(stored[name].bfloat16(), p) for name, p in seen["base"].items())
    with_state, number = seen["state"]
    tensors = load_file(tmp_path / "out" / "checkpoint-4" / "model.safetensors")
    assert with_state == {name for name in tensors if not name.endswith("fn.D")} and number == len(with_state)


def counting(part: MicroBatch) -> int:
    """Positions at window + sinks or later with a next token; the texts have nothing masked."""
    lengths = part.batch["attention_mask"].sum(1) - 1
    return int((lengths - part.window - part.sinks).clamp_min(0).sum())


@pytest.mark.slow
def test_every_micro_batch_sees_the_steps_window(train: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And counts what the whole step counts, also after a resume; a batch is longer than its window."""
    parts: list[MicroBatch] = []
    forward = Student.forward

    def watched(self: Student, part: MicroBatch) -> Distillation:
        parts.append(part)
        return forward(self, part)

    monkeypatch.setattr(Student, "forward", watched)
    train(gradient_accumulation_steps=3)
    steps = [parts[first : first + 3] for first in range(0, 12, 3)]
    first_run = [(step[0].window, step[0].sinks, step[0].count) for step in steps]
    for step in steps:
        assert len({(part.window, part.sinks, part.count) for part in step}) == 1
        assert step[0].count == sum(counting(part) for part in step)
        assert all(part.batch["input_ids"].shape[1] > part.window + part.sinks for part in step)
    assert len({(window, sinks) for window, sinks, _ in first_run}) > 1, "they are drawn anew"
    parts.clear()
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    train(gradient_accumulation_steps=3, resume_from_checkpoint=True)
    assert [(part.window, part.sinks, part.count) for part in parts[::3]] == first_run[2:]


def test_micro_batches_begin_where_their_step_does(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[int] = []

    def watched(*arguments: Any, start: int = 0, **options: Any) -> Distillation:
        starts.append(start)
        return distillation_loss(*arguments, start=start, **options)

    monkeypatch.setattr("ahn.training.student.distillation_loss", watched)
    train(gradient_accumulation_steps=2, ahn_implementation="RoutedDeltaNet", memory_positions=4000)
    assert starts[0::2] == starts[1::2] and len(set(starts)) == 4, starts
    assert min(starts) >= 0 and max(starts) < 4000


@pytest.mark.slow
def test_accumulated_micro_batches_are_one_batch(train: Any, tmp_path: Path) -> None:
    """Rows of different lengths, so a mean of micro-batches' means would be another number."""
    weights = []
    for size, accumulation in ((4, 1), (1, 4), (2, 2)):
        train(
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, overwrite_output_dir=True,
            train_sampling_strategy="sequential", max_grad_norm=0.01,
        )  # fmt: skip
        weights.append(load_file(tmp_path / "out" / "model.safetensors"))
    for other in weights[1:]:
        for name, tensor in weights[0].items():
            # The same float32 sums in another order, over four steps of a learning rate of 1e-2.
            torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=2e-5)


def test_a_step_without_positions_is_an_error(tiny_model: Path, tmp_path: Path) -> None:
    """A reply in the first half counts for small windows; the step whose window is larger must not pass silently."""
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": words(40, 1)}]
    rows = [{"messages": [*chat, {"role": "user", "content": words(120, n)}]} for n in range(4)]
    data = write_rows(tmp_path / "chats.jsonl", rows)
    with pytest.raises(ahn.AHNError, match="No position counts in the loss"):
        run(parse(flags(tiny_model, data, tmp_path / "out", cutoff_len=512, max_steps=20)))


def test_not_a_number_stops_before_harm(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third step's gradient is not finite: the run ends there, with the memory as the second step left it."""
    before: list[dict[str, Tensor]] = []
    students: list[Student] = []
    forward = Student.forward

    def poisoned(self: Student, part: MicroBatch) -> Distillation:
        students.append(self)
        before.append({name: p.detach().clone() for name, p in self.memory().items()})
        found = forward(self, part)
        return found._replace(loss=found.loss * torch.nan) if len(before) == 3 else found

    monkeypatch.setattr(Student, "forward", poisoned)
    with pytest.raises(ahn.AHNError, match=r"Step 3: the gradient's norm is nan\..* lower .*checkpoint-2 is kept"):
        train()
    assert len(before) == 3 and not all(torch.equal(before[1][name], p) for name, p in before[2].items())
    assert all(torch.equal(before[2][name], p) for name, p in students[0].memory().items())


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["DeltaNet", "Mamba2"])
def test_other_memories_and_options(memory: str, train: Any, tmp_path: Path, tiny_model: Path) -> None:
    train(
        ahn_implementation=memory, use_ahn_router=True, use_q_proj=True, fa_layer_ids="1", loss_type="kl+ce+distill",
        use_normalized_l2=True, activation_checkpointing=True, max_steps=2,
    )  # fmt: skip
    config = ahn.from_pretrained(tmp_path / "out", base=tiny_model).ahn_config
    assert (config.router, config.q_proj, config.full_attention_layers) == (True, True, (1,))


@pytest.mark.slow
def test_streamed_data_trains(train: Any, tmp_path: Path) -> None:
    train(streaming=True, max_steps=4)
    whole = load_file(tmp_path / "out" / "model.safetensors")
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    train(streaming=True, max_steps=4, resume_from_checkpoint=True)
    assert all(torch.equal(whole[name], x) for name, x in load_file(tmp_path / "out" / "model.safetensors").items())


@pytest.mark.slow
def test_the_whole_model_if_asked(train: Any, tmp_path: Path) -> None:
    train(save_ahn_only=False, max_steps=2)
    merged = ahn.from_pretrained(tmp_path / "out" / "merged")
    adapter = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(p, adapter[name]) for name, p in ahn.adapter_parameters(merged).items())


def without_tokenizer(base: Path) -> None:
    (base / "tokenizer.json").unlink()


def small_vocabulary(base: Path) -> None:
    weights = load_file(base / "model.safetensors")
    cut = {name: x[:100].clone() if x.shape[0] == 4096 else x for name, x in weights.items()}
    save_file(cut, base / "model.safetensors", metadata={"format": "pt"})
    config = AutoConfig.from_pretrained(base)
    config.vocab_size = 100
    config.save_pretrained(base)


def few_positions(base: Path) -> None:
    config = AutoConfig.from_pretrained(base)
    config.max_position_embeddings = 64
    config.save_pretrained(base)


def test_positions_at_which_the_rotation_changes(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    config = AutoConfig.from_pretrained(base)
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    config.save_pretrained(base)
    chosen = {"ahn_implementation": "RoutedDeltaNet", "memory_positions": 4097}
    with pytest.raises(ahn.AHNError, match=r"memory_positions 4097 is beyond the 4096 positions .* \(dynamic\)"):
        run(parse(flags(base, tiny_data, tmp_path / "out", **chosen)))
    assert not (tmp_path / "out").exists()


def truncated(base: Path) -> None:
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_tokenizer, "tokenizer"),
        (small_vocabulary, "4096 tokens, the model embeddings for 100"),
        (few_positions, "beyond the 64 positions"),
        (truncated, "truncated"),
    ],
)
def test_bases_that_do_not_fit(
    spoil: Any, message: str, tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    spoil(base)
    monkeypatch.setattr("ahn.training.run.load_model", None)  # not reached
    with pytest.raises(ahn.AHNError, match=message):
        run(parse(flags(base, tiny_data, tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_no_base(tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(ahn.AHNError, match="an AHN adapter without its base model"):
        run(parse(flags(ahn.tiny.adapter_path("deltanet"), tiny_data, tmp_path / "out")))


def test_dropout_stays_off(tiny_model: Path) -> None:
    """Teacher and student must differ by the window alone; only layers know that it is training, to recompute."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    student = Student(ahn.attach(model, ahn.AHNConfig(window=8, sinks=0))).train()
    layers = list(student.layers())
    assert all(layer.training for layer in layers)
    assert not any(module.training for layer in layers for module in layer.modules() if module is not layer)
    assert not any(layer.training for layer in student.eval().layers())


def test_a_checkpoint_that_cannot_be_finished_leaves_nothing(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ahn.training.checkpoints.write_rng", full)
    with pytest.raises(OSError, match="No space"):
        run(parse(flags(tiny_model, tiny_data, tmp_path / "out")))
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("where", ["file", "file/deeper", "x" * 300])
def test_an_output_that_cannot_be_written(
    where: str, tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("ahn.training.run.load_data", None)  # not reached
    with pytest.raises(ahn.AHNError, match=r" (is a file|cannot be written)"):
        run(parse(flags(tiny_model, tiny_data, tmp_path / where)))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"fa_layer_ids": "7"}, "names layer 7"),
        ({"fa_layer_ids": "0,1"}, "full_attention_layers"),
        ({"attn_implementation": "sdpaa"}, "attn_implementation sdpaa is no attention kernel"),
    ],
)
def test_settings_that_do_not_fit_the_base(
    setting: Any, message: str, tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ahn.training.run.load_data", None)  # not reached
    with pytest.raises(ahn.AHNError, match=message):
        run(parse(flags(tiny_model, tiny_data, tmp_path / "out", **setting)))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_run_goes_on_with_the_data_it_began_with(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Wherever it lies; other data, or data cut another way, only if asked for."""
    data = Path(shutil.copy(tiny_data, tmp_path / "a.jsonl"))
    moved = Path(shutil.copy(tiny_data, tmp_path / "b.jsonl"))

    def go_on(file: Path, **more: Any) -> None:
        run(parse(flags(tiny_model, file, tmp_path / "out", resume_from_checkpoint=True, **more)))

    go_on(data, max_steps=2)
    (tmp_path / "out" / ".checkpoint-4.partial").mkdir()
    go_on(moved, max_steps=3, save_steps=3)
    assert not list((tmp_path / "out").glob(".*")), "what a killed run left is gone"
    moved.write_text(moved.read_text().replace("def", "class", 1))
    with pytest.raises(ahn.AHNError, match=r"The training samples .* changed since .*checkpoint-3 was written: .*"):
        go_on(moved)
    with pytest.raises(ahn.AHNError, match="training samples"):
        go_on(data, cutoff_len=100)
    go_on(moved, accept_changed_data=True)
    assert "going on as asked" in caplog.text


@pytest.mark.slow
def test_another_tokenizer_is_not_gone_on_with(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    run(parse(flags(base, tiny_data, tmp_path / "out", max_steps=2)))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template += " "
    tokenizer.save_pretrained(base)
    with pytest.raises(ahn.AHNError, match="The tokenizer or its chat template changed"):
        run(parse(flags(base, tiny_data, tmp_path / "out", resume_from_checkpoint=True)))


@pytest.mark.slow
def test_a_window_that_follows_the_base_is_said(train: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        train(max_steps=1)
    assert caplog.text.count("window 1920, sinks 128: they follow the base, trained on 4096.") == 1
    caplog.clear()
    with caplog.at_level(logging.INFO):
        train(max_steps=1, window=100, sinks=4, overwrite_output_dir=True)
    assert "follow the base" not in caplog.text


def test_changed_settings_are_said(train: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(max_steps=2)
    with caplog.at_level(logging.WARNING):
        train(max_steps=4, resume_from_checkpoint=True, weight_decay=0.3)
    assert "max_steps: 2 → 4" in caplog.text and "weight_decay: 0.1 → 0.3" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("left", ["null", "nothing"])
def test_runs_of_an_older_default_go_on(
    left: str, train: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the published start had no name yet, it is what the run began with, and stays its setting."""
    train(max_steps=2, memory_horizons="published")
    file = tmp_path / "out" / "checkpoint-2" / "training.json"
    written = json.loads(file.read_text())
    del written["settings"]["memory_horizons"]
    if left == "null":
        written["settings"]["memory_horizons"] = None
    file.write_text(json.dumps(written))
    with caplog.at_level(logging.INFO):
        train(max_steps=4, resume_from_checkpoint=True)
    assert caplog.text.count("memory_horizons stays published") == 1
    assert "memory_horizons: " not in caplog.text, "no changed setting"
    later = json.loads((tmp_path / "out" / "checkpoint-4" / "training.json").read_text())
    assert later["settings"]["memory_horizons"] == "published"


@pytest.mark.slow
def test_the_published_script_trains(tiny_model: Path, tmp_path: Path) -> None:
    """Its flags as they are, with a small model and data of its form in the places of the large ones."""
    chat = [{"role": "user", "content": words(200, 0)}, {"role": "assistant", "content": words(200, 1)}]
    data = write_rows(tmp_path / "chats.jsonl", [{"messages": chat}] * 8)
    own = f"--model_name_or_path {tiny_model} --dataset {data} --output_dir {tmp_path / 'out'} --cutoff_len 2048"
    results = run(parse([*PUBLISHED.split(), *own.split(), "--use_cpu", "--disable_tqdm", "true"]))
    assert results["steps"] == 2
    assert ahn.from_pretrained(tmp_path / "out", base=tiny_model).ahn_config.memory == "gated_deltanet"
