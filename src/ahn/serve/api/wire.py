"""JSON, server-sent events, and noticing that a client has gone."""

import asyncio
import json
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

import numpy as np
from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

Result = TypeVar("Result")
DONE = "data: [DONE]\n\n"
LONG = 1 << 14
"""Bytes from which on it is worth to look for token ids in a body."""
PROMPT = re.compile(rb'"prompt"\s*:\s*\[')
STANDS_FOR_IDS = secrets.token_hex()


def parsed(body: bytes) -> Any:
    """What JSON says; a `prompt` of many token ids may be an array (L,) int32 rather than a list.

    Raises:
        ValueError, RecursionError: it is no JSON.
    """
    try:
        found = _with_token_ids(body) if len(body) >= LONG else None
        return from_json(body) if found is None else found
    except ValueError:
        return json.loads(body)  # it says better what is wrong, and takes what is only unusual, such as UTF-16


def _with_token_ids(body: bytes) -> Any:
    """What JSON with a `prompt` of token ids says; None for any other, and for numbers that are no such ids.

    A list of Python's numbers takes three times as long to make as the array that is needed. So the list is cut out
    and read by numpy, and a text that no client can know stands in its place while the rest is read.
    """
    opening = PROMPT.search(body)
    if opening is None:
        return None
    start, stop = opening.end(), body.find(b"]", opening.end())
    numbers = body[start:stop]
    text = np.frombuffer(numbers, np.uint8)
    digits, commas = np.count_nonzero(text - ord("0") < 10), np.count_nonzero(text == ord(","))
    if digits + commas + sum(np.count_nonzero(text == ord(space)) for space in " \n") != len(text):
        return None
    try:
        ids = np.fromstring(numbers, np.int64, sep=",")
    except ValueError:
        return None
    # numpy reads more than JSON allows: as many numbers as commas, and no digit too many, say that it is JSON.
    if len(ids) != commas + 1 or ids.max() >= 1 << 31:
        return None
    if len(ids) + sum(np.count_nonzero(ids >= 10**n) for n in range(1, 10)) != digits:
        return None
    rest = from_json(b"%b%b%b" % (body[: start - 1], json.dumps(STANDS_FOR_IDS).encode(), body[stop + 1 :]))
    if not isinstance(rest, dict) or rest.get("prompt") != STANDS_FOR_IDS:
        return None  # it is the prompt of something else within
    return rest | {"prompt": ids.astype(np.int32)}


class JSONRequest(Request):
    """A request whose JSON is `parsed`."""

    async def json(self) -> Any:
        """The body."""
        return parsed(await self.body())


class JSONRoute(APIRoute):
    """A route whose requests are `JSONRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """As FastAPI has it."""
        handler = super().get_route_handler()

        async def handled(request: Request) -> Response:
            return await handler(JSONRequest(request.scope, request.receive))

        return handled


def dumped(value: Any) -> str:
    """Compact JSON, of ASCII alone: what a client sent and gets back may be no valid text."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def answer(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(dumped(value), status, headers, media_type="application/json")


def event(value: Any, name: str | None = None) -> str:
    return (f"event: {name}\n" if name else "") + f"data: {dumped(value)}\n\n"


class StreamedResponse(StreamingResponse):
    """Parts until there are no more or the client has gone; `end` is called in either case."""

    def __init__(self, parts: AsyncIterator[Any], end: Callable[[], object], **options: Any) -> None:
        super().__init__(parts, **options)
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._end()


def event_stream(events: AsyncIterator[str], end: Callable[[], object]) -> Response:
    """Server-sent events as a response; `end` as of `StreamedResponse`."""
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamedResponse(events, end, headers=headers, media_type="text/event-stream")


async def unless_gone(request: Request, work: Awaitable[Result]) -> Result:
    """The result of some work, which is given up when the client has gone.

    Raises:
        ClientDisconnect: it has.
    """
    working = asyncio.ensure_future(work)
    gone = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        gone.cancel()
        working.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
