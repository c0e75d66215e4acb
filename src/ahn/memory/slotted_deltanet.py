"""Gated DeltaNet beside exact slots: a state for the gist of everything that left, slots for what must be exact."""

from __future__ import annotations

from ahn.memory.gated_deltanet import GatedDeltaNet
from ahn.memory.slots import ExactSlots


class SlottedDeltaNet(ExactSlots, GatedDeltaNet):
    """Every token that leaves the window is written into the state; the most important ones keep a slot as well."""

    name = "slotted_deltanet"
    published_name = "SlottedDeltaNet"
    closed_gates = GatedDeltaNet.closed_gates | ExactSlots.closed_gates
