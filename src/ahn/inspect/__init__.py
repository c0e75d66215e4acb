"""Look into the memories of a model: what they write, what their reads give, and what the model is without them."""

from ahn.inspect.ablate import without
from ahn.inspect.capture import record
from ahn.inspect.kinds import KindWrites, Mean
from ahn.inspect.plots import kind_figure, read_figure, state_figure, strength_figure
from ahn.inspect.tokens import KINDS, token_kinds
from ahn.inspect.trace import Reads, Trace, Writes

__all__ = [
    "KINDS",
    "KindWrites",
    "Mean",
    "Reads",
    "Trace",
    "Writes",
    "kind_figure",
    "read_figure",
    "record",
    "state_figure",
    "strength_figure",
    "token_kinds",
    "without",
]
