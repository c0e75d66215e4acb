"""Stage `base`: train the base model on one GPU (or, with `--smoke`, check the stage on a CPU)."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, Qwen3ForCausalLM

from .batches import Batches, loader, workers
from .evaluate import Evaluation, banded
from .log import Log
from .model import build, hidden_states, save, token_losses
from .optimizer import Muon
from .recipe import Recipe


def train_base(recipe: Recipe, out: Path) -> None:
    """Read what `prepare` wrote in `out`; write out/model/ (weights, config) and out/base.jsonl (the log).

    One JSON object a line: step, loss (nats a token of text), answers (nats an answer), lr, tokens_per_second; and at
    evaluations the keys of `Evaluation`.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    batches = Batches(recipe, out, tokenizer)
    evaluation = Evaluation(recipe, out, batches.facts, recipe.evaluation_length, recipe.evaluation_chunks)
    model = build(recipe, tokenizer).to(device)
    losses = token_losses
    if device.type == "cuda":
        torch._dynamo.config.cache_size_limit = 64  # one layer's code at each sequence length
        for layer in model.model.layers:
            layer.compile(dynamic=False)
        losses = torch.compile(token_losses, dynamic=False)
    optimizers = make_optimizers(recipe, model)
    log = Log(out / "base.jsonl")
    log.write(parameters=sum(p.numel() for p in model.parameters()), steps=recipe.steps, device=_device_name(device))

    tokens, mark = 0, time.perf_counter()
    for step, (ids, weights) in enumerate(loader(batches, workers())):
        ids, weights = ids.to(device, non_blocking=True), weights.to(device, non_blocking=True)
        rate = learning_rate(recipe, step)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
        with autocast(device):
            each = losses(model.lm_head, hidden_states(model, ids[:, :-1]), ids[:, 1:])
            ((each * weights).sum() / weights.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        tokens += weights.numel()
        last = step + 1 == recipe.steps
        if (step + 1) % recipe.log_every == 0 or last:
            each = each.detach()
            text, answers = each[weights == 1].mean().item(), each[weights > 1].mean().item()
            speed = tokens / (time.perf_counter() - mark)
            log.write(
                step=step + 1, loss=round(text, 4), answers=round(answers, 4), lr=rate, tokens_per_second=int(speed)
            )
            tokens, mark = 0, time.perf_counter()
        if (step + 1) % recipe.evaluate_every == 0 or last:
            with autocast(device):
                log.write(step=step + 1, **measure(recipe, evaluation, model))
            save(model, out / "model")
            tokens, mark = 0, time.perf_counter()
    report(recipe, out, batches, device, log)


def report(recipe: Recipe, out: Path, batches: Batches, device: torch.device, log: Log) -> None:
    """Measure what was written (bfloat16 weights, computed in float32), at the trained lengths and on every chunk."""
    model = Qwen3ForCausalLM.from_pretrained(out / "model", dtype=torch.float32).to(device).eval()
    for length in (recipe.evaluation_length, 2 * recipe.evaluation_length):
        evaluation = Evaluation(recipe, out, batches.facts, length, recipe.report_chunks)
        log.write(final=True, length=length, **measure(recipe, evaluation, model))


def measure(recipe: Recipe, evaluation: Evaluation, model: Qwen3ForCausalLM) -> dict[str, float]:
    """The model with full attention, and with sinks + window."""

    def windowed(ids: Tensor) -> Tensor:
        return hidden_states(model, ids, banded(ids, recipe.window, recipe.sinks))

    full = evaluation("full", partial(hidden_states, model), model.lm_head)
    return full | evaluation(f"window{recipe.lossless}", windowed, model.lm_head)


def make_optimizers(recipe: Recipe, model: Qwen3ForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the embedding and the norms; each group remembers its peak rate."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    norms = [p for p in model.parameters() if p.ndim == 1]
    embedding = [model.model.embed_tokens.weight]
    muon = Muon(matrices, lr=recipe.matrix_lr, weight_decay=recipe.matrix_decay)
    adam = torch.optim.AdamW(
        [{"params": embedding, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}],
        lr=recipe.other_lr,
        betas=(0.9, 0.95),
        fused=model.device.type == "cuda",
    )
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return [muon, adam]


def learning_rate(recipe: Recipe, step: int) -> float:
    """The share of the peak rate: a linear warm-up, a plateau, a linear fall to zero over the last `cooldown`."""
    rise = (step + 1) / recipe.warmup
    fall = (recipe.steps - step) / (recipe.cooldown * recipe.steps)
    return min(1.0, rise, fall)


def autocast(device: torch.device) -> AbstractContextManager[Any]:
    """bfloat16 products on a GPU, float32 on a CPU."""
    return torch.autocast("cuda", dtype=torch.bfloat16) if device.type == "cuda" else nullcontext()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
