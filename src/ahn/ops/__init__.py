"""The recurrences that all memories are made of.

`scan` writes and reads many tokens, `step` one. Beside every kernel stands the same in plain torch, which tests compare
it with.
"""

from ahn.ops.backend import BACKENDS, has_triton, use_backend
from ahn.ops.scan import decay_rule, delta_rule

__all__ = ["BACKENDS", "decay_rule", "delta_rule", "has_triton", "use_backend"]
