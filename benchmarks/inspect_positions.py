"""What a memory makes of the same text farther along: facts recalled, and loss won, if its first position is not 0.

    python benchmarks/inspect_positions.py routed_deltanet OUT.json --documents 4

Rotary positions say how far two tokens lie apart, not where: whoever looks at distances alone gives the same numbers
everywhere. Reads held-out documents with facts as `inspect_memory.py` does.
"""

from __future__ import annotations

import torch
from inspect_memory import parse, read_in, write
from torch import Tensor
from transformers import PreTrainedModel

from ahn.demo.documents import Document
from ahn.inspect import without
from ahn.measure.intervals import wilson

STARTS = (0, 2048, 4096, 8192, 16384, 32768)


def main() -> None:
    arguments = parse(__doc__)
    model, _, documents = read_in(arguments)
    rows = []
    for start in STARTS:
        found = [one(model, document, start) for document in documents]
        asked, recalled = (sum(row[name] for row in found) for name in ("asked", "recalled"))
        low, high = wilson(recalled, asked)
        gain = sum(row["won"] for row in found) / len(found)
        rows.append({"start": start, "asked": asked, "recalled": recalled, "interval": [low, high], "won": gain})
        share = f"{recalled / asked:.1%} of the facts ({low:.1%} to {high:.1%})"
        print(f"from position {start:6}: {share}, {1e3 * gain:+.1f} mnat a token won", flush=True)
    write(arguments, documents, {"rows": rows})


@torch.no_grad()
def one(model: PreTrainedModel, document: Document, start: int) -> dict[str, float]:
    """Facts beyond the window that are asked for and recalled, and nats a token of text that the memory wins there."""
    ids = torch.tensor(document.text.ids)
    window, sinks = model.ahn_config.window, model.ahn_config.sinks
    answers = torch.tensor([fact.answer for fact in document.facts_beyond(window, sinks)])
    counted = torch.ones(len(ids), dtype=torch.bool)
    counted[document.text.inserted] = False
    counted[: window + sinks] = False
    positions = torch.arange(start, start + len(ids))[None]

    def read() -> tuple[Tensor, Tensor]:
        logits = model(ids[None], position_ids=positions, use_cache=False).logits[0]
        losses = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")
        return losses[counted[1:]].mean(), logits[answers - 1].argmax(-1) == ids[answers]

    loss, right = read()
    with without(model):
        bare, _ = read()
    return {"asked": len(answers), "recalled": int(right.sum()), "won": float(bare - loss)}


if __name__ == "__main__":
    main()
