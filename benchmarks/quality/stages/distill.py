"""Stage `distill`: teach each memory to give the frozen base model what full attention gave it."""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen3ForCausalLM

import ahn
from ahn.checkpoint import save_adapter
from ahn.memory.horizons import start_with_horizons
from ahn.model.adapter import adapter_parameters
from ahn.training import WindowSchedule

from .batches import stored_batches
from .log import Log, write_json
from .loop import StepLog, distill
from .recipe import SEED, Distillation, Recipe, Task


def marker(out: Path, task: Task) -> Path:
    """The file that says that a training is done."""
    return out / "distill" / f"{task.name}.json"


def adapter(out: Path, task: Task) -> Path:
    """The directory of the trained memory."""
    return out / "adapters" / task.name


def distill_memory(recipe: Recipe, out: Path, task: Task, device: torch.device) -> None:
    """Read what `prepare` and `base` wrote in `out`; write out/adapters/<name>/ in bfloat16, and a log.

    The log is out/distill/<name>.jsonl, one JSON object a line: step, and the means of the last `log_every` steps of
    kl, ce and teacher_ce (nats) and of the gradient's norm. out/distill/<name>.json, a summary, is written last.
    """
    run, seed = task.run, task.seed or 0
    settings = dataclasses.replace(recipe.distillation, **run.changes)
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    batches = stored_batches(recipe, settings, out, tokenizer, seed)
    torch.manual_seed(SEED + seed)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # of the base; the memory is float32
    model = Qwen3ForCausalLM.from_pretrained(out / "model", dtype=dtype).to(device)
    budget = recipe.contexts[0].budgets[0]  # which window is saved with the memory; training draws its own
    ahn.attach(model, ahn.AHNConfig(**{"window": budget - recipe.sinks, "sinks": recipe.sinks} | run.settings))
    if settings.horizons is not None:
        start_with_horizons(model, *settings.horizons)
    log = Log(out / "distill" / f"{task.name}.jsonl")
    parameters = sum(p.numel() for p in adapter_parameters(model).values())
    log.write(run=task.name, parameters=parameters, steps=settings.steps)
    recent: list[StepLog] = []

    def on_step(step: StepLog) -> None:
        recent.append(step)
        if len(recent) == settings.log_every or step.step + 1 == settings.steps:
            names = ("loss", "kl", "ce", "teacher_ce", "gradient_norm")
            means = {name: round(statistics.mean(getattr(each, name) for each in recent), 4) for name in names}
            log.write(step=step.step + 1, lr=step.lr, **means)
            recent.clear()

    logs = distill(
        model,
        (batches[step] for step in range(settings.steps)),
        settings.steps,
        schedule(settings, SEED + seed),
        loss=settings.loss,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        warmup=settings.warmup,
        use_normalized_l2=settings.use_normalized_l2,
        log_every=min(10, settings.log_every),
        on_step=on_step,
    )
    for parameter in adapter_parameters(model).values():
        parameter.data = parameter.data.bfloat16()
    save_adapter(model, adapter(out, task))
    _name_base(adapter(out, task) / "config.json", "../../model")
    last = {name: statistics.mean(getattr(each, name) for each in logs[-20:]) for name in ("kl", "ce", "teacher_ce")}
    about = {"run": run.name, "seed": seed, "parameters": parameters, "seconds": log.seconds()}
    write_json(marker(out, task), about | {"recipe": recipe.fingerprint(run), "last": last})


def schedule(settings: Distillation, seed: int) -> WindowSchedule:
    """Windows and sinks of each step."""
    return WindowSchedule(
        sliding_window_type="random" if settings.total is None else "fixed",
        total=settings.total,
        totals=settings.totals,
        sink_candidates=settings.sinks,
        lower_ratio=0.0,
        seed=seed,
    )


def _name_base(config: Path, base: str) -> None:
    """Say where the base is as seen from the adapter, so that the two move together."""
    content = json.loads(config.read_text())
    config.write_text(json.dumps(content | {"base_model_name_or_path": base}, indent=2) + "\n")
