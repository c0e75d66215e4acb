"""Where the keys and queries of a Routed DeltaNet go: how many of its states are used, and whether a query looks where
its fact was written.

    python benchmarks/inspect_routes.py runs/quality/adapters/routed_deltanet OUT.json --window 480 --length 8192

Reads held-out documents with facts as `inspect_memory.py` does. A fact's value is written as a key at its statement,
and asked for by the query of the token before its answer; what the two have in common is the sum over states of the
product of their shares. With equal shares it is 1 / R, and 1 where both choose the same state alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from inspect_memory import parse, read_in, write
from torch import Tensor
from transformers import PreTrainedModel

from ahn import AHNError
from ahn.demo.documents import Document
from ahn.memory import RecurrentMemory
from ahn.ops.routes import mapped, shares


def main() -> None:
    arguments = parse(__doc__)
    model, _, documents = read_in(arguments)
    found = [one(model, document) for document in documents]
    layers = {
        layer: {name: torch.stack([row[layer][name] for row in found]).mean(0).tolist() for name in found[0][layer]}
        for layer in found[0]
    }
    write(arguments, documents, {"layers": layers})
    for layer, row in layers.items():
        print(layer, {name: [round(x, 2) for x in values] for name, values in row.items()})


@torch.no_grad()
def one(model: PreTrainedModel, document: Document) -> dict[int, dict[str, Tensor]]:
    """Of each layer, by head: states that keys use (the exponential of the entropy of their mean share), the largest
    share of a key and of a query (means), what a fact's query has in common with its key, and with any key."""
    ids = torch.tensor(document.text.ids)
    window, sinks = model.ahn_config.window, model.ahn_config.sinks
    with shares_of(model) as chosen:
        model(ids[None], use_cache=False)
    facts = document.facts_beyond(window, sinks)
    asks = torch.tensor([fact.answer - 1 for fact in facts]) - window - sinks
    keys = torch.tensor([fact.answer - fact.distance for fact in facts]) - sinks
    found = {}
    for layer, (written, read) in chosen.items():  # (H, m, R) each
        mean = written.mean(1)
        found[layer] = {
            "states used": (-(mean * mean.clamp_min(1e-9).log()).sum(-1)).exp(),
            "largest share, keys": written.amax(-1).mean(1),
            "largest share, queries": read.amax(-1).mean(1),
            "in common with the fact": (read[:, asks] * written[:, keys]).sum(-1).mean(1),
            "in common with any key": (read[:, asks] * mean[:, None]).sum(-1).mean(1),
        }
    return found


@contextlib.contextmanager
def shares_of(model: PreTrainedModel) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """Shares of keys and queries, by layer, of the forward inside the block, of one row."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    memories = {i: layer.ahn.fn for i, layer in enumerate(model.get_decoder().layers) if hasattr(layer, "ahn")}
    for index, memory in memories.items():
        if not isinstance(memory, RecurrentMemory) or memory.routes is None:
            raise AHNError(f"{memory.name} has one state a head; there is nothing to choose.")
        memory.scan = _noting(memory, index, found)
    try:
        yield found
    finally:
        for memory in memories.values():
            del memory.scan


def _noting(memory: RecurrentMemory, index: int, found: dict[int, tuple[Tensor, Tensor]]) -> Any:
    scan, routes = memory.scan, memory.routes
    assert routes is not None

    def noting(q: Tensor, k: Tensor, v: Tensor, gates: dict[str, Tensor], state: dict[str, Tensor]) -> Any:
        read = routes.queries(q)[1][0]
        written = shares(mapped(k, routes.key_map), routes.key_route)[0]
        found[index] = written.repeat_interleave(len(read) // len(written), dim=0), read
        return scan(q, k, v, gates, state)

    return noting


if __name__ == "__main__":
    main()
