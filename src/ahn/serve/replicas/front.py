"""What stands before the replicas: it hands each request to the one that holds its conversation."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.types import Message

from ahn.serve.api import problems
from ahn.serve.api.gate import RequestGate
from ahn.serve.api.problems import APIProblem
from ahn.serve.api.settings import ServerSettings
from ahn.serve.api.wire import StreamedResponse, answer, event, unless_gone
from ahn.serve.replicas.pages import merged
from ahn.serve.replicas.routing import routing_key

METHODS = ["GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"]
FORWARDED: tuple[str, ...] = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string")
FORWARDED += ("root_path", "client", "server")
PATIENCE = 5.0
"""Seconds that replicas have to say how they are."""


def make_front(replicas: DeploymentHandle, settings: ServerSettings, stop: Callable[[], None]) -> FastAPI:
    """The app before some replicas; `stop` is called at its end."""

    @contextlib.asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(stop)

    app = FastAPI(lifespan=life, openapi_url=None)
    app.state.close = lambda seconds: replicas.broadcast("close", seconds).results(timeout_s=2 * seconds)

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> Response:
        """200 while any replica works; how many do."""
        working = len(await pages(replicas))
        if not working:
            raise APIProblem(503, "No replica works.")
        return answer({"status": "ok", "replicas": working})

    @app.get("/metrics")
    async def metrics() -> Response:
        """Of all replicas."""
        return Response(merged(await pages(replicas)), media_type="text/plain; version=0.0.4")

    @app.api_route("/{path:path}", methods=METHODS)
    async def forward(request: Request) -> Response:
        """Any other request is a replica's."""
        return await forwarded(replicas, request)

    problems.install(app)
    app.add_middleware(RequestGate, settings=settings)
    return app


async def forwarded(replicas: DeploymentHandle, request: Request) -> Response:
    """A replica's answer.

    Raises:
        APIProblem: it died before it began to answer.
    """
    body = await request.body()
    key = await asyncio.to_thread(routing_key, request.url.path, body)
    asked = {name: request.scope[name] for name in FORWARDED}
    number = (b"x-request-id", request.state.request_id.encode())
    asked["headers"] = [*(pair for pair in request.scope["headers"] if pair[0] != number[0]), number]
    parts = replicas.options(stream=True, session_id=key).remote(asked, body, key)
    try:
        first = await unless_gone(request, parts.__anext__())
    except (RayError, RayServeException) as error:
        raise _lost() from error
    except BaseException:
        parts.cancel()
        raise
    response = StreamedResponse(_bodies(first[1:], parts, first[0]), parts.cancel, status_code=first[0]["status"])
    response.raw_headers = [pair for pair in first[0]["headers"] if pair[0] != number[0]]
    return response


async def _bodies(first: list[Message], parts: Any, start: Message) -> AsyncIterator[bytes]:
    for message in first:
        yield message["body"]
    try:
        async for several in parts:
            for message in several:
                yield message["body"]
    except (RayError, RayServeException):
        if not dict(start["headers"])[b"content-type"].startswith(b"text/event-stream"):
            raise  # the connection is closed before its content is whole
        yield event(_lost().body).encode()


def _lost() -> APIProblem:
    said = "The replica that worked on this is gone; another goes on from the last finished turn: ask again."
    return APIProblem(503, said, code="replica_lost", headers={"Retry-After": "1"})


async def pages(replicas: DeploymentHandle) -> dict[str, bytes]:
    """The metrics of all replicas that work, by where they are."""
    try:
        said = await replicas.broadcast("page").results_async(timeout_s=PATIENCE, return_exceptions=True)
    except (TimeoutError, RayError, RayServeException):
        return {}
    return {one[0]: one[1] for one in said if isinstance(one, tuple) and one[1] is not None}
