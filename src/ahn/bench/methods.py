"""What `ahn bench` compares: full attention as transformers offers it, sinks + window, and every memory."""

from collections.abc import Sequence

from ahn import memory
from ahn.checkpoint.directory import Checkpoint
from ahn.checkpoint.format import read_settings
from ahn.checkpoint.hub import local_directory
from ahn.config import AHNConfig, Reach, overridden
from ahn.errors import AHNError
from ahn.measure.method import Method

DYNAMIC, STATIC, WINDOW = "full-dynamic", "full-static", "window"


def make_methods(
    names: Sequence[str] | None,
    window: int | None,
    sinks: int | None,
    adapter: str | None = None,
    quantized: int | None = None,
    bits: tuple[int, int] | None = None,
    trained: int | None = None,
) -> list[Method]:
    """The methods of these names, all with the same window and sinks.

    Args:
        names: "full-dynamic", "full-static", "window" or the name of a memory; None takes all, or with an adapter the
            three and the adapter's memory.
        window, sinks, quantized: None takes the adapter's, or what follows the base.
        bits: per number of keys and of values of quantized tokens; None takes the adapter's, or the defaults.
        adapter: directory or Hub id; gives its weights to the method of its memory.

    Raises:
        AHNError: a name is unknown, or the adapter cannot be read.
    """
    reach: Reach = {"window": window, "sinks": sinks, "quantized": quantized}
    key_bits, value_bits = bits or (None, None)
    saved = None
    if adapter is not None:
        saved = read_settings(Checkpoint.open(local_directory(adapter)).require("adapter"), **reach)
    base = overridden(saved or AHNConfig.for_base(trained), **reach, key_bits=key_bits, value_bits=value_bits)
    if names is None:
        names = list(dict.fromkeys([DYNAMIC, STATIC, WINDOW, *([saved.memory] if saved else memory.names())]))
    return [_method(name, base, adapter if saved and name == saved.memory else None) for name in names]


def _method(name: str, base: AHNConfig, adapter: str | None) -> Method:
    if name in (DYNAMIC, STATIC):
        return Method(name, static=name == STATIC)
    if adapter is not None:
        return Method(name, base, adapter)
    if name == WINDOW:
        return Method(name, base.replace(memory="window_only", router=False, q_proj=False, calibrated_keys=False))
    if name not in memory.names():
        known = (DYNAMIC, STATIC, WINDOW, *memory.names())
        raise AHNError(f"Unknown method {name!r}; choose from {', '.join(known)}.")
    return Method(name, base.replace(memory=name, router=False, q_proj=False, calibrated_keys=False))
