"""Stage `base`: train the base model on one GPU (or, in the smoke shape, check the stage on a CPU)."""

from __future__ import annotations

import dataclasses
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, Qwen3ForCausalLM

from .batches import Batches, Texts, loader, workers
from .log import Log, write_json
from .model import build, hidden_states, save, token_losses
from .optimizer import Muon
from .pace import SETTLED, Pace
from .probes import Probes, by_distance, read, recalled
from .recipe import Recipe

DONE = "base.json"


def train_base(recipe: Recipe, out: Path, device: torch.device, seconds: float | None = None) -> None:
    """Read what `prepare` wrote in `out`; write out/model/ (weights, config), a log out/base.jsonl, out/base.json last.

    One JSON object a line: step, loss (nats a token of text), answers (nats an answer), lr, tokens_per_second; and at
    evaluations the loss and recall of `measure`. Weights are saved at each evaluation, so a run that is cut leaves a
    model that the later stages can take.

    Args:
        seconds: shorten the phases so that the stage ends by then, about.
    """
    pace = Pace(recipe, seconds)
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    texts = Texts(recipe, out, tokenizer)
    probes = Probes(out, texts.facts, dataclasses.replace(recipe.contexts[0], chunks=16, texts=8, needle_lengths=()))
    model = build(recipe, tokenizer).to(device)
    losses = token_losses
    if device.type == "cuda":
        torch._dynamo.config.cache_size_limit = 64  # one layer's code at each sequence length
        for layer in model.model.layers:
            layer.compile(dynamic=False)
        losses = torch.compile(token_losses, dynamic=False)
    optimizers = make_optimizers(recipe, model)
    log = Log(out / "base.jsonl")
    about = {"parameters": sum(p.numel() for p in model.parameters()), "device": _device_name(device)}
    log.write(steps=recipe.steps, **about)

    done, seen = 0, 0
    for number, phase in enumerate(recipe.phases):
        pace.begin()
        tokens, mark = 0, time.perf_counter()
        for step, (ids, weights) in enumerate(loader(Batches(recipe, texts, number), workers())):
            ids, weights = ids.to(device, non_blocking=True), weights.to(device, non_blocking=True)
            rate = learning_rate(recipe, done, pace.progress(number, step))
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
            done, seen, tokens = done + 1, seen + weights.numel(), tokens + weights.numel()
            if pace.limited and device.type == "cuda" and step in (0, SETTLED):
                torch.cuda.synchronize(device)
            pace.done(number, step)
            ends = step + 1 == pace.steps[number]
            last = ends and number + 1 == len(recipe.phases)
            if done % recipe.log_every == 0 or step == 0 or last:
                each = each.detach()
                text, answers = each[weights == 1].mean().item(), each[weights > 1].mean().item()
                speed = int(tokens / (time.perf_counter() - mark))
                entry = {"loss": round(text, 4), "answers": round(answers, 4), "lr": round(rate, 4)}
                log.write(step=done, length=phase.length, **entry, tokens_per_second=speed)
                tokens, mark = 0, time.perf_counter()
            if done % recipe.evaluate_every == 0 or last:
                with autocast(device):
                    found = measure(probes, model)
                log.write(step=done, **found)
                save(model, out / "model")
                tokens, mark = 0, time.perf_counter()
            if ends:
                break
    write_json(out / DONE, {"steps": pace.steps, "tokens": seen, "seconds": log.seconds(), **about, **found})


def measure(probes: Probes, model: Qwen3ForCausalLM) -> dict[str, Any]:
    """With full attention: the loss of a token, and facts recalled by distance (hits, asked)."""

    def hidden(ids: Tensor) -> Tensor:
        return hidden_states(model, ids.to(model.device))

    with torch.no_grad():
        parts = [
            token_losses(model.lm_head, hidden(ids)[:, :-1], ids[:, 1:].to(model.device))
            for ids in probes.chunks.split(4)
        ]
        answers = {
            number: recalled(states, model.lm_head, probes.texts[number], probes.facts.values)
            for number, states in read(hidden, [text.ids for text in probes.texts], rows=4)
        }
    right = [hit for number in sorted(answers) for hit in answers[number]]
    return {"loss_full": round(torch.cat(parts).mean().item(), 4), "recall_full": by_distance(probes.texts, right)}


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


def learning_rate(recipe: Recipe, step: int, progress: float) -> float:
    """The share of the peak rate: a linear warm-up, a plateau, a linear fall to zero over the last `cooldown`."""
    return min(1.0, (step + 1) / recipe.warmup, (1 - progress) / recipe.cooldown)


def autocast(device: torch.device) -> AbstractContextManager[Any]:
    """bfloat16 products on a GPU, float32 on a CPU."""
    return torch.autocast("cuda", dtype=torch.bfloat16) if device.type == "cuda" else nullcontext()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
