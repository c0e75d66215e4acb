"""On trial: states that the query heads of a key head share; more states."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ahn.memory.routed_deltanet import RoutedDeltaNet
from ahn.ops.routes import Routes


class Routed8(RoutedDeltaNet):
    name = "routed_8"
    published_name = "Routed8"
    states: ClassVar[int] = 8


class Routed2(RoutedDeltaNet):
    name = "routed_2"
    published_name = "Routed2"
    states: ClassVar[int] = 2


class Shared(RoutedDeltaNet):
    """The query heads of a key head share its states: a quarter of the bytes. Here each head works them out anew."""

    name = "routed_shared"
    published_name = "RoutedShared"
    groups: ClassVar[int] = 4

    def _tied(self, x: Tensor) -> Tensor:
        return x if len(x) % self.groups else x[:: self.groups].repeat_interleave(self.groups, 0)

    def reset_gates(self) -> None:
        super().reset_gates()
        self.q_route.copy_(self._tied(self.k_route))

    def write_gates(self, x: Tensor) -> dict[str, Tensor]:
        beta = super().write_gates(x)["beta"]
        return {"beta": beta if beta.shape[1] % self.groups else beta[:, :: self.groups].repeat_interleave(self.groups, 1)}

    @property
    def routes(self) -> Routes:
        return Routes(self.q_map.weight, self._tied(self.k_map.weight), self.q_route, self._tied(self.k_route))


class Shared16(Shared):
    name = "routed_shared16"
    published_name = "RoutedShared16"
    states: ClassVar[int] = 16
