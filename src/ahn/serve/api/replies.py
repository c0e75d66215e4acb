"""Replies while they are written: several at once, for as long as they may take."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Callable, Sequence

from ahn.serve.api.metrics import ReplyWatch
from ahn.serve.api.problems import APIProblem
from ahn.serve.engine.reply import Reply
from ahn.serve.request import Delta, FinishReason, TokenLogprobs

IDLE = 10.0
"""Seconds without anything new after which a stream says that it is still there."""
LAST = 30.0
"""Seconds that the engine may take to end a reply that it was told to end."""


@dataclasses.dataclass
class WrittenReply:
    """What is known of one reply, or what is new in it: deltas as one."""

    text: str = ""
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    read: int = 0
    cached: int = 0
    finish: FinishReason | None = None
    error: str | None = None

    @property
    def only_read(self) -> bool:
        """Whether nothing is new but how much of the prompt is read."""
        return not self.tokens and not self.text and self.finish is None

    def add(self, new: Delta | WrittenReply) -> None:
        self.text += new.text
        self.tokens += new.tokens
        self.logprobs += new.logprobs
        self.prompt_logprobs = self.prompt_logprobs or new.prompt_logprobs
        self.read, self.cached = max(self.read, new.read), max(self.cached, new.cached)
        self.finish, self.error = new.finish or self.finish, new.error or self.error


class RunningReplies:
    """The replies that one request asked for."""

    def __init__(
        self, replies: Sequence[Reply], watches: Sequence[ReplyWatch], seconds: float, alive: Callable[[], bool]
    ) -> None:
        self._replies, self._watches, self._alive = replies, watches, alive
        self._ends, self._late = time.monotonic() + seconds, False
        self._waiting: dict[int, WrittenReply] = {}
        self._news = asyncio.Event()
        self.written = [WrittenReply() for _ in replies]

    def cancel(self) -> None:
        for reply, written in zip(self._replies, self.written, strict=True):
            if written.finish is None:
                reply.cancel()

    async def all(self) -> list[WrittenReply]:
        try:
            async for _ in self.news():
                pass
        finally:
            self.cancel()
        return self.written

    async def news(self) -> AsyncIterator[tuple[int, WrittenReply]]:
        """What becomes known, with the number of its reply; now and then how it stands, where nothing does.

        What comes faster than it is taken comes together: a slow client costs fewer events, not more memory.
        """
        pumps = [asyncio.create_task(self._pump(n, reply)) for n, reply in enumerate(self._replies)]
        try:
            left = len(pumps)
            while left:
                patience = self._patience()
                if not self._waiting and not await self._news_within(patience):
                    if not self._alive():
                        raise APIProblem(503, "The engine has stopped.")
                    yield 0, WrittenReply(read=self.written[0].read)
                    continue
                n = next(iter(self._waiting))
                new = self._took(n, self._waiting.pop(n))
                left -= new.finish is not None
                yield n, new
        finally:
            for pump, watch in zip(pumps, self._watches, strict=True):
                pump.cancel()
                watch.saw(Delta(finish="cancelled"))  # unless it has ended: the client has gone

    async def _pump(self, n: int, reply: Reply) -> None:
        try:
            async for delta in reply:
                self._watches[n].saw(delta)
                self._put(n, delta)
        except Exception:
            self._put(n, Delta(finish="error", error="The reply failed."))
            raise

    def _put(self, n: int, delta: Delta) -> None:
        self._waiting.setdefault(n, WrittenReply()).add(delta)
        self._news.set()

    async def _news_within(self, seconds: float) -> bool:
        self._news.clear()
        try:
            async with asyncio.timeout(seconds):
                await self._news.wait()
        except TimeoutError:
            return False
        return True

    def _patience(self) -> float:
        """Seconds to wait for news. When the time is up, all that runs is told to end, and has a little more."""
        left = self._ends - time.monotonic()
        if left <= 0:
            if self._late:
                raise APIProblem(503, "The engine does not answer.")
            self.cancel()
            self._late, left = True, LAST
            self._ends = time.monotonic() + left
        return min(left, IDLE)

    def _took(self, n: int, new: WrittenReply) -> WrittenReply:
        self.written[n].add(new)
        if new.finish == "error":
            raise APIProblem(500, new.error or "The reply failed.")
        if new.finish == "cancelled":
            if not self._late:
                raise APIProblem(503, "The reply was ended by the server.")
            if not self.written[n].tokens:
                raise APIProblem(503, "The time for this request was up before its reply began.")
            new.finish = self.written[n].finish = "length"  # what could be written in the time
        return new
