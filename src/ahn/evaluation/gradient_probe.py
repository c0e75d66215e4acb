"""Which forgotten tokens matter: gradients of the distillation loss (arXiv 2510.07318, figure 5).

The loss compares the model with its memory to itself with full attention, over the last tokens of a text. A token that
had left the window by then can change it only through what was remembered of it: a long gradient at its embedding says
that remembering it otherwise would help, a short one that it is remembered well enough, or does not matter.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ahn.config import AHNConfig
from ahn.errors import AHNError
from ahn.evaluation.documents import LongDocument
from ahn.evaluation.methods import Evaluated
from ahn.evaluation.results import conclude, open_folder
from ahn.training.distillation import distillation_loss
from ahn.training.losses import IGNORED

LENGTH = 1024
"""Tokens of a text, where nothing else is said: a picture of more is hard to read."""
ANSWER = 64
"""Tokens at its end whose loss counts."""

Region = Literal["sink", "remembered", "window"]


@dataclasses.dataclass(frozen=True)
class Probe:
    """Gradients at the tokens of a text.

    Attributes:
        norms: L2 norm of the loss's gradient at each token's embedding.
        regions: where each token is when the first one that counts is predicted: "remembered" ones have left the
            window for the memory.
    """

    norms: list[float]
    regions: list[Region]
    loss: float


def probe(model: PreTrainedModel, ids: Sequence[int], answer: int = ANSWER, loss: str = "kl") -> Probe:
    """Gradient norms of a text of L tokens. Window and sinks are the model's.

    Args:
        model: with an AHN; its parameters and their flags stay as they are.
        answer: tokens at the end of the text whose loss counts.
        loss: as in `distillation_loss`.
    """
    config: AHNConfig | None = getattr(model, "ahn_config", None)
    if config is None:
        raise AHNError("The gradient probe needs a model with a memory: --method full has none.")
    # Position `first` is the first to read: it predicts the first token that counts.
    first = len(ids) - answer - 1
    if answer < 1 or first < config.lossless:
        raise AHNError(
            f"The gradient probe needs a text of more than sinks + window + answer = {config.lossless} + {answer} "
            f"tokens, got {len(ids)}: give a longer text, or a smaller --window."
        )
    tokens = torch.tensor([list(ids)])
    labels = tokens.clone()
    labels[:, : first + 1] = IGNORED
    batch = {"input_ids": tokens, "labels": labels}
    with _frozen(model), _embeddings(model) as embeddings, torch.enable_grad():
        found = distillation_loss(model, batch, config.window, config.sinks, loss)
        found.loss.backward()
    gradient = embeddings[-1].grad
    assert gradient is not None
    regions = [_region(position, first, config) for position in range(len(ids))]
    return Probe(gradient[0].float().norm(dim=-1).tolist(), regions, float(found.loss.detach()))


def run(
    evaluated: Evaluated, document: LongDocument, out: Path, answer: int = ANSWER, loss: str = "kl"
) -> dict[str, Any]:
    """Probe a document and write a result folder; one that is there already is not made again.

    Args:
        document: of a length that backpropagation has memory for.
    """
    folder = open_folder(out, "gradients", evaluated, document, {"answer": answer, "loss": loss})
    if folder.result is not None:
        return folder.result
    found = probe(evaluated.model, document.ids, answer, loss)
    texts = evaluated.tokenizer.batch_decode([[token] for token in document.ids])
    rows = [
        {"token": text, "norm": norm, "region": region}
        for text, norm, region in zip(texts, found.norms, found.regions, strict=True)
    ]
    remembered = [norm for norm, region in zip(found.norms, found.regions, strict=True) if region == "remembered"]
    figures = {"tokens": len(rows), "remembered": len(remembered), "answer": answer, "loss": found.loss}
    figures["mean_norm"] = sum(remembered) / len(remembered)
    return conclude(folder, {"gradients.jsonl": rows}, figures)


def _region(position: int, first: int, config: AHNConfig) -> Region:
    if position < config.sinks:
        return "sink"
    return "remembered" if position <= first - config.window else "window"


@contextlib.contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block no parameter asks for a gradient."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


@contextlib.contextmanager
def _embeddings(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Collects the embeddings (1, L, D) of every forward that can be differentiated, which keep their gradients."""
    found: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        if torch.is_grad_enabled():
            found.append(output.requires_grad_())

    handle = model.get_input_embeddings().register_forward_hook(keep)
    try:
        yield found
    finally:
        handle.remove()
