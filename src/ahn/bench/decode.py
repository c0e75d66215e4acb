"""Time and peak memory of one more token, after a long context."""

import statistics
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticLayer

from ahn import private
from ahn.bench import fill, roofline
from ahn.bench.profile import kernels
from ahn.bench.stand import Stand, check_patience, timed
from ahn.measure import peak
from ahn.measure.clock import release, repeated, seconds, spread
from ahn.measure.method import Method
from ahn.measure.reading import bytes_of_cache

WARM_STEPS = 8
"""Steps that are not timed: kernels are compiled and the step is captured in them."""


def measure(stand: Stand, method: Method, context: int, batch: int, thorough: bool = True) -> dict[str, Any]:
    """Steps of one token with a cache that has read `context` tokens; if `thorough`, `generate` and kernels as well."""
    cache, work = prepare(stand, method, context, batch)
    cache_bytes = bytes_of_cache(cache)
    release(stand.device)
    more = thorough and not method.static
    with peak.measure(stand.device, stand.held() + cache_bytes) as memory:
        found = time_step(stand, method, cache, context, batch)
        if more:
            found |= _also_through_generate(stand, cache, context, batch)
    if stand.settings.profile and more:
        ids = fill.random_tokens(stand.model, batch, 1)
        found["kernels"] = kernels(stand.device, lambda: stand.model(input_ids=ids, **{private.CACHE: cache}))
    found |= {"real_prefill": stand.settings.real_prefill, "cache_bytes": cache_bytes}
    row = timed(stand, [found["seconds"]], batch, memory, work)
    del row["times_s"]  # `found` has those of steps, where they were timed
    return row | found


def throughput(stand: Stand, method: Method, context: int, batch: int) -> dict[str, Any]:
    """Tokens per second of many conversations that decode together, and the memory that they take."""
    return measure(stand, method, context, batch, thorough=False)


def prepare(stand: Stand, method: Method, context: int, batch: int) -> tuple[Cache, roofline.Work]:
    """A cache after `context` tokens, and the work of one step with it."""
    work = roofline.step(stand.model, method.config, context, batch)
    room = context + stand.settings.new_tokens + 1
    if stand.settings.real_prefill:
        reading = roofline.prefill(stand.model, method.config, context, batch)
        check_patience(stand, reading.limit(stand.ceilings), "reading the context")
        return fill.read_cache(method, stand.model, batch, context, room), work
    return fill.synthetic_cache(method, stand.model, batch, context, room), work


def time_step(stand: Stand, method: Method, cache: Cache, context: int, batch: int) -> dict[str, Any]:
    """`seconds` of one step as a user gets it, with their `spread` and the raw times."""
    if not method.static:
        return steps(stand, cache, batch)
    found = through_generate(stand, cache, context, batch)
    return found | {"seconds": found["generate_s"], "spread": spread(found["generate_times_s"])}


def _also_through_generate(stand: Stand, cache: Cache, context: int, batch: int) -> dict[str, Any]:
    """`through_generate`, or why it failed: the step has been measured and must not be lost."""
    try:
        return through_generate(stand, cache, context, batch)
    except Exception as error:
        return {"generate_why": f"{type(error).__name__}: {error}"}


def steps(stand: Stand, cache: Cache, batch: int) -> dict[str, Any]:
    """Seconds of `model(one token, cache)`, in blocks of `new_tokens` steps."""
    model, device, count = stand.model, stand.device, stand.settings.new_tokens
    ids = fill.random_tokens(model, batch, count)

    def block(tokens: int) -> None:
        for n in range(tokens):
            model(input_ids=ids[:, n : n + 1], **{private.CACHE: cache})

    warmup = seconds(device, lambda: block(min(WARM_STEPS, count)))
    blocks = repeated(device, lambda: block(count), stand.settings.repeats, stand.settings.budget)
    times = [block / count for block in blocks]
    return {"seconds": statistics.median(times), "spread": spread(times), "times_s": times, "steps_warmup_s": warmup}


def through_generate(stand: Stand, cache: Cache, context: int, batch: int) -> dict[str, Any]:
    """Seconds per token of `model.generate`: the difference of a long and a short call, so that its start drops out."""
    ids = fill.random_tokens(stand.model, batch, 1)
    long = stand.settings.new_tokens
    short = max(1, long // 4)

    def run(tokens: int) -> float:
        for layer in cache.layers:
            if isinstance(layer, StaticLayer):  # the others grow, or keep what they keep
                fill.set_length(layer, context)
        return seconds(stand.device, lambda: generate(stand, cache, ids, tokens))

    warmup = run(short)
    pairs: list[tuple[float, float]] = []
    while not pairs or (len(pairs) < stand.settings.repeats and sum(map(sum, pairs)) < stand.settings.budget):
        pairs.append((run(long), run(short)))
    times = [(a - b) / (long - short) for a, b in pairs]
    return {"generate_s": statistics.median(times), "generate_times_s": times, "generate_warmup_s": warmup}


def generate(stand: Stand, cache: Cache, ids: Tensor, tokens: int) -> None:
    """Continue a cache with a token each (B, 1) by as many tokens, with transformers' `generate`."""
    length = int(cache.get_seq_length()) + 1
    mask = torch.ones(len(ids), length, dtype=torch.long, device=ids.device)
    stand.model.generate(ids, attention_mask=mask, max_new_tokens=tokens, **{private.CACHE: cache})
