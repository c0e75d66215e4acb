"""The guard of interpreted kernels sees what no comparison of results would."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.usefixtures("triton")
@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted where there is no GPU")
def test_reads_and_writes_outside_of_tensors_are_found() -> None:
    import triton
    import triton.language as tl

    @triton.jit
    def copy(x, out, shift, N: tl.constexpr, WRITES: tl.constexpr):
        n = tl.arange(0, N)
        numbers = tl.load(x + n + (0 if WRITES else shift))
        tl.store(out + n + (shift if WRITES else 0), numbers, mask=n + shift < N)

    x, out = torch.arange(8.0), torch.zeros(8)
    copy[(1,)](x, out, 0, N=8, WRITES=True)
    assert torch.equal(out, x)
    for shift, writes, what in ((-3, False, "reads"), (1 << 20, False, "reads"), (-1, True, "writes")):
        with pytest.raises(Exception, match=f"{what} outside of its tensors"):
            copy[(1,)](x, out, shift, N=8, WRITES=writes)
