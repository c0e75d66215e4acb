"""One score a token for all heads of all layers: learned from the heads that find, told by one layer's input.

In a forward over a chunk, a layer can choose only by what layers up to it say, and what all layers are to see must be
chosen before the first of them looks. So a scorer of an early layer's input learns what the heads that find would say
together: the mean of their scores' probabilities. Those come from scorers that are there; reading with sinks and window
is enough, and no full attention is needed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ahn.memory.retained_tokens import Scorer

from .looks import BLOCK, Reader, blocks_of


def lessons(reader: Reader, ids: Tensor, layers: Collection[int], finders: int) -> tuple[dict[int, Tensor], Tensor]:
    """Of a text ids (n,): by layer the input (n - S, D), and what is to be told of it, (n - S,) from 0 to 1.

    Args:
        layers: whose inputs are wanted.
        finders: heads that teach, the first of the reader's order.
    """
    heads, inputs, wanted = reader.order[:finders], {}, []
    last = max(*layers, *(layer for layer, _ in heads))
    for number, x, _, _ in reader.layers(ids):
        if number in layers:
            inputs[number] = x[reader.sinks :]
        if own := [head for layer, head in heads if layer == number]:
            wanted.append(reader.scored(reader.scorers[number], x)[own, reader.sinks :].sigmoid())
        if number == last:
            break
    return inputs, torch.cat(wanted).mean(0)


def learn(inputs: Tensor, wanted: Tensor, steps: int = 600, batch: int = 4096, lr: float = 3e-3) -> Scorer:
    """A scorer of inputs (N, D) whose probabilities are those wanted (N,)."""
    scorer = Scorer(inputs.shape[1], 1).to(inputs.device)
    with torch.no_grad():
        scorer.direct.weight.zero_()
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for _ in range(steps):
        some = torch.randint(0, len(inputs), (batch,), device=inputs.device)
        loss = F.binary_cross_entropy_with_logits(scorer(inputs[some].float()[None])[0, 0], wanted[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return scorer.requires_grad_(False)


def learned(
    reader: Reader, texts: Iterable[Tensor], layers: Sequence[int], finders: int, **learning: Any
) -> dict[int, Scorer]:
    """By layer a scorer of its input, taught by texts (n,); `learning` goes to `learn`."""
    every = [lessons(reader, ids, layers, finders) for ids in texts]
    wanted = torch.cat([some for _, some in every])
    return {number: learn(torch.cat([inputs[number] for inputs, _ in every]), wanted, **learning) for number in layers}


def ranks(ratings: Tensor, fact: slice) -> Tensor:
    """(H,) how many blocks are rated above the worst of those that a fact stands in, of ratings (H, n) of tokens.

    Args:
        fact: where among the n tokens it is.
    """
    blocks = blocks_of(ratings, "blocks")
    worst = blocks[:, fact.start // BLOCK : (fact.stop - 1) // BLOCK + 1].amin(1, keepdim=True)
    return (blocks > worst).sum(1)
