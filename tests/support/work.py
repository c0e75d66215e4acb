"""What torch is asked to do: calls of operators, and what they make."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class Work(TorchDispatchMode):
    """Counts calls that make tensors of their own; on a GPU each is a kernel or more.

    Attributes:
        calls: by the operator's name.
        made: by type and shape, the tensors that were made.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.made: Counter[tuple[torch.dtype, torch.Size]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        if not func.is_view:
            self.calls[func.name()] += 1
            for x in tree_flatten(result)[0]:
                if isinstance(x, Tensor):
                    self.made[x.dtype, x.shape] += 1
        return result

    def of_size(self, numbers: int, dtype: torch.dtype) -> int:
        """How many tensors of this type with so many numbers or more were made."""
        return sum(count for (of, shape), count in self.made.items() if of == dtype and shape.numel() >= numbers)
