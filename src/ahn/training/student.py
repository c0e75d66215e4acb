"""Teacher and student as one module with one forward: what DDP and FSDP wrap, so that their hooks see both passes.

The losses run inside this forward. FSDP2 gathers the weights that belong to no decoder layer (embedding, last norm,
head) once when it begins and shards them again after the backward pass; every layer is gathered as it is called.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, Self

from torch import Tensor, nn
from transformers import PreTrainedModel

from ahn.errors import AHNError
from ahn.model.adapter import adapter_parameters
from ahn.training.distillation import Distillation, check_head, distillation_loss
from ahn.training.looks import Looks, Teachers, counted_tokens, looks_loss
from ahn.training.losses import ATTENTION, IGNORED, next_tokens, valid_positions
from ahn.wrappers import decoder_of

UNUSED = ".fn.D", ".key_basis.weight", ".key_basis.deviations"
"""A parameter of published Gated DeltaNet checkpoints that nothing reads, and what is calibrated, not trained. DDP
would wait for their gradients for ever."""


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """One micro-batch. A class of its own, because DDP and FSDP move tensors that they find in arguments to the GPU."""

    batch: dict[str, Tensor]
    """On the CPU, longer than window + sinks, so that every parameter of the memory is used."""
    window: int
    sinks: int
    count: int
    """Positions that count in all micro-batches of all ranks of this step."""
    start: int = 0
    """Position of the first token."""


class Student(nn.Module):
    """A model with an AHN attached, in training: only the memory's float32 parameters take gradients.

    Args:
        model: with an AHN attached; the base in any precision.
        loss: "kl", "ce", "distill" or a sum, or "attention" for a memory of tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        loss: str = "kl",
        use_normalized_l2: bool = False,
        teachers: Teachers = (),
    ) -> None:
        super().__init__()
        self.model = model
        self.loss, self.use_normalized_l2, self.teachers = loss, use_normalized_l2, teachers
        self._head_checked = False
        model.requires_grad_(False)
        memory = adapter_parameters(model)
        if all(name.endswith(UNUSED) for name in memory):
            raise AHNError(f"The memory {model.ahn_config.memory!r} has no parameters to train.")
        for name, parameter in memory.items():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(not name.endswith(UNUSED))

    def counting(self, batch: dict[str, Tensor], window: int, sinks: int) -> int:
        """Positions of a batch that count in the loss."""
        labels, mask = batch["labels"], batch["attention_mask"]
        if self.loss == ATTENTION:
            return int(counted_tokens(labels.masked_fill(mask == 0, IGNORED), mask, window, sinks).sum())
        return int(valid_positions(next_tokens(labels), window + sinks, mask).sum())

    def forward(self, part: MicroBatch) -> Distillation | Looks:
        """The share of this micro-batch in the step's losses; see `distillation_loss` and `looks_loss`."""
        if self.loss == ATTENTION:
            drawn = part.window, part.sinks, part.count, part.start
            return looks_loss(self.model, part.batch, *drawn, self.teachers)
        if not self._head_checked:  # here, where a sharded model's weights are whole
            check_head(self.model)
            self._head_checked = True
        return distillation_loss(
            self.model,
            part.batch,
            part.window,
            part.sinks,
            self.loss,
            self.use_normalized_l2,
            count=part.count,
            start=part.start,
        )

    def train(self, mode: bool = True) -> Self:
        """Never train mode within a layer: dropout would make teacher and student differ by chance.

        The layers themselves must know, for they recompute their activations in train mode only.
        """
        super().train(False)
        self.training = mode
        for layer in self.layers():
            layer.training = mode
        return self

    def layers(self) -> Iterator[nn.Module]:
        """The decoder's layers."""
        yield from decoder_of(self.model).layers

    def memory(self) -> dict[str, nn.Parameter]:
        """The memory's parameters by name; sharded ones under FSDP."""
        return adapter_parameters(self.model)

    def activation_checkpointing_enable(self, **arguments: Any) -> None:
        """Recompute activations of the student's layers; the teacher, without a graph, keeps none anyway."""
        self.model.activation_checkpointing_enable(**arguments)

    def tie_weights(self) -> None:
        """FSDP asks for it after it has replaced weights."""
        self.model.tie_weights()

    @property
    def _no_split_modules(self) -> list[str]:
        """The classes of decoder layers, which FSDP shards one by one."""
        return sorted({type(layer).__name__ for layer in self.layers()})
