"""The server's app: routes, errors and the gate before them."""

import asyncio
import contextlib
import functools
import math
import socket
import threading
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from fastapi import FastAPI

from ahn.errors import installed_version
from ahn.serve.api import chat, completions, operations, problems, responses
from ahn.serve.api.building import listen
from ahn.serve.api.gate import RequestGate
from ahn.serve.api.service import Service

STOP = 20.0
"""Seconds that running replies have to end when the server stops; then they end with an error."""
CLOSE = 5.0
"""Seconds that clients then have to take it, and the engine for what it is in the middle of."""

IDLE = 75
"""Seconds that a connection may be idle: longer than clients and proxies keep theirs (5 and 60), or some of them would
ask just as it is closed."""
PROTOCOL: dict[str, Any] = {"http": "h11", "ws": "none"}
"""Of uvicorn, whatever is installed: httptools takes headers of any size, and answers HTTP/1.0 in chunks."""


def make_app(service: Service) -> FastAPI:
    """The app for a service whose engine was started; when the app ends, engine and messages are closed.

    `app.state.close` takes seconds: nothing new is begun, what runs may end in that time.
    """

    @contextlib.asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.engine.close, CLOSE)  # replies that were cut off end meanwhile
        service.store.close()

    # Their pages of documentation load scripts from elsewhere.
    app = FastAPI(
        title="ahn serve", version=installed_version("ahn") or "unknown", lifespan=life, docs_url=None, redoc_url=None
    )
    for part in (
        chat.router(service),
        completions.router(service),
        responses.router(service),
        operations.router(service),
        operations.conversations(service),
    ):
        app.include_router(part)
    problems.install(app)
    app.state.close = service.engine.close
    app.add_middleware(RequestGate, settings=service.settings, metrics=service.metrics)
    return app


class StoppingServer(uvicorn.Server):
    """Ends replies with an error event rather than by cutting their connections."""

    def __init__(self, app: FastAPI, stop: float = STOP, **options: Any) -> None:
        options |= {"timeout_graceful_shutdown": math.ceil(stop + CLOSE), "timeout_keep_alive": IDLE}
        super().__init__(uvicorn.Config(app, **PROTOCOL, **options))
        self._close = functools.partial(app.state.close, stop)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn does, while the app is told to come to an end."""
        threading.Thread(target=self._close, daemon=True).start()
        await super().shutdown(sockets)


def serve_until_stopped(app: FastAPI, place: socket.socket) -> None:
    """Serve at a bound socket until SIGINT or SIGTERM."""
    listen(place)
    StoppingServer(app, lifespan="on", server_header=False).run(sockets=[place])
