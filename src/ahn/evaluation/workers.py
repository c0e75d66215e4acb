"""Which part of the work this process does, when several are started by `accelerate launch` or `torchrun`."""

import dataclasses
import os
from typing import Self

from ahn.errors import AHNError


@dataclasses.dataclass(frozen=True)
class Worker:
    """This process: number `rank` of `count`; on its machine it is number `local`."""

    rank: int = 0
    count: int = 1
    local: int = 0

    @classmethod
    def from_environment(cls) -> Self:
        """From RANK, WORLD_SIZE and LOCAL_RANK, which the launchers set; alone without them.

        The processes share nothing but the result folder, so no process group is needed.
        """
        try:
            rank, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
            local = int(os.environ.get("LOCAL_RANK", rank))
        except ValueError:
            raise AHNError("RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers, as a launcher sets them.") from None
        if not 0 <= rank < count:
            raise AHNError(f"RANK is {rank} of WORLD_SIZE {count}: start all processes with one launcher.")
        return cls(rank, count, local)

    @property
    def first(self) -> bool:
        """The one that puts results together and talks."""
        return self.rank == 0

    def device(self) -> str | None:
        """The GPU of this process, if there are several processes and a GPU for each."""
        import torch

        if self.count == 1 or not torch.cuda.is_available():
            return None
        return f"cuda:{self.local % torch.cuda.device_count()}"
