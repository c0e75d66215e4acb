"""Tokens per second of many conversations that decode together, and the memory that they take."""

from __future__ import annotations

from typing import Any

from ahn.bench import decode
from ahn.bench.stand import Stand
from ahn.measure import peak
from ahn.measure.clock import release
from ahn.measure.method import Method
from ahn.measure.reading import bytes_of_cache


def measure(stand: Stand, method: Method, context: int, batch: int) -> dict[str, Any]:
    """Steps of B conversations, each with `context` tokens behind it."""
    cache, work = decode.prepare(stand, method, context, batch)
    cache_bytes = bytes_of_cache(cache)
    release(stand.device)
    with peak.measure(stand.device, stand.held() + cache_bytes) as memory:
        found = decode.time_step(stand, method, cache, context, batch)
    return {
        **found,
        "real_prefill": stand.settings.real_prefill,
        "tokens_per_second": batch / found["seconds"],
        "cache_bytes": cache_bytes,
        "peak_bytes": memory.total,
        "reserved_bytes": memory.reserved,
        **work.report(stand.ceilings, found["seconds"]),
    }
