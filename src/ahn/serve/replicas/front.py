"""What stands before the replicas: it hands each request to the one that holds its conversation."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from aiohttp import ClientResponse
from fastapi import FastAPI, Request, Response
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from ahn.serve.api import problems
from ahn.serve.api.gate import RequestGate
from ahn.serve.api.problems import APIProblem
from ahn.serve.api.settings import ServerSettings
from ahn.serve.api.wire import StreamedResponse, answer, event, unless_gone
from ahn.serve.replicas.pages import merged
from ahn.serve.replicas.routing import routing_key
from ahn.serve.replicas.wire import ROUTE, SECRET, ReplicaLostError, answered, ask, body_of, line

METHODS = ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"]
NUMBER = b"x-request-id"
PATIENCE = 5.0
"""Seconds that replicas have to say how they are."""


def make_front(replicas: DeploymentHandle, secret: str, settings: ServerSettings, stop: Callable[[], None]) -> FastAPI:
    """The app before some replicas, which know its secret; `stop` is called at its end."""

    @contextlib.asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        async with line() as app.state.session:
            yield
        await asyncio.to_thread(stop)

    app = FastAPI(lifespan=life, openapi_url=None)
    app.state.close = lambda seconds: replicas.broadcast("close", seconds).results(timeout_s=2 * seconds)

    @app.get("/health")
    async def health() -> Response:
        """200 while any replica works; how many do."""
        working = len(await pages(replicas))
        if not working:
            raise APIProblem(503, "No replica works.")
        return answer({"status": "ok", "replicas": working})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(merged(await pages(replicas)), media_type="text/plain; version=0.0.4")

    @app.api_route("/{path:path}", methods=METHODS)
    async def forward(request: Request) -> Response:
        return await forwarded(replicas, secret, request)

    problems.install(app)
    app.add_middleware(RequestGate, settings=settings)
    return app


async def forwarded(replicas: DeploymentHandle, secret: str, request: Request) -> Response:
    """A replica's answer."""
    body = await request.body()
    key = await asyncio.to_thread(routing_key, request.url.path, body)
    own = {NUMBER: request.state.request_id.encode(), SECRET: secret.encode(), ROUTE: key.encode()}
    headers = [*(pair for pair in request.scope["headers"] if pair[0] not in own), *own.items()]
    target = request.scope["raw_path"] + (b"?" + query if (query := request.scope["query_string"]) else b"")
    try:
        address = await replicas.options(session_id=key).address.remote()
        given = await unless_gone(
            request, ask(request.app.state.session, address, request.method, target, headers, body)
        )
    except (RayError, RayServeException, ReplicaLostError) as error:
        raise _lost() from error
    response = StreamedResponse(_body(given), given.close, status_code=given.status)
    response.raw_headers = [pair for pair in answered(given) if pair[0] != NUMBER]
    return response


async def _body(given: ClientResponse) -> AsyncIterator[bytes]:
    try:
        async for content in body_of(given):
            yield content
    except ReplicaLostError:
        if given.content_type != "text/event-stream":
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
