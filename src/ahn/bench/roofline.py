"""The work that no implementation can avoid: bytes through the device's memory, and FLOPs.

FLOPs follow from `ahn.cost`, which counts a whole prompt as the paper does: a prefill is that count with one row of
logits, a step at position L the difference between L + 1 tokens and L. Bytes are counted once for each tensor that a
perfect implementation reads or writes; activations are left out.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import PreTrainedModel

from ahn.bench.ceilings import Ceilings
from ahn.config import AHNConfig
from ahn.costs import Usage, cost
from ahn.measure.clock import bytes_of
from ahn.shape import ModelShape


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs by what they are for: weights, scores and values, the memory's matrices and state, logits."""

    linear: int
    attention: int
    memory: int
    head: int

    def __add__(self, other: Flops) -> Flops:
        return Flops(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def __mul__(self, factor: int) -> Flops:
        return Flops(*(factor * part for part in dataclasses.astuple(self)))

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class Work:
    """The least work of something that was timed."""

    bytes: int
    flops: Flops
    parts: dict[str, int] = dataclasses.field(default_factory=dict)
    """What the bytes, or the FLOPs of several passes, consist of."""

    def limit(self, ceilings: Ceilings) -> float:
        """Seconds below which this machine cannot be: moving or arithmetic, whichever takes longer."""
        return max(self.bytes / ceilings.bytes_per_second, self.flops.total / ceilings.flops_per_second)

    def report(self, ceilings: Ceilings, seconds: float) -> dict[str, Any]:
        """The roofline columns of a row that took so many seconds."""
        limit = self.limit(ceilings)
        moving = self.bytes / ceilings.bytes_per_second
        return {
            "bytes": self.bytes,
            "flops": self.flops.total,
            "flops_by_part": dataclasses.asdict(self.flops),
            "parts": self.parts,
            "limited_by": "bytes" if moving >= limit else "flops",
            "limit_s": limit,
            "share": limit / seconds,
            "bytes_per_second": self.bytes / seconds,
            "flops_per_second": self.flops.total / seconds,
        }


def prefill(model: PreTrainedModel, config: AHNConfig | None, length: int, batch: int) -> Work:
    """Read `batch` prompts of `length` tokens and give one row of logits each."""
    flops = dataclasses.replace(_prompt(model, config, length), head=_logits(model, 1))
    usage = _usage(model, config, length)
    parts = {"weights": weights_bytes(model, batch * length), "cache": batch * usage.cache_bytes}
    return Work(sum(parts.values()), flops * batch, parts)


def step(model: PreTrainedModel, config: AHNConfig | None, context: int, batch: int) -> Work:
    """Write and read one token in each of `batch` conversations that have `context` tokens behind them."""
    after, before = _prompt(model, config, context + 1), _prompt(model, config, context)
    flops = dataclasses.replace(after + before * -1, head=_logits(model, 1))
    usage = _usage(model, config, context)
    kept = context  # of which gates wait; those of quantized tokens have room from the first one on
    if config is not None:
        kept = min(context, config.lossless) + (config.quantized if context > config.lossless else 0)
    parts = {
        "weights": weights_bytes(model, batch),
        "keys and values": batch * (usage.kv_bytes + usage.quantized_bytes),
        "states": batch * 2 * usage.state_bytes,  # read and written
        "gates": batch * 2 * usage.gate_bytes // kept,  # of the token that enters and of the one that leaves
    }
    return Work(sum(parts.values()), flops * batch, parts)


def distillation(
    model: PreTrainedModel, config: AHNConfig, length: int, batch: int, positions: int, recomputed: bool
) -> Work:
    """One step of self-distillation without the optimiser's: the base's weights are frozen.

    A product with a frozen weight has one product in its backward pass (the input's gradient); attention and the
    memory have two for each of their forward products. What a fused attention computes again is not counted.

    Args:
        positions: rows in all of the batch whose logits the loss compares.
        recomputed: gradient checkpointing runs the student's layers a second time.
    """
    teacher, student = _prompt(model, None, length) * batch, _prompt(model, config, length) * batch
    backward = Flops(student.linear, 2 * student.attention, 2 * student.memory, 0)
    head = Flops(0, 0, 0, _logits(model, positions))
    passes = {"teacher forward": teacher + head, "student forward": student + head, "backward": backward + head}
    if recomputed:
        passes["recomputed forward"] = student
    total = Flops(0, 0, 0, 0)
    for flops in passes.values():
        total = total + flops
    parts = {name: flops.total for name, flops in passes.items()}
    return Work(len(passes) * weights_bytes(model, batch * length), total, parts)


def weights_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Bytes of the weights that one pass over so many tokens reads, each once.

    Of the input embedding only rows are read, unless it is the output's matrix too; of experts, those that are visited.
    """
    text = model.config.get_text_config(decoder=True)
    total = bytes_of(model.parameters())
    head = model.get_output_embeddings()
    embedding = model.get_input_embeddings().weight
    if head is None or head.weight is not embedding:
        total -= embedding.nbytes
    experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None)
    if experts:
        idle = 1 - min(1.0, tokens * text.num_experts_per_tok / experts)
        total -= int(idle * bytes_of(p for name, p in model.named_parameters() if ".experts." in name))
    return total


def _prompt(model: PreTrainedModel, config: AHNConfig | None, length: int) -> Flops:
    """All layers over one prompt; no logits."""
    hf_config = model.config
    shape = ModelShape.from_config(hf_config)
    found = cost(hf_config, config or AHNConfig("window_only"), length)
    per_layer = 4 * length * shape.hidden_size * shape.head_dim * (shape.heads + shape.kv_heads)
    projections = shape.layers * per_layer
    vocabulary = 4 * length * shape.hidden_size * shape.vocab_size  # as the paper counts it, which is not needed
    linear = projections + found.full.model_flops - found.full.mixer_flops - vocabulary
    if config is None:
        return Flops(linear, found.full.mixer_flops - projections, 0, 0)
    forgetting = config.replace(memory="window_only", router=False, q_proj=False)
    exact = cost(hf_config, forgetting, length).ahn.mixer_flops
    return Flops(linear, exact - projections, found.ahn.mixer_flops - exact, 0)


def _logits(model: PreTrainedModel, rows: int) -> int:
    shape = ModelShape.from_config(model.config)
    return 2 * rows * shape.hidden_size * shape.vocab_size


def _usage(model: PreTrainedModel, config: AHNConfig | None, length: int) -> Usage:
    dtype: torch.dtype = model.dtype
    found = cost(model.config, config or AHNConfig("window_only"), length, dtype)
    return found.full if config is None else found.ahn
