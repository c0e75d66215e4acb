"""The server's app: routes, errors and the gate before them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from fastapi import FastAPI

from ahn.serve.api import chat, completions, operations, problems, responses
from ahn.serve.api.gate import RequestGate
from ahn.serve.api.service import Service

STOP = 20.0
"""Seconds that running replies have to end when the server stops; then they are cut off."""
CLOSE = 5.0
"""Seconds that the engine then has for what it is in the middle of."""


def make_app(service: Service) -> FastAPI:
    """The app for a service whose engine was started; when the app ends, engine and messages are closed."""

    @contextlib.asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.engine.close, CLOSE)  # replies that were cut off end meanwhile
        service.store.close()

    # Their pages of documentation load scripts from elsewhere.
    app = FastAPI(title="ahn serve", version=_version(), lifespan=life, docs_url=None, redoc_url=None)
    for part in (
        chat.router(service),
        completions.router(service),
        responses.router(service),
        operations.router(service),
        operations.conversations(service),
    ):
        app.include_router(part)
    problems.install(app)
    app.add_middleware(RequestGate, settings=service.settings, metrics=service.metrics)
    return app


def _version() -> str:
    import importlib.metadata

    return importlib.metadata.version("ahn")
