"""`Trace`: what was recorded of one conversation, as tensors on the CPU."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ahn.errors import AHNError
from ahn.inspect.contribution import Contribution
from ahn.inspect.kinds import KindWrites, summarise

Record = TypeVar("Record", "Writes", "Reads")


@dataclasses.dataclass
class Writes:
    """What left the window in one layer, N columns in order: float32 (B, H, N) but for the positions.

    Of a query head that shares its states with others, what was written for all of them.

    Attributes:
        positions: (B, N) of the tokens, counted from 0 in their row's real tokens; -1 in columns where this row wrote
            nothing (padding).
        strength: the write gate: β of the delta rule, in (0, 1); Mamba2's step, > 0.
        decay: factor on the state just before the write, in (0, 1]; 1 where the memory never decays.
        update: ‖k̂ uᵀ‖, Frobenius norm of what was added to the state. For the delta rule u is what the state did
            not predict yet, times the gate.
        state_norm: ‖S‖, Frobenius norm of the state after the write.
    """

    positions: Tensor
    strength: Tensor
    decay: Tensor
    update: Tensor
    state_norm: Tensor

    def half_life(self, row: int = 0) -> Tensor:
        """(H,) writes after which half of what was in the state is left, by the mean of log `decay`; inf if all."""
        return math.log(2) / self.decay[row][:, self.positions[row] >= 0].log().mean(-1).abs()  # -0.0 would make -inf


@dataclasses.dataclass
class Reads(Contribution):
    """What the memory gave in one layer: norms in the residual stream, after the base model's `o_proj`.

    N columns as in `Writes`: the query of a column is the one at which the column's token left.

    Attributes:
        positions: (B, N) of the reading queries, -1 for padding.
    """

    positions: Tensor

    @property
    def share(self) -> float:
        """Mean of ‖memory‖ / ‖exact attention‖ over the queries."""
        real = self.positions >= 0
        return float((self.memory[real] / self.exact[real].clamp_min(1e-12)).mean())


class Trace:
    """What `record` saw; it may be read while the recording goes on.

    Attributes:
        window, sinks: of the conversation; quantized tokens count as part of the window.
    """

    def __init__(self) -> None:
        self.window = self.sinks = 0
        self._writes: dict[int, list[Writes]] = {}
        self._reads: dict[int, list[Reads]] = {}

    @property
    def writes(self) -> dict[int, Writes]:
        """By layer. Empty if nothing left the window."""
        return {layer: _joined(parts) for layer, parts in sorted(self._writes.items())}

    @property
    def reads(self) -> dict[int, Reads]:
        """By layer. Empty if nothing left the window."""
        return {layer: _joined(parts) for layer, parts in sorted(self._reads.items())}

    def add(self, layer: int, writes: Writes, reads: Reads) -> None:
        """Append one forward."""
        self._writes.setdefault(layer, []).append(writes)
        self._reads.setdefault(layer, []).append(reads)

    def evicted_at(self, position: int, row: int = 0) -> int | None:
        """Position of the query at which a token left the window, which was the first to read it in the memory.

        Args:
            position: of the token in its row.

        Returns:
            None for a sink, a token still in the window, and one that left before the recording.

        Raises:
            AHNError: nothing left the window.
        """
        written = next(iter(self.something().values())).positions[row]
        return position + self.window if position >= 0 and bool((written == position).any()) else None

    def by_kind(
        self, kinds: Sequence[str], heads: Sequence[tuple[int, int]] | None = None, row: int = 0
    ) -> list[KindWrites]:
        """Means over the tokens of each kind that were written, with 95 % intervals; the most strongly stored first.

        Args:
            kinds: of the row's tokens by position, from `token_kinds` or any labels of your own.
            heads: (layer, head) pairs to average over; None takes all.

        Raises:
            AHNError: nothing left the window, there is no such head, or a written token has no kind.
        """
        writes = self.something()
        known = [(layer, head) for layer, w in writes.items() for head in range(w.strength.shape[1])]
        chosen = known if heads is None else list(heads)
        if unknown := set(chosen) - set(known):
            raise AHNError(f"No layer and head {min(unknown)} was recorded; the last one is {known[-1]}.")
        if not chosen:
            raise AHNError("Name at least one (layer, head) to average over.")
        positions = next(iter(writes.values())).positions[row]
        real = positions >= 0
        values = {
            name: torch.stack([getattr(writes[layer], name)[row, head, real] for layer, head in chosen])
            for name in ("strength", "decay", "update")
        }
        return summarise(kinds, positions[real], **values)

    def something(self) -> dict[int, Writes]:
        """`writes`, which must not be empty.

        Raises:
            AHNError: nothing left the window.
        """
        writes = self.writes
        if not writes:
            raise AHNError(
                "Nothing left the window while this was recorded, so nothing was written: read more than "
                "sinks + window tokens."
            )
        return writes


def _joined(parts: list[Record]) -> Record:
    """One record of all parts, which also takes their place."""
    if len(parts) > 1:
        fields: dict[str, Any] = {
            field.name: torch.cat([getattr(part, field.name) for part in parts], dim=-1)
            for field in dataclasses.fields(parts[0])
        }
        parts[:] = [type(parts[0])(**fields)]
    return parts[0]
