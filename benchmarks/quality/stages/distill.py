"""Stage `distill`: teach each memory to give the frozen base model what full attention gave it."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, Qwen3ForCausalLM

import ahn
from ahn.adapter import adapter_parameters
from ahn.checkpoint import load_adapter, save_adapter
from ahn.tiny.facts import FactWriter
from ahn.training import StepLog, WindowSchedule, distill

from .batches import Answers, loader, workers
from .evaluate import Evaluation
from .log import Log
from .recipe import SEED, Recipe


def distill_memory(recipe: Recipe, out: Path, memory: str) -> None:
    """Read what `prepare` and `base` wrote in `out`; write out/adapters/<memory>/ in bfloat16, and a log.

    The log is out/distill-<memory>.jsonl, one JSON object a line. While training: step, and the means of the last
    `log_every` steps of kl, ce and teacher_ce (nats) and of the gradient's norm. Before and after: the keys of
    `Evaluation` for full attention, for sinks + window ("before": the memory is untrained and adds nothing) and for the
    memory ("after").
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    facts = FactWriter(tokenizer)
    lengths = (recipe.evaluation_length, 2 * recipe.evaluation_length)
    evaluations = [Evaluation(recipe, out, facts, length, recipe.evaluation_chunks) for length in lengths]
    settings = recipe.distillation
    torch.manual_seed(SEED)
    model = Qwen3ForCausalLM.from_pretrained(out / "model", dtype=torch.float32).to(device)
    ahn.attach(model, ahn.AHNConfig(memory=memory, window=recipe.window, sinks=recipe.sinks))
    log = Log(out / f"distill-{memory}.jsonl")
    log.write(parameters=sum(p.numel() for p in adapter_parameters(model).values()), steps=settings.steps)
    for evaluation in evaluations:
        with ahn.disabled(model):
            log.write(length=evaluation.length, **measure(evaluation, "full", model))
        log.write(length=evaluation.length, **measure(evaluation, "before", model))

    recent: list[StepLog] = []

    def on_step(step: StepLog) -> None:
        recent.append(step)
        if len(recent) == settings.log_every:
            names = ("kl", "ce", "teacher_ce", "gradient_norm")
            means = {name: round(statistics.mean(getattr(each, name) for each in recent), 4) for name in names}
            log.write(step=step.step + 1, lr=step.lr, **means)
            recent.clear()

    distill(
        model,
        loader(Answers(recipe, out, tokenizer), workers()),
        settings.steps,
        WindowSchedule(totals=settings.totals, sink_candidates=settings.sinks, lower_ratio=0.0, seed=SEED),
        loss="kl",
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        warmup=settings.warmup,
        bf16=device.type == "cuda",
        log_every=settings.log_every,
        on_step=on_step,
    )
    for parameter in adapter_parameters(model).values():
        parameter.data = parameter.data.bfloat16()
    save_adapter(model, out / "adapters" / memory)
    _name_base(out / "adapters" / memory / "config.json", "../../model")
    ahn.detach(model)
    load_adapter(model, out / "adapters" / memory)
    for evaluation in evaluations:
        log.write(length=evaluation.length, **measure(evaluation, "after", model))


def _name_base(config: Path, base: str) -> None:
    """Say where the base is as seen from the adapter, so that the two move together."""
    content = json.loads(config.read_text())
    config.write_text(json.dumps(content | {"base_model_name_or_path": base}, indent=2) + "\n")


def measure(evaluation: Evaluation, name: str, model: PreTrainedModel) -> dict[str, float]:
    """The model as it is now, attended and remembered as its configuration says."""

    def hidden(ids: Tensor) -> Tensor:
        return model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state

    return evaluation(name, hidden, model.lm_head)
