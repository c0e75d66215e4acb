"""What a report relies on in a folder of results, which somebody else may have written or a disk have damaged."""

import json
from collections.abc import Callable, Mapping
from typing import Any

Kind = Callable[[Any], bool]


def number(low: float = -1e9, high: float = 1e9) -> Kind:
    """A number between two others; JSON as Python reads it also has NaN."""
    return lambda x: not isinstance(x, bool) and isinstance(x, int | float) and low <= x <= high


def count(least: int = 0) -> Kind:
    """A whole number of tokens or bytes."""
    return lambda x: type(x) is int and least <= x < 2**50


def text(x: Any) -> bool:
    """A string that fits into a page."""
    return isinstance(x, str) and len(x) < 4096


def optional(kind: Kind) -> Kind:
    """The same or None; a field that may be absent."""
    return lambda x: x is None or kind(x)


def rows(kinds: Mapping[str, Kind]) -> Kind:
    """One or more rows."""
    return lambda x: isinstance(x, list) and bool(x) and not any(wrong(row, kinds) for row in x)


def names(x: Any) -> bool:
    """Values by name."""
    return isinstance(x, dict)


LOSS = number(0, 700)
"""In nats; the exponential of more is no number of Python's."""
SETTINGS = {"method": text, "profile": text, "model": optional(text), "memory": optional(text), "task_settings": names}
SETTINGS |= dict.fromkeys(("window", "sinks", "quantized", "limit", "key_bits", "value_bits"), optional(count()))
RESULT = {"task": text, "samples": optional(count()), "score": optional(number())}
CELL = {"length": count(1), "depth": number(0, 100), "score": number()}
OF_TASK: dict[str, tuple[dict[str, Kind], dict[str, Kind]]] = {
    "needle": ({"score": number(), "grid": rows(CELL)}, {}),
    "perplexity": (
        {"document": text, "tokens": count(1), "loss": LOSS, "cache_bytes": count()}
        | {"peak_bytes": optional(count()), "tokens_per_second": number()},
        {},
    ),
    "gradients": ({}, {"loss": text}),
}
"""By the beginning of a task's name: of its `result.json`, and of its `task_settings`."""
LINES = {
    "positions.jsonl": {"start": count(), "stop": count(1), "loss": LOSS, "peak_bytes": optional(count())},
    "cost.jsonl": {"length": count(1), "flops": number(0, 1e30), "cache_bytes": count()},
    "gradients.jsonl": {"token": text, "norm": number(0, 1e300), "region": text},
}


def parsed(content: str) -> Any:
    """JSON whose strings can be written again, which those with half a surrogate pair cannot."""
    values = json.loads(content)
    json.dumps(values, ensure_ascii=False).encode()
    return values


def wrong(values: Any, kinds: Mapping[str, Kind]) -> list[str]:
    """The fields that are missing or not of their kind."""
    if not isinstance(values, dict):
        return list(kinds)
    return [name for name, kind in kinds.items() if not kind(values.get(name))]


def check(values: Any, kinds: Mapping[str, Kind]) -> None:
    """Raises ValueError unless every field is there and of its kind."""
    if found := wrong(values, kinds):
        raise ValueError(f"{', '.join(found)} cannot be what it says")


def check_result(figures: Any, config: Any) -> None:
    """Raises ValueError unless `result.json` and `config.json` hold what a report of their task shows."""
    check(figures, RESULT)
    check(config, {"settings": names, "about": optional(names)})
    check(config["settings"], SETTINGS)
    check(config.get("about") or {}, {"adapter": optional(text)})
    of_figures, of_settings = OF_TASK.get(figures["task"].partition("/")[0], ({}, {}))
    check(figures, of_figures)
    check(config["settings"]["task_settings"], of_settings)
