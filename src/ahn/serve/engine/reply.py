"""What a reply brings, on its way from the engine's thread to whoever asked."""

import asyncio
import collections
import threading
from collections.abc import AsyncIterator, Callable, Iterator

from ahn.serve.request import Delta


class Reply:
    """Deltas as they come, up to one with a `finish`; for one reader, in a thread or in an event loop.

    The engine never waits for a reader: what is not read yet waits here, at most `max_tokens` deltas.
    """

    def __init__(self) -> None:
        self._deltas: collections.deque[Delta] = collections.deque()
        self._changed = threading.Condition()
        self._wake: Callable[[], object] = lambda: None
        self._over = False
        self.cancelled = False
        self.on_cancel: Callable[[], object] = lambda: None

    def cancel(self) -> None:
        """Stop as soon as possible; the last delta then says so. From any thread, at any time."""
        self.cancelled = True
        self.on_cancel()

    def put(self, delta: Delta) -> None:
        with self._changed:
            if self._deltas and _only_progress(self._deltas[-1]) and _only_progress(delta):
                self._deltas[-1] = delta
            else:
                self._deltas.append(delta)
            self._changed.notify_all()
            self._wake()

    def _take(self) -> Delta | None:
        if not self._deltas:
            return None
        delta = self._deltas.popleft()
        self._over = delta.finish is not None
        return delta

    def __iter__(self) -> Iterator[Delta]:
        while not self._over:
            with self._changed:
                self._changed.wait_for(lambda: self._deltas)
                delta = self._take()
            assert delta is not None
            yield delta

    async def __aiter__(self) -> AsyncIterator[Delta]:
        loop, there = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(there.set)

        with self._changed:
            self._wake = wake
        while not self._over:
            there.clear()
            with self._changed:
                delta = self._take()
            if delta is None:
                await there.wait()
            else:
                yield delta


def _only_progress(delta: Delta) -> bool:
    return not (delta.text or delta.tokens or delta.prompt_logprobs or delta.finish)
