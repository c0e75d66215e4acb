"""Programmatic dependent launch: on Hopper a kernel of ours may start while the one before it still works.

A kernel that is launched so says at its start that its successor may come, fetches what no such kernel writes
(weights, and what an ordinary kernel wrote: that one had ended before any of these began), and waits for its
predecessor before it reads or writes anything else. Since every one of them waits, whatever ran before the predecessor
has ended as well. Other memory it may only ask the cache for, see `prefetch`.

Kernels that torch.compile makes must not be launched so beside ours: inductor leaves the wait out where its own last
kernel wrote nothing that the next one reads, and the end of such a kernel says nothing of those before it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # before Triton 3.4
    gdc_launch_dependents = gdc_wait = None


def options(x: Tensor) -> dict[str, Any]:
    """What a launch on this tensor's device says of it: `PDL` for the kernel, and what the launcher needs for it."""
    known = x.is_cuda and torch.version.hip is None and gdc_wait is not None
    if known and torch.cuda.get_device_capability(x.device) >= (9, 0):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


@triton.jit
def announce(PDL: tl.constexpr):
    """The next kernel may come as soon as every program of this one has begun."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait(PDL: tl.constexpr):
    """Until everything launched earlier has ended."""
    if PDL:
        gdc_wait()


@triton.jit
def prefetch(lines, PDL: tl.constexpr):
    """Bring the cache lines at these addresses into L2, before the wait, from where they are read after it.

    All multiprocessors share that cache, writes pass through it too, and nothing is given back: so it does no harm if
    someone still writes there. The addresses must be valid.
    """
    if PDL:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [lines.to(tl.int64)], tl.int32, is_pure=False, pack=1
        )
