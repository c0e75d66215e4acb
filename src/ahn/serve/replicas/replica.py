"""One engine of several: the whole server in a process of Ray's, asked with requests as ASGI has them."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any, cast

from starlette.types import Message, Scope

from ahn.serve.api.app import CLOSE, make_app
from ahn.serve.api.messages import MessageStore
from ahn.serve.api.service import Service

WAITING = 64
"""Parts of an answer that wait to be taken."""
log = logging.getLogger(__name__)


class RemoteMessages:
    """The messages of all replicas: one process keeps them, as SQLite's locks do not hold on network file systems.

    Args:
        keeper: Ray's handle of a `MessageStore`.
    """

    def __init__(self, keeper: Any) -> None:
        self._keeper = keeper

    def __getattr__(self, name: str) -> Callable[..., Any]:
        import ray

        method = getattr(self._keeper, name)
        return lambda *given, **named: ray.get(method.remote(*given, **named))


class Replica:
    """What Ray starts, and starts again where it died.

    Args:
        start: loads the model and starts its engine, around the messages that it is given.
        keeper: Ray's handle of the messages.
    """

    def __init__(self, start: Callable[[MessageStore], Service], keeper: Any) -> None:
        self._service = start(cast(MessageStore, RemoteMessages(keeper)))
        self._app = make_app(self._service)

    async def __call__(self, asked: Scope, body: bytes, key: str) -> AsyncIterator[list[Message]]:
        """The answer to a request, in parts as they come."""
        parts: asyncio.Queue[Message | None] = asyncio.Queue(WAITING)
        answering = asyncio.create_task(self._answer({**asked, "state": {"route": key}}, body, parts))
        try:
            ready: list[Message | None] = [{}]
            while ready[-1] is not None:
                ready = [await parts.get()]
                while not parts.empty():  # what came together goes together
                    ready.append(parts.get_nowait())
                yield [part for part in ready if part is not None]
        finally:
            answering.cancel()

    async def _answer(self, asked: Scope, body: bytes, parts: asyncio.Queue[Message | None]) -> None:
        given = False

        async def receive() -> Message:
            nonlocal given
            if given:
                await asyncio.Event().wait()  # when the client goes, this task is cancelled
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        try:
            await self._app(asked, receive, parts.put)
        except Exception:
            log.exception("A request failed")  # the client was told
        await parts.put(None)

    def page(self) -> tuple[str, bytes | None]:
        """Where this replica is (host:process), and its metrics; None for them if its engine has stopped."""
        alive = self._service.engine.alive()
        return f"{socket.gethostname()}:{os.getpid()}", self._service.metrics.text() if alive else None

    async def close(self, seconds: float) -> None:
        """Begin nothing new; what runs may end in that time."""
        await asyncio.to_thread(self._service.engine.close, seconds)

    def check_health(self) -> None:
        """Asked by Ray, which starts a replica anew that raises.

        Raises:
            RuntimeError: the engine has stopped.
        """
        if not self._service.engine.alive():
            raise RuntimeError("The engine has stopped.")

    def __del__(self) -> None:
        if service := self.__dict__.get("_service"):  # loading may have failed
            service.engine.close(CLOSE)
