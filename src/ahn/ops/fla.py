"""The recurrences on flash-linear-attention's Triton kernels (package `fla-core`), CUDA only.

fla wants (B, N, H, P) and low-precision q, k, v; states stay float32. Shapes here are those of `reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _to_fla(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).transpose(1, 2).contiguous()


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """See `reference.delta_rule`."""
    dtype = torch.bfloat16
    arguments = [_to_fla(x, dtype) for x in (q, k, v)]
    beta = beta.transpose(1, 2).contiguous()
    if decay is None:
        from fla.ops.delta_rule import chunk_delta_rule

        o, state = chunk_delta_rule(
            *arguments, beta=beta.to(dtype), scale=1.0, initial_state=state, output_final_state=True
        )
    else:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        g = decay.transpose(1, 2).contiguous()
        o, state = chunk_gated_delta_rule(
            *arguments, g=g, beta=beta, scale=1.0, initial_state=state, output_final_state=True
        )
    return o.transpose(1, 2).float(), state


def decay_rule(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference.decay_rule`."""
    from fla.ops.simple_gla import chunk_simple_gla

    arguments = [_to_fla(x, torch.bfloat16) for x in (q, k, v)]
    g = decay.transpose(1, 2).contiguous()
    o, state = chunk_simple_gla(*arguments, g=g, scale=1.0, initial_state=state, output_final_state=True)
    return o.transpose(1, 2).float(), state
