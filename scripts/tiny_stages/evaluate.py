"""What the base model is measured by: held-out loss and fact recall, with full attention and with sinks + window."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen3ForCausalLM

from ahn.tiny.facts import FactText, FactWriter

from .model import hidden_states, token_losses
from .recipe import SEED, Recipe

BUCKETS = (0, 256, 1024, 2048, 4096, 8192)
FACTS = 32
BATCH = 8


def banded(length: int, window: int, sinks: int, device: torch.device) -> Tensor:
    """What sinks + window sees, `window` counting the sinks: (1, 1, L, L), True where visible."""
    query = torch.arange(length, device=device)[:, None]
    key = torch.arange(length, device=device)[None]
    return ((key <= query) & ((key > query - (window - sinks)) | (key < sinks)))[None, None]


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
    def __call__(self, model: Qwen3ForCausalLM) -> dict[str, float]:
        """Losses in nats beyond the window and shares of facts recalled, by the attention's budget."""
        device = model.device
        window, sinks = self.recipe.windows[0], self.recipe.sinks
        result: dict[str, float] = {}
        for name, mask in (("full", None), (f"window{window}", banded(self.length, window, sinks, device))):
            losses = torch.cat([self._losses(model, ids.to(device), mask) for ids in self.chunks.split(BATCH)])
            result[f"loss_{name}"] = round(losses[:, window:].mean().item(), 4)
            result |= {f"recall_{name}_{key}": share for key, share in self._recall(model, mask).items()}
        return result

    def _losses(self, model: Qwen3ForCausalLM, ids: Tensor, mask: Tensor | None) -> Tensor:
        hidden = hidden_states(model, ids, mask)
        return token_losses(model.lm_head, hidden[:, :-1], ids[:, 1:])

    def _recall(self, model: Qwen3ForCausalLM, mask: Tensor | None) -> dict[str, float]:
        right: dict[int, list[bool]] = {}
        for first in range(0, len(self.texts), BATCH):
            texts = self.texts[first : first + BATCH]
            hidden = hidden_states(model, torch.tensor([text.ids for text in texts], device=model.device), mask)
            for row, text in enumerate(texts):
                logits = model.lm_head(hidden[row, [fact.answer - 1 for fact in text.facts]])
                for fact, guess in zip(text.facts, logits.argmax(-1).tolist(), strict=True):
                    bucket = max(low for low in BUCKETS if low < fact.distance)
                    right.setdefault(bucket, []).append(guess == self.values[fact.value])
        return {f"from{low}": round(float(np.mean(right[low])), 3) for low in sorted(right)}
