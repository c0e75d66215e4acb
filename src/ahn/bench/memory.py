"""Peak memory of reading a prompt and of writing on, by length: flat, or not."""

from typing import Any

from ahn.bench import decode, fill, roofline
from ahn.bench.stand import Stand, check_patience
from ahn.measure import peak
from ahn.measure.clock import release, seconds
from ahn.measure.method import Method
from ahn.measure.reading import bytes_of_cache


def measure(stand: Stand, method: Method, context: int, batch: int) -> dict[str, Any]:
    """Read B prompts of `context` tokens once, then generate `new_tokens`."""
    model, device, count = stand.model, stand.device, stand.settings.new_tokens
    work = roofline.prefill(model, method.config, context, batch)
    check_patience(stand, work.limit(stand.ceilings), "reading the prompt")
    release(device)
    caches = []

    def read() -> None:
        caches.append(fill.read_cache(method, model, batch, context, context + count + 1))

    with peak.exact_allocator():  # of the CPU's memory; a GPU's is exact anyway
        with peak.measure(device, stand.held()) as prefill:
            reading = seconds(device, read)
        cache, cache_bytes = caches[0], bytes_of_cache(caches[0])
        with peak.measure(device, stand.held() + cache_bytes) as decoding:
            writing = seconds(device, lambda: decode.generate(stand, cache, fill.random_tokens(model, batch, 1), count))
    return {
        "prefill_peak_bytes": prefill.total,
        "prefill_reserved_bytes": prefill.reserved,
        "decode_peak_bytes": decoding.total,
        "decode_reserved_bytes": decoding.reserved,
        "peak_bytes": None if prefill.total is None else max(prefill.total, decoding.total or 0),
        "cache_bytes": cache_bytes,
        "weights_bytes": stand.held(),
        "prefill_s": reading,  # with whatever was compiled on the way
        "decode_s": writing,
    }
