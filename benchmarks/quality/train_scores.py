"""Scores of retained tokens for a base: what `ahn train` learns, from looks that are worked out once and kept on a GPU.

    python benchmarks/quality/make_chats.py --out train.jsonl --count 160
    python benchmarks/quality/train_scores.py --chats train.jsonl --out DIR --heads 20

The base reads each chat once with full attention; per layer the attention's input of every token and whether later
queries look at it most are kept (600 bytes a token and layer for SmolLM2). Then all scorers learn from random tokens
of all chats, many passes in seconds, where `ahn train` makes one pass, chat by chat. With `--heads` only so many key
heads keep tokens: those that find the answers of the first chats (`ahn.training.heads`). With `--shared` one score a
token is for all heads of all layers: it learns from the head that finds most, and that head's layer tells it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from real import reading
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import ahn
from ahn.checkpoint import shipped
from ahn.model.adapter import set_window
from ahn.model.attached import observed
from ahn.training import looks
from ahn.training.heads import copied, most_copying
from ahn.training.losses import IGNORED

ASKED = 32
"""Chats whose answers tell the heads that find them."""


@torch.no_grad()
def gathered(
    model: PreTrainedModel, chats: list[Tensor], window: int, sinks: int, teachers: looks.Teachers = ()
) -> tuple[list[Tensor], list[Tensor]]:
    """Per scorer: attention inputs (N, D) bfloat16, and in how many of `looks.SHARES` for each of its heads, (N, h)."""
    inputs: list[list[Tensor]] = []
    targets: list[list[Tensor]] = []
    set_window(model, max(map(len, chats)), 0)  # nothing leaves: full attention
    for ids in chats:
        watch = looks.Watch(model, window, None, teachers)
        with observed(model, watch, first=True):
            model.get_decoder()(ids[None].to(model.device), use_cache=False)
        counted = slice(sinks, len(ids) - window)
        for n, (_, x, looked) in enumerate(watch.lessons()):
            if n == len(inputs):
                inputs.append([])
                targets.append([])
            some = torch.zeros_like(looked, dtype=torch.bool)
            some[:, :, counted] = True
            inputs[n].append(x[0, counted].bfloat16())
            targets[n].append(looks.grades(looked, some)[0, :, counted].T)
    set_window(model, window, sinks)
    return [torch.cat(part) for part in inputs], [torch.cat(part) for part in targets]


def learn(
    model: PreTrainedModel, inputs: list[Tensor], targets: list[Tensor], steps: int, batch: int, lr: float
) -> float:
    """Fit every layer's scorer; returns how many of the most looked-at tokens are found, mean of the last steps."""
    memories = [layer.ahn.fn for layer in model.get_decoder().layers if hasattr(layer, "ahn")]
    memories = [memory for memory in memories if memory.scorer is not None]
    parameters = [parameter for memory in memories for parameter in memory.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=1e-4, fused=model.device.type == "cuda")
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    recall = torch.zeros((), device=model.device)
    last = max(1, steps // 10)
    for step in range(steps):
        some = torch.randint(0, len(inputs[0]), (batch,), device=model.device)
        losses = []
        for memory, x, target in zip(memories, inputs, targets, strict=True):
            wanted = target[some]
            logits = memory.logits(x[some].float()[None])[0].T.expand_as(wanted)
            losses.append(F.binary_cross_entropy_with_logits(logits, wanted / len(looks.SHARES)))
            if step >= steps - last:
                best = logits.detach() >= logits.detach().quantile(1 - looks.SHARES[0], dim=0, keepdim=True)
                recall += (best & (wanted > 0)).sum() / (wanted > 0).sum() / len(memories) / last
        loss = torch.stack(losses).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)
    return recall.item()


def found_heads(
    model: PreTrainedModel, asked: list[reading.Asked], window: int, sinks: int, count: int
) -> tuple[tuple[int, int], ...]:
    """The key heads that look most at what an answer of a chat says, where it was said."""
    batches = []
    for ids, answers in asked:
        labels = torch.full_like(ids, IGNORED)
        for answer in answers:
            labels[answer] = ids[answer]
        batches.append({"input_ids": ids[None], "labels": labels[None]})
    return most_copying(copied(model, batches, window, sinks), count)


def trained(
    path: str, chats: Path, out: Path, count: int | None, window: int, sinks: int, steps: int,
    batch: int = 8192, lr: float = 3e-3, seed: int = 0, heads: int | None = None, shared: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Train the scores of a model for the first chats of a file, write the adapter, and say what was done."""
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    model = ahn.attach(base.to(device).eval(), ahn.AHNConfig("retained", window, sinks))
    began = time.perf_counter()
    some: looks.Teachers = ()
    score_layer = None
    if heads or shared:
        asked = reading.read_chats(tokenizer, chats, ASKED)
        some = found_heads(model, asked, window, sinks, heads or 1)
        print(f"{len(some)} key heads: {' '.join(f'{layer}.{head}' for layer, head in some)}", flush=True)
        score_layer = some[0][0] if shared else None
        config = model.ahn_config.replace(slot_heads=some if heads else None, score_layer=score_layer)
        model = ahn.attach(ahn.detach(model), config)
    with chats.open(encoding="utf-8") as lines:
        rows = [json.loads(line)["messages"] for line in itertools.islice(lines, count)]
    shown = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in rows]
    encoded = tokenizer(shown, add_special_tokens=False, verbose=False)["input_ids"]
    some = () if heads else some
    inputs, targets = gathered(model, [torch.tensor(ids) for ids in encoded], window, sinks, some)
    read = time.perf_counter() - began
    print(f"{len(rows)} chats read, {len(inputs[0]):,} tokens, {read:.1f} s", flush=True)
    recall = learn(model, inputs, targets, steps, batch, lr)
    learned = time.perf_counter() - began - read
    print(f"recall of the most looked-at {looks.SHARES[0]:.0%}: {recall:.3f}; {learned:.1f} s")
    ahn.save_adapter(model.to(torch.bfloat16), out)
    return {
        "chats": len(rows), "tokens": len(inputs[0]), "read_seconds": round(read, 1), "recall": recall,
        "steps": steps, "batch": batch, "lr": lr, "seed": seed, "learn_seconds": round(learned, 1),
        "heads": model.ahn_config.slot_heads, "score_layer": score_layer, "teachers": some,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--chats", type=Path, required=True, help="file of make_chats.py, of the training split")
    parser.add_argument("--out", type=Path, required=True, help="directory of the adapter")
    parser.add_argument("--count", type=int, help="chats to read (default: all)")
    parser.add_argument("--window", type=int, default=480)
    parser.add_argument("--sinks", type=int, default=32)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=8192, help="tokens per step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--heads", type=int, help="key heads that keep tokens (default: all)")
    parser.add_argument("--shared", action="store_true", help="one score for all heads (default: each head its own)")
    options = vars(parser.parse_args())
    if options["heads"] and options["shared"]:
        parser.error("--heads and --shared: scores of each head, or one for all")
    path = shipped.resolve(options.pop("model"))
    print(json.dumps(trained(path, **options)))


if __name__ == "__main__":
    main()
