"""What the memories of ahn-tiny store: the numbers of docs/inspect.md.

    python benchmarks/inspect_tiny.py gated_deltanet OUT.json [--documents 8]

Reads held-out documents of 4096 tokens with 32 facts each (256 exact tokens), once as they are and once with each part
of the memory off, and writes means over documents with 95 % intervals (Student's t; shares of facts: Wilson's).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

import ahn
from ahn import tiny
from ahn.demo.comparison import wilson
from ahn.demo.documents import Document, make_documents
from ahn.inspect import Trace, record, token_kinds, without
from ahn.tiny.corpus import held_out_text

WINDOW, SINKS, LENGTH = 224, 32, 4096
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 6: 2.57, 8: 2.36, 12: 2.20}
"""97.5 % quantiles of Student's t by number of documents."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("memory")
    parser.add_argument("out", type=Path)
    parser.add_argument("--documents", type=int, default=8, choices=sorted(STUDENT))
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(tiny.path())
    model = ahn.from_pretrained(tiny.adapter_path(arguments.memory), window=WINDOW, sinks=SINKS, dtype="float32").eval()
    documents, _ = make_documents(tokenizer, held_out_text(), arguments.documents, LENGTH, WINDOW + SINKS)
    rows = []
    for document in documents:
        rows.append(one(model, tokenizer, document))
        print(document.name, json.dumps(rows[-1]["loss"]), file=sys.stderr, flush=True)
    result = {"memory": arguments.memory, "window": WINDOW, "sinks": SINKS, "length": LENGTH}
    result |= {"documents": [document.name for document in documents], **summary(rows)}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


@torch.no_grad()
def one(model: PreTrainedModel, tokenizer: Any, document: Document) -> dict[str, Any]:
    """Everything about one document."""
    ids = torch.tensor(document.text.ids)
    kinds = token_kinds(tokenizer, document.text.ids)
    for position in document.text.inserted:
        kinds[position] = "fact"
    facts = document.facts_beyond(WINDOW, SINKS)
    answers = torch.tensor([fact.answer for fact in facts])
    counted = torch.tensor([kind != "fact" for kind in kinds])
    counted[: WINDOW + SINKS] = False

    def read() -> tuple[Tensor, int]:
        """(L,) loss of each token, and how many facts were recalled."""
        logits = model(ids[None]).logits[0]
        losses = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")
        right = int((logits[answers - 1].argmax(-1) == ids[answers]).sum())
        return torch.cat([losses.new_zeros(1), losses]), right

    with record(model) as trace:
        whole, recalled = read()
    with without(model):
        bare, bare_recalled = read()
    losses = {"memory": float(whole[counted].mean()), "no memory": float(bare[counted].mean())}
    recalls = {"memory": recalled, "no memory": bare_recalled}
    for name, block in parts(model, trace, kinds):
        with block:
            less, recalled = read()
        losses[name], recalls[name] = float(less[counted].mean()), recalled
    gains = {}
    for kind in sorted(set(kinds) - {"fact"}):
        here = counted & torch.tensor([k == kind for k in kinds])
        gains[kind] = [float((bare - whole)[here].sum()), int(here.sum())]
    lasting = [pair for pair, long in lives(trace).items() if long]
    by_kind = {
        name: {entry.kind: [entry.strength.value, entry.update.value, entry.tokens] for entry in entries}
        for name, entries in (("all", trace.by_kind(kinds)), ("lasting", trace.by_kind(kinds, lasting)))
    }
    shares = {layer: reads.share for layer, reads in trace.reads.items()}
    return {
        "loss": losses, "recalled": recalls, "facts": len(facts), "gain": gains, "kinds": by_kind, "shares": shares,
        "lasting": len(lasting),
    }  # fmt: skip


def lives(trace: Trace) -> dict[tuple[int, int], bool]:
    """Whether each head's half-life is longer than the window."""
    return {(i, h): life > WINDOW for i, w in trace.writes.items() for h, life in enumerate(w.half_life().tolist())}


def parts(
    model: PreTrainedModel, trace: Trace, kinds: list[str]
) -> Iterator[tuple[str, contextlib.AbstractContextManager[None]]]:
    """Parts of the memory that are turned off one after the other."""
    for layer in trace.writes:
        yield f"no layer {layer}", without(model, [layer])
    heads = lives(trace)
    for name, long in (("no heads that remember", True), ("no heads that forget", False)):
        stack = contextlib.ExitStack()
        for layer in trace.writes:
            if off := [head for (i, head), lasts in heads.items() if i == layer and lasts is long]:
                stack.enter_context(without(model, [layer], off))
        yield name, stack
    for kind in sorted(set(kinds)):
        yield f"{kind} not written", without(model, read=True, tokens=torch.tensor([k == kind for k in kinds]))


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    asked = sum(row["facts"] for row in rows)
    names = [name for name in rows[0]["loss"] if all(name in row["loss"] for row in rows)]
    harm = {}
    for name in names:
        right = sum(row["recalled"][name] for row in rows)
        harm[name] = {
            "loss": mean([row["loss"][name] for row in rows]),
            "more_loss_than_with_memory": mean([row["loss"][name] - row["loss"]["memory"] for row in rows]),
            "facts_recalled": [right / asked, *(wilson(right, asked) or ())],
        }
    found = sorted({kind for row in rows for kind in row["kinds"]["all"]})
    kinds = {}
    for kind in found:
        mine = [row for row in rows if kind in row["kinds"]["all"]]
        kinds[kind] = {
            "documents": len(mine),
            "tokens": sum(row["kinds"]["all"][kind][2] for row in mine),
            "strength": mean([row["kinds"]["all"][kind][0] for row in mine]),
            "update": mean([row["kinds"]["all"][kind][1] for row in mine]),
            "update_in_lasting_heads": mean([row["kinds"]["lasting"][kind][1] for row in mine]),
        }
        with_gain = [row["gain"][kind] for row in mine if row["gain"].get(kind, [0, 0])[1] >= 10]
        if with_gain:
            kinds[kind]["gain_when_predicted"] = mean([total / count for total, count in with_gain])
    shares = {layer: mean([row["shares"][layer] for row in rows]) for layer in rows[0]["shares"]}
    heads = [row["lasting"] for row in rows]
    return {"facts": asked, "off": harm, "kinds": kinds, "read_share": shares, "lasting_heads": heads}


def mean(values: list[float]) -> list[float]:
    """Mean over documents and its interval, as far as there is one."""
    middle = statistics.fmean(values)
    if len(values) not in STUDENT:
        return [middle]
    half = STUDENT[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return [middle, middle - half, middle + half]


if __name__ == "__main__":
    main()
