"""What a server holds more after each round of the same work: counted in objects, for memory is the allocator's too."""

from __future__ import annotations

import ctypes
import functools
import gc
import operator
import resource
import sys
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable
from pathlib import Path

WARM, PARTS, ROUNDS = 10, 3, 6
BLOCKS, FEW = "blocks", 32


def grown(work: Callable[[int], object], rest: Callable[[], object]) -> dict[str, list[int]]:
    """What grows in each of several parts, when caches of Python's and of clients are full.

    Args:
        work: one round, told its number, so that no two need be alike.
        rest: called after each part, to wait for what is still going on.

    Returns:
        By how much in each part: types of which there is one more with every second round, and "blocks" if with each
        there are `FEW` more of Python's pieces of memory. (Strings and numbers are in no type, for the garbage
        collector does not know them. The interpreter itself takes a dozen a round, fewer from part to part.)
    """
    before, growth = None, []
    for part in range(PARTS + 1):
        first, last = (WARM + (part - 1) * ROUNDS, WARM + part * ROUNDS) if part else (0, WARM)
        for number in range(first, last):
            work(number)
        rest()
        after = _held()
        if before is not None:
            growth.append(after - before)  # what has grown; the counts themselves are objects too
        before = after
    least = functools.reduce(operator.and_, growth)
    found = [kind for kind, more in least.items() if more >= ROUNDS * (FEW if kind is BLOCKS else 0.5)]
    return {str(kind): [more[kind] for more in growth] for kind in found}


def _held() -> Counter[type | str]:
    urllib.parse.clear_cache()  # clients' addresses
    time.sleep(0.1)  # threads come to rest
    gc.collect()
    blocks = sys.getallocatedblocks()
    return Counter(map(type, gc.get_objects())) + Counter({BLOCKS: blocks})


def resident() -> int:
    """Bytes of memory that this process has now, without what the allocator could give back.

    glibc keeps what is freed between pieces that are in use. In an engine's thread, where the tensors of forwards come
    and go between kept states of a few KiB, that grows to about 60 MiB over a thousand conversations, then no more,
    while the bytes in use stay the same.
    """
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()
