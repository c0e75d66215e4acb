"""Full attention in transformers: the growing cache after a prompt that was really read, and the static one, compiled.

scaled_dot_product_attention takes cuDNN first on Hopper, and cuDNN builds a graph for every length of the keys that the
process has not seen: a step of a growing cache waits for it (`first`); steps of lengths that were there before do not
(`again`). Told to take FlashAttention (`flash`), it needs no graph, and splits the keys among all multiprocessors.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from collections.abc import Iterator
from typing import Any

import stand
import torch
from plan import TOGETHER, Rows, reading_seconds
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache

from ahn import private
from ahn.bench import decode, fill, prefill
from ahn.bench.methods import DYNAMIC, STATIC
from ahn.bench.stand import Stand
from ahn.measure.clock import release, seconds
from ahn.measure.method import Method, forget_compiled
from ahn.measure.reading import bytes_of_cache

STEPS = 64
STATIC_S, TOGETHER_S = 60.0, 30.0
"""About what these rows take, compilation and filling included."""


def measure(options: argparse.Namespace, rows: Rows) -> None:
    """Rows of all contexts."""
    here = stand.make(options, rows)
    for index, context in enumerate(options.contexts):
        with torch.inference_mode():
            _growing(here, context, options.repeats, rows)
            release(here.device)
            if index < TOGETHER:
                _together(here, context, rows)
                release(here.device)
        with torch.no_grad():
            rows.measure(
                lambda: decode.measure(here, Method(STATIC, static=True), context, 1),  # noqa: B023
                STATIC_S,
                measurement="decode",
                method=STATIC,
                context=context,
                batch=1,
            )
        forget_compiled(here.model)
        release(here.device)


def _growing(here: Stand, context: int, repeats: int, rows: Rows) -> None:
    """Rows of reading, and of steps after it: of lengths that cuDNN has not seen and has, and with flash."""
    method, expected = Method(DYNAMIC), reading_seconds(context)
    what: dict[str, Any] = {"method": DYNAMIC, "context": context, "batch": 1}
    cache: DynamicCache | None = None

    def first() -> dict[str, Any]:
        nonlocal cache
        cache = fill.read_cache(method, here.model, 1, context, 0)
        return _steps(here, cache, context, 1)

    def flash() -> dict[str, Any]:
        with _flash():
            return _steps(here, cache, context, repeats)

    rows.measure(
        lambda: prefill.measure(here, method, context, 1), (1 + repeats) * expected, measurement="prefill", **what
    )
    what |= {"measurement": "decode"}
    if rows.measure(first, expected, kernel="default", lengths="first", **what) is not None:
        rows.measure(lambda: _steps(here, cache, context, repeats), kernel="default", lengths="again", **what)
        rows.measure(flash, kernel="flash", lengths="again", **what)


def _steps(here: Stand, cache: DynamicCache | None, context: int, repeats: int) -> dict[str, Any]:
    """Seconds of a step, each time from the end of the prompt on."""
    assert cache is not None
    ids, times = fill.random_tokens(here.model, 1, STEPS), []

    def block() -> None:
        for n in range(STEPS):
            here.model(input_ids=ids[:, n : n + 1], **{private.CACHE: cache})

    for _ in range(repeats):
        if written := cache.get_seq_length() - context:
            cache.crop(-written)
        times.append(seconds(here.device, block) / STEPS)
    middle = statistics.median(times)
    return {"seconds": middle, "times_s": times, "tokens_per_second": 1 / middle}


def _together(here: Stand, context: int, rows: Rows) -> None:
    """The row of many conversations."""
    method = Method(DYNAMIC)
    each = bytes_of_cache(fill.synthetic_cache(method, here.model, 1, context, 0))
    with _flash():
        rows.measure(
            lambda: stand.together(here, each, lambda batch: decode.throughput(here, method, context, batch)),
            TOGETHER_S,
            measurement="throughput",
            method=DYNAMIC,
            kernel="flash",
            context=context,
        )


@contextlib.contextmanager
def _flash() -> Iterator[None]:
    """torch's FlashAttention; the choice is the GPU's."""
    if not torch.cuda.is_available():
        yield
        return
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        yield
