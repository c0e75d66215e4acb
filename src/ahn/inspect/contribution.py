"""How much a memory's read adds to the residual stream, next to exact attention."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

TOKENS = 256  # at once: every head's part of the residual stream exists for these


@dataclasses.dataclass
class Contribution:
    """Norms after the base model's `o_proj`, float32: of all heads together (B, m), and of each head's part (B, H, m).

    Attributes:
        cosine: (B, m) between the memory's part and exact attention's.
    """

    memory: Tensor
    exact: Tensor
    cosine: Tensor
    head_memory: Tensor
    head_exact: Tensor


def contribution(weight: Tensor, exact: Tensor, read: Tensor) -> Contribution:
    """Send what each head gives through its columns of `o_proj`.

    Args:
        weight: (D, H · P) of the base model's `o_proj`.
        exact: (B, m, H, P) exact attention.
        read: (B, H, m, P) what the memory adds.
    """
    H, P = exact.shape[2:]
    heads = weight.detach().float().view(weight.shape[0], H, P)
    parts = []
    for e, r in zip(exact.split(TOKENS, dim=1), read.transpose(1, 2).split(TOKENS, dim=1), strict=True):
        exact_parts, memory_parts = (torch.einsum("bmhp,dhp->bhmd", x.float(), heads) for x in (e, r.to(e.dtype)))
        whole_exact, whole_memory = exact_parts.sum(1), memory_parts.sum(1)
        parts.append(
            (
                whole_memory.norm(dim=-1),
                whole_exact.norm(dim=-1),
                F.cosine_similarity(whole_memory, whole_exact, dim=-1),
                memory_parts.norm(dim=-1),
                exact_parts.norm(dim=-1),
            )
        )
    return Contribution(*(torch.cat(same, dim=-1) for same in zip(*parts, strict=True)))
