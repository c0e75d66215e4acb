"""What tensor parallelism has divided, as a captured step has it: plain modules over what lies in this process.

transformers puts a forward on each module, which wraps and unwraps tensors as it runs: Python that knows its module, so
that no layer could share compiled code with another. Here three kinds of module do the same.
"""

import re
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ahn import private
from ahn.memory.share import Share


class SummedLinear(nn.Linear):
    """A product with a part of the inputs in each process, summed over all of them."""

    group: dist.ProcessGroup
    group_name: str

    def forward(self, input: Tensor) -> Tensor:
        out = private.summed(F.linear(input, self.weight), self.group_name)
        return out if self.bias is None else out + self.bias


class GatheredLinear(nn.Linear):
    """A product that gives each process a part of the outputs; all of them get all."""

    group: dist.ProcessGroup
    group_name: str

    def forward(self, input: Tensor) -> Tensor:
        out = F.linear(input, self.weight, self.bias)
        parts = [torch.empty_like(out) for _ in range(self.group.size())]
        dist.all_gather(parts, out, group=self.group)
        return torch.cat(parts, dim=-1)


class SummedEmbedding(nn.Embedding):
    """The vectors of a part of the tokens in each process; all of them get all."""

    group: dist.ProcessGroup
    group_name: str

    def forward(self, input: Tensor) -> Tensor:
        own = input - self.group.rank() * len(self.weight)
        here = (own >= 0) & (own < len(self.weight))
        return private.summed(F.embedding(own.where(here, 0), self.weight) * here.unsqueeze(-1), self.group_name)


_KINDS: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {
    "colwise": (nn.Linear, nn.Linear),
    "rowwise": (nn.Linear, SummedLinear),
    "colwise_gather_output": (nn.Linear, GatheredLinear),
    "colwise_rep": (nn.Linear, GatheredLinear),
    "embedding_rowwise": (nn.Embedding, SummedEmbedding),
}
"""By the style of a plan, what it divides and what does the same here."""
_WHOLE = ("replicated_with_grad_allreduce",)
"""What every process has whole, and what differs only where there are gradients."""


def have_parts(model: PreTrainedModel) -> bool:
    """Whether all that transformers has divided is known here; so is a model that it has not divided."""
    return not model._ahn.share.parallel or all(_known(*found) for found in _styles(model))


def parts(model: PreTrainedModel) -> dict[int, nn.Module]:
    """A module for each that transformers has divided, by the id of the latter."""
    share: Share = model._ahn.share
    return {id(module): _part(module, style, share) for module, style in _styles(model)} if share.parallel else {}


def _styles(model: PreTrainedModel) -> list[tuple[nn.Module, str]]:
    """The modules that the plan names, each with what it says of it."""
    plan = model.tp_plan
    named = ((re.sub(r"\.\d+(?=\.|$)", ".*", name), module) for name, module in model.named_modules())
    return [(module, plan[name]) for name, module in named if name in plan]


def _known(module: nn.Module, style: str) -> bool:
    if style in _WHOLE:
        return True
    even = all(len(x) % x.device_mesh.size() == 0 for x in module.parameters() if isinstance(x, DTensor))
    return style in _KINDS and type(module) is _KINDS[style][0] and even


def _part(module: nn.Module, style: str, share: Share) -> nn.Module:
    kind = type(module) if style in _WHOLE else _KINDS[style][1]
    part: Any = object.__new__(kind)
    private.copy_own(module, part)
    local = {name: x.to_local() if isinstance(x, DTensor) else x for name, x in module.named_parameters()}
    private.set_parameters(part, {name: nn.Parameter(x.detach(), requires_grad=False) for name, x in local.items()})
    if share.mesh is not None and "group" in kind.__annotations__:
        part.group = share.mesh.get_group()
        part.group_name = part.group.group_name  # which compiled code can read
    return cast(nn.Module, part)
