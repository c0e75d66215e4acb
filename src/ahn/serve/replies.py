"""Replies while they are written: several at once, for as long as they may take."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING

from ahn.serve.metrics import ReplyWatch
from ahn.serve.problems import APIProblem
from ahn.serve.request import Delta, FinishReason, TokenLogprobs

if TYPE_CHECKING:
    from ahn.serve.reply import Reply

IDLE = 10.0
"""Seconds without anything new after which a stream says that it is still there."""
LAST = 30.0
"""Seconds that the engine may take to end a reply that it was told to end."""


@dataclasses.dataclass
class Written:
    """What is known of one reply."""

    text: str = ""
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    read: int = 0
    cached: int = 0
    finish: FinishReason | None = None

    def add(self, delta: Delta) -> None:
        """Take in what is new."""
        self.text += delta.text
        self.tokens += delta.tokens
        self.logprobs += delta.logprobs
        self.prompt_logprobs = self.prompt_logprobs or delta.prompt_logprobs
        self.read, self.cached = max(self.read, delta.read), max(self.cached, delta.cached)
        self.finish = delta.finish or self.finish


class RunningReplies:
    """The replies that one request asked for.

    Args:
        replies: what the engine gave.
        watches: a clock for each.
        seconds: after which they end where they are.
        alive: whether the engine still works.
    """

    def __init__(
        self, replies: Sequence[Reply], watches: Sequence[ReplyWatch], seconds: float, alive: Callable[[], bool]
    ) -> None:
        self._replies, self._watches, self._alive = replies, watches, alive
        self._seconds = seconds
        self.written = [Written() for _ in replies]

    def cancel(self) -> None:
        """End all that still run."""
        for reply, written in zip(self._replies, self.written, strict=True):
            if written.finish is None:
                reply.cancel()

    async def all(self) -> list[Written]:
        """All replies, when all have ended.

        Raises:
            APIProblem: as `deltas`.
        """
        try:
            async for _ in self.deltas():
                pass
        finally:
            self.cancel()
        return self.written

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """What becomes known, with the number of its reply; an empty delta now and then where nothing does.

        Raises:
            APIProblem: a reply failed, or nothing was written when the time was up, or the engine died.
        """
        ends = time.monotonic() + self._seconds
        sources = [aiter(reply) for reply in self._replies]
        waiting = {asyncio.ensure_future(anext(source)): n for n, source in enumerate(sources)}
        late = False
        try:
            while waiting:
                left = ends - time.monotonic()
                if left <= 0:
                    if late or not self._alive():
                        raise APIProblem(503, "The engine does not answer.")
                    self.cancel()
                    late, ends, left = True, time.monotonic() + LAST, LAST
                done, _ = await asyncio.wait(waiting, timeout=min(left, IDLE), return_when=asyncio.FIRST_COMPLETED)
                if not done:
                    if not self._alive():
                        raise APIProblem(503, "The engine has stopped.")
                    yield 0, Delta()
                for task in done:
                    n = waiting.pop(task)
                    delta = self._took(n, task.result(), late)
                    yield n, delta
                    if delta.finish is None:
                        waiting[asyncio.ensure_future(anext(sources[n]))] = n
        finally:
            for task in waiting:
                task.cancel()

    def _took(self, n: int, delta: Delta, late: bool) -> Delta:
        self._watches[n].saw(delta)
        if delta.finish == "cancelled" and late and (self.written[n].tokens or delta.tokens):
            delta = dataclasses.replace(delta, finish="length")  # what could be written in the time
        self.written[n].add(delta)
        if delta.finish == "error":
            raise APIProblem(500, delta.error or "The reply failed.")
        if delta.finish == "cancelled":
            raise APIProblem(503, "The time for this request was up before its reply began." if late else "Cancelled.")
        return delta
