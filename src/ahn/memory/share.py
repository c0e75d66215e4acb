"""Tensor parallelism: each of several processes holds some heads of every layer, and of the memory the same heads.

transformers divides the base by its own plan (`from_pretrained(…, tp_plan="auto")` under torchrun). What this package
adds has its heads in the first dimension of each parameter, and heads know nothing of each other but in some memories'
norms; so a process makes the memory of its heads alone, and everything else goes on as if these were all.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ahn.errors import AHNError
from ahn.shape import ModelShape

_STYLES = {"q_proj": "colwise", "k_proj": "colwise", "v_proj": "colwise", "o_proj": "rowwise"}
"""What a plan must say of the attention, so that each process attends with its own heads."""


@dataclasses.dataclass(frozen=True)
class Share:
    """Which heads this process holds: the `rank`-th of `ranks` equal parts.

    Attributes:
        mesh: the processes that hold the parts; None where one holds all.
    """

    rank: int = 0
    ranks: int = 1
    mesh: DeviceMesh | None = None

    @classmethod
    def of(cls, model: Any, attention: nn.Module, shape: ModelShape) -> Share:
        """How transformers divided a model between processes.

        Args:
            attention: one of its attention modules.

        Raises:
            AHNError: by a plan that leaves heads in parts or all of them everywhere, or between too many processes.
        """
        weight = getattr(attention.o_proj, "weight", None)
        if not isinstance(weight, DTensor) or not weight.placements[0].is_shard(dim=1):
            return WHOLE  # what FSDP divides comes together again before it is used
        styles = {name.rpartition(".")[2]: style for name, style in model.tp_plan.items() if ".self_attn." in name}
        if any(styles.get(name) != style for name, style in _STYLES.items()):
            said = ", ".join(f"{name} {style}" for name, style in styles.items())
            raise AHNError(
                f"The tensor-parallel plan of {type(model).__name__} leaves no process heads of its own ({said}): "
                "load it on one GPU or over several with device_map."
            )
        mesh = weight.device_mesh
        if shape.kv_heads % mesh.size():
            raise AHNError(
                f"{mesh.size()} processes cannot share {shape.kv_heads} key heads evenly: a memory needs a number "
                "of processes that divides them."
            )
        return cls(mesh.get_local_rank(), mesh.size(), mesh)

    @property
    def parallel(self) -> bool:
        """Whether other processes hold other heads."""
        return self.ranks > 1

    def of_shape(self, shape: ModelShape) -> ModelShape:
        """The model's sizes as this process sees them."""
        return dataclasses.replace(shape, heads=shape.heads // self.ranks, kv_heads=shape.kv_heads // self.ranks)

    def of_parameter(self, whole: Tensor, own: torch.Size) -> Tensor:
        """This process's part of a parameter: its heads, or all of what no head has for itself (`own` is its shape)."""
        return whole if whole.shape == own else whole.narrow(0, self.rank * own[0], own[0])

    def mean(self, x: Tensor) -> Tensor:
        """The mean over all processes of what each has found for its own heads."""
        if self.mesh is None:
            return x
        total = x.contiguous()
        dist.all_reduce(total, group=self.mesh.get_group())
        return total / self.ranks

    def check_whole(self, what: str, instead: str) -> None:
        """Raises AHNError if this process holds a part of the heads and `what` needs all of them."""
        if self.parallel:
            raise AHNError(
                f"{what} needs all heads of a model, of which this process holds 1/{self.ranks} (tensor parallelism): "
                f"{instead}."
            )


WHOLE = Share()
