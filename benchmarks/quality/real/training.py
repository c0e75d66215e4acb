"""Recurrent memories for a pretrained model: they learn from plain texts and from chats in which facts are found."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from stages.loop import StepLog, distill
from torch import Tensor
from transformers import PreTrainedModel

import ahn
from ahn.memory.horizons import start_with_horizons
from ahn.training import WindowSchedule
from ahn.training.distillation import Batch

from .reading import Asked

HORIZONS = (256.0, 16384.0)
"""E-folds in tokens with which the heads of a memory that forgets begin."""
IGNORED = -100
LOG_EVERY = 10


def batches(texts: list[Tensor], chats: list[Asked], length: int, rows: int, steps: int, seed: int) -> Iterator[Batch]:
    """One batch (rows, length) per step, in turn of texts, all of whose tokens count, and of chats, whose replies do.

    A chat that is shorter goes on with a text: nothing is padded, and what follows a reply cannot change it. One that
    is longer loses its beginning. No chat comes again before all others have come as often.
    """
    random = torch.Generator().manual_seed(seed)

    def draw(most: int) -> int:
        return int(torch.randint(most, (), generator=random))

    def piece(tokens: int) -> Tensor:
        text = texts[draw(len(texts))]
        start = draw(len(text) - tokens + 1)
        return text[start : start + tokens]

    order: list[int] = []
    for step in range(steps):
        if step % 2 == 0:
            yield torch.stack([piece(length) for _ in range(rows)])
            continue
        ids, labels = [], []
        for _ in range(rows):
            order = order or torch.randperm(len(chats), generator=random).tolist()
            chat = chats[order.pop()]
            wanted = torch.full_like(chat.ids, IGNORED)
            for part in chat.answers:
                wanted[part] = chat.ids[part]
            rest = max(0, length - len(chat.ids))
            ids.append(torch.cat([chat.ids[-length:], piece(rest)]))
            labels.append(torch.cat([wanted[-length:], torch.full((rest,), IGNORED)]))
        yield {"input_ids": torch.stack(ids), "labels": torch.stack(labels)}


def trained(
    model: PreTrainedModel, config: ahn.AHNConfig, source: Iterator[Batch], steps: int, lr: float, out: Path
) -> dict[str, Any]:
    """Distil a new memory onto the base model, write its adapter, and say what was done; the base is bare again."""
    torch.manual_seed(0)
    ahn.attach(model, config)
    for parameter in ahn.adapter_parameters(model).values():
        parameter.data = parameter.data.float()
    start_with_horizons(model, *HORIZONS)
    schedule = WindowSchedule("fixed", total=config.lossless, sink_candidates=(config.sinks,), lower_ratio=0.0)
    began = time.perf_counter()

    def on_step(step: StepLog) -> None:
        if (step.step + 1) % LOG_EVERY == 0:
            spent = time.perf_counter() - began
            print(f"step {step.step + 1}: KL {step.kl:.4f}, {spent:.0f} s", flush=True)

    try:
        logs = distill(model, source, steps, schedule, lr=lr, log_every=LOG_EVERY, on_step=on_step)
        for parameter in ahn.adapter_parameters(model).values():
            parameter.data = parameter.data.to(model.dtype)
        ahn.save_adapter(model, out)
    finally:
        ahn.detach(model)
    last = logs[-max(2, steps // 10) :]
    parts = {"texts": [log.kl for log in last if log.step % 2 == 0], "chats": [log.kl for log in last if log.step % 2]}
    return {
        "steps": steps, "lr": lr, "learn_seconds": round(time.perf_counter() - began, 1),
        **{f"{kind}_kl": round(statistics.mean(some), 4) for kind, some in parts.items() if some},
    }  # fmt: skip
