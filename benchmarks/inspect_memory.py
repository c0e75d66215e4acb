"""What memories store: the numbers of docs/inspect.md.

    python benchmarks/inspect_memory.py gated_deltanet OUT.json [--documents 8]             # of ahn-tiny
    python benchmarks/inspect_memory.py runs/quality/adapters/deltanet OUT.json --texts runs/quality/held_out.npz \\
        --window 480 --length 8192                                                          # of benchmarks/quality

Reads held-out documents with up to 32 facts each, once as they are and once with each part of the memory off, and
writes means over documents with 95 % intervals (Student's t; shares of facts: Wilson's).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

import ahn
from ahn import AHNError, tiny
from ahn.demo.documents import Document, make_documents
from ahn.inspect import Trace, record, token_kinds, without
from ahn.measure.intervals import wilson
from ahn.tiny.corpus import held_out_text

STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 6: 2.57, 8: 2.36, 12: 2.20}
"""97.5 % quantiles of Student's t by number of documents."""


def main() -> None:
    arguments = parse(__doc__)
    model, tokenizer, documents = read_in(arguments)
    rows = []
    for document in documents:
        rows.append(one(model, tokenizer, document))
        print(document.name, json.dumps(rows[-1]["loss"]), file=sys.stderr, flush=True)
    write(arguments, documents, summary(rows))


def parse(description: str | None) -> argparse.Namespace:
    """The command line of this script, `inspect_routes.py` and `inspect_positions.py`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("memory", help="of ahn-tiny, or an adapter's folder")
    parser.add_argument("out", type=Path)
    parser.add_argument("--documents", type=int, default=8, choices=sorted(STUDENT))
    parser.add_argument("--texts", type=Path, help="token ids of held-out documents; default: ahn-tiny's modules")
    parser.add_argument("--window", type=int, default=224)
    parser.add_argument("--sinks", type=int, default=32)
    parser.add_argument("--length", type=int, default=4096, help="of a document in tokens, facts included")
    arguments = parser.parse_args()
    if not arguments.out.parent.is_dir():
        parser.error(f"there is no folder {arguments.out.parent} for the numbers; make it first")
    return arguments


def read_in(arguments: argparse.Namespace) -> tuple[PreTrainedModel, Any, list[Document]]:
    """The model with its memory in float32, its tokenizer, and documents with facts.

    Raises:
        AHNError: there is no such memory, or documents are too short for facts beyond the window.
    """
    shape = {"window": arguments.window, "sinks": arguments.sinks}
    adapter = arguments.memory if Path(arguments.memory).is_dir() else tiny.adapter_path(arguments.memory)
    model = ahn.from_pretrained(adapter, **shape, dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
    texts = held_out_text() if arguments.texts is None else decoded(tokenizer, arguments.texts)
    documents, why = make_documents(tokenizer, texts, arguments.documents, arguments.length, sum(shape.values()))
    if not all(document.facts_beyond(**shape) for document in documents):
        raise AHNError(f"A document has no fact beyond the window: {why or 'give a larger --length'}.")
    return model, tokenizer, documents


def write(arguments: argparse.Namespace, documents: Sequence[Document], found: dict[str, Any]) -> None:
    """The numbers, and what they are of, whole or not at all."""
    about = {"memory": Path(arguments.memory).name, "window": arguments.window, "sinks": arguments.sinks}
    about |= {"length": arguments.length, "documents": [document.name for document in documents]}
    part = arguments.out.with_name(arguments.out.name + ".part")
    part.write_text(json.dumps(about | found, indent=1) + "\n")
    part.replace(arguments.out)


def decoded(tokenizer: Any, file: Path) -> Sequence[tuple[str, str]]:
    """Names and texts of a study's held-out documents."""
    with np.load(file) as documents:
        return [(name, tokenizer.decode(documents[name].tolist())) for name in documents.files]


@torch.no_grad()
def one(model: PreTrainedModel, tokenizer: Any, document: Document) -> dict[str, Any]:
    """Everything about one document."""
    ids = torch.tensor(document.text.ids)
    kinds = token_kinds(tokenizer, document.text.ids)
    window, sinks = model.ahn_config.window, model.ahn_config.sinks
    for position in document.text.inserted:
        kinds[position] = "fact"
    facts = document.facts_beyond(window, sinks)
    answers = torch.tensor([fact.answer for fact in facts])
    counted = torch.tensor([kind != "fact" for kind in kinds])
    counted[: window + sinks] = False

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
    lasting = [pair for pair, long in lives(trace, window).items() if long]
    by_kind = {
        name: {entry.kind: [entry.strength.value, entry.update.value, entry.tokens] for entry in entries}
        for name, entries in (("all", trace.by_kind(kinds)), ("lasting", trace.by_kind(kinds, lasting)))
    }
    shares = {layer: reads.share for layer, reads in trace.reads.items()}
    return {
        "loss": losses, "recalled": recalls, "facts": len(facts), "gain": gains, "kinds": by_kind, "shares": shares,
        "lasting": len(lasting),
    }  # fmt: skip


def lives(trace: Trace, window: int) -> dict[tuple[int, int], bool]:
    """Whether each head's half-life is longer than the window."""
    return {(i, h): life > window for i, w in trace.writes.items() for h, life in enumerate(w.half_life().tolist())}


def parts(
    model: PreTrainedModel, trace: Trace, kinds: list[str]
) -> Iterator[tuple[str, contextlib.AbstractContextManager[None]]]:
    """Parts of the memory that are turned off one after the other."""
    for layer in trace.writes:
        yield f"no layer {layer}", without(model, [layer])
    heads = lives(trace, model.ahn_config.window)
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
            "facts_recalled": [right / asked, *(wilson(right, asked) if asked else ())],
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
