"""What a model is measured by: held-out loss beyond the lossless total, and fact recall by distance."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ahn.tiny.facts import FactText, FactWriter

from .model import token_losses
from .recipe import SEED, Recipe

Hidden = Callable[[Tensor], Tensor]
"""Token ids (B, L) to final hidden states (B, L, D)."""

BUCKETS = (0, 256, 1024, 2048, 4096, 8192)
FACTS = 32
BATCH = 8


def banded(ids: Tensor, window: int, sinks: int) -> Tensor:
    """What sinks + window sees of ids (B, L): (1, 1, L, L), True where visible."""
    query = torch.arange(ids.shape[1], device=ids.device)[:, None]
    key = query.T
    return ((key <= query) & ((key > query - window) | (key < sinks)))[None, None]


class Evaluation:
    """Fixed held-out chunks, the same at every call.

    Args:
        chunks: most chunks to measure the loss on, taken from the modules in turn.
    """

    def __init__(self, recipe: Recipe, folder: Path, facts: FactWriter, length: int, chunks: int) -> None:
        self.recipe, self.length = recipe, length
        modules = list(np.load(folder / "held_out.npz").values())
        pieces = [module[i : i + length] for i in range(0, max(map(len, modules)), length) for module in modules]
        whole = [piece.astype(np.int64) for piece in pieces if len(piece) == length]
        self.chunks = torch.from_numpy(np.stack(whole[:chunks]))
        count = min(FACTS, length // (4 * facts.cost))
        bare = length - count * facts.cost
        self.texts: list[FactText] = [
            facts.write(piece[:bare].tolist(), count, random.Random(f"{SEED}-{n}"))
            for n, piece in enumerate(whole[: min(chunks, 16)])
        ]
        self.values = facts.values

    @torch.no_grad()
    def __call__(self, name: str, hidden: Hidden, head: nn.Linear) -> dict[str, float]:
        """The loss in nats beyond the lossless total (`loss_<name>`) and shares of facts recalled, by distance."""
        device = head.weight.device
        losses = []
        for ids in self.chunks.to(device).split(BATCH):
            losses.append(token_losses(head, hidden(ids)[:, :-1], ids[:, 1:])[:, self.recipe.lossless :])
        result = {f"loss_{name}": round(torch.cat(losses).mean().item(), 4)}
        return result | {f"recall_{name}_{key}": share for key, share in self._recall(hidden, head).items()}

    def _recall(self, hidden: Hidden, head: nn.Linear) -> dict[str, float]:
        right: dict[int, list[bool]] = {}
        for first in range(0, len(self.texts), BATCH):
            texts = self.texts[first : first + BATCH]
            states = hidden(torch.tensor([text.ids for text in texts], device=head.weight.device))
            for row, text in enumerate(texts):
                logits = head(states[row, [fact.answer - 1 for fact in text.facts]])
                for fact, guess in zip(text.facts, logits.argmax(-1).tolist(), strict=True):
                    bucket = max(low for low in BUCKETS if low < fact.distance)
                    right.setdefault(bucket, []).append(guess == self.values[fact.value])
        return {f"from{low}": round(float(np.mean(right[low])), 3) for low in sorted(right)}
