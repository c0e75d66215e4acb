"""Time and peak memory of reading a prompt."""

import time
from typing import Any

from ahn import private
from ahn.bench import roofline
from ahn.bench.fill import random_tokens
from ahn.bench.profile import kernels
from ahn.bench.stand import Stand, check_patience, timed
from ahn.measure import peak
from ahn.measure.clock import release, repeated, seconds
from ahn.measure.method import Method
from ahn.measure.reading import chunk_size

WARM_CHUNKS = 3
"""Chunks beyond sinks + window in the warm-up: the first, one in the middle and the last run the same code as later."""


def measure(stand: Stand, method: Method, context: int, batch: int) -> dict[str, Any]:
    """Read B prompts of `context` random tokens into an empty cache and give the last token's logits.

    On a CPU in the chunks in which every verb reads there; a row also says the seconds of all its cores.
    """
    model, device, settings = stand.model, stand.device, stand.settings
    work = roofline.prefill(model, method.config, context, batch)
    check_patience(stand, work.limit(stand.ceilings), "reading the prompt")
    ids = random_tokens(model, batch, context)

    size = chunk_size(model) if device.type == "cpu" else context

    def read(tokens: int) -> None:
        cache = method.new_cache(model, batch, context)
        for chunk in ids[:, :tokens].split(size, dim=1):
            model(chunk, logits_to_keep=1, **{private.CACHE: cache})

    warm = context
    if method.config is not None:
        warm = min(context, method.config.lossless + WARM_CHUNKS * min(size, method.config.chunk))
    warmup = seconds(device, lambda: read(warm))
    release(device)
    start = time.process_time()
    with peak.measure(device, stand.held()) as memory:
        times = repeated(device, lambda: read(context), settings.repeats, settings.budget)
    cores = {"cpu_s": (time.process_time() - start) / len(times)} if device.type == "cpu" else {}
    profiled = {"kernels": kernels(device, lambda: read(context))} if settings.profile else {}
    found = timed(stand, times, batch * context, memory, work)
    return found | cores | {"warmup_tokens": warm, "warmup_s": warmup} | profiled
