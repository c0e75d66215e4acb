"""Distil a memory from a model's own full attention, in a minute or two of processor time.

`ahn train` is this loop with data of your own, checkpoints and many GPUs (docs/training.md).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import ahn
from ahn.tiny.corpus import train_documents
from ahn.training import WindowSchedule, distillation_loss


def main(steps: int, length: int, batch: int, out: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(ahn.tiny.path())
    tokenizer = AutoTokenizer.from_pretrained(ahn.tiny.path())
    documents = [text for _, text in train_documents()[: 1 + steps * batch // 8]]
    tokens = torch.tensor(tokenizer("\n".join(documents)).input_ids)
    samples = tokens[: len(tokens) // length * length].view(-1, length)

    ahn.attach(model, ahn.AHNConfig(memory="deltanet", window=224, sinks=32))  # the base's weights are frozen
    optimizer = torch.optim.AdamW(ahn.adapter_parameters(model).values(), lr=4e-3)
    schedule = WindowSchedule(ahn_position="prefix")  # each step draws another window
    for step in range(steps):
        rows = samples[torch.randint(len(samples), (batch,))]
        draw = schedule.draw(step, length)
        losses = distillation_loss(model, rows, draw.window, draw.sinks)
        losses.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        gap = float(losses.ce - losses.teacher_ce)
        print(f"step {step}: window {draw.window}, KL {float(losses.kl):.3f}, loss above full attention {gap:.3f}")

    ahn.set_window(model, 224, 32)
    ahn.save_adapter(model, out)
    print(f"saved: ahn.load_adapter(model, '{out}')")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("my-memory"))
    main(**vars(parser.parse_args()))
