"""What goes between front and replica is whole or known to be broken off; tests/cli/test_serve.py has real ones."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("aiohttp")

from aiohttp import ClientResponse
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send

from ahn.serve.replicas.wire import ROUTE, SECRET, FrontAlone, ReplicaLostError, answered, ask, body_of, line

JSON = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json"), (b"transfer-encoding", b"chunked")]


async def whole(answer: ClientResponse) -> bytes:
    try:
        return b"".join([content async for content in body_of(answer)])
    finally:
        answer.close()


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_is_passed_on(live_fake: Callable[..., Any], stream: bool) -> None:
    server, _ = live_fake()
    body = json.dumps({"prompt": [1, 2, 3], "max_tokens": 3, "stream": stream}).encode()

    async def go() -> tuple[int, dict[bytes, bytes], bytes]:
        async with line() as session:
            given = await ask(session, ("127.0.0.1", server.port), "POST", b"/v1/completions", JSON, body)
            return given.status, dict(answered(given)), await whole(given)

    status, headers, content = asyncio.run(go())
    assert status == 200 and not {b"connection", b"transfer-encoding", b"date"} & headers.keys()
    assert (b"[DONE]" in content) == stream and content.count(b'"choices"') >= (3 if stream else 1)


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nconte",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nwhole\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nall.\r\n",
    ],
)
def test_what_breaks_off_is_lost(said: bytes) -> None:
    async def replica(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(said)
        await writer.drain()
        writer.close()

    async def go() -> None:
        async with await asyncio.start_server(replica, "127.0.0.1", 0) as server, line() as session:
            await whole(await ask(session, server.sockets[0].getsockname(), "GET", b"/", JSON, b""))

    with pytest.raises(ReplicaLostError):
        asyncio.run(go())


def test_a_request_is_passed_on_as_it_came() -> None:
    """Path and query to the byte, the client's headers, and nothing that it had not said."""
    came: list[bytes] = []

    async def replica(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came.append(await reader.readuntil(b"\r\n\r\n") + await reader.readexactly(3))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()
        writer.close()

    async def go() -> None:
        async with await asyncio.start_server(replica, "127.0.0.1", 0) as server, line() as session:
            where = server.sockets[0].getsockname()
            await whole(
                await ask(session, where, "PUT", b"//a%2Fb/%C3%A9?x=%20+&x", [*JSON, (b"x-a", b"\xe9")], b"abc")
            )

    asyncio.run(go())
    said, *headers = came[0].partition(b"\r\n\r\n")[0].lower().split(b"\r\n")
    assert said == b"put //a%2fb/%c3%a9?x=%20+&x http/1.1" and came[0].endswith(b"abc")
    names = {header.partition(b":")[0] for header in headers}
    assert b"host: 127.0.0.1" in headers and names <= {
        b"host",
        b"content-type",
        b"x-a",
        b"content-length",
        b"connection",
    }


def test_a_replica_that_is_gone_is_lost() -> None:
    async def go() -> None:
        async with await asyncio.start_server(lambda *_: None, "127.0.0.1", 0) as server:
            address = server.sockets[0].getsockname()
        async with line() as session:
            await ask(session, address, "GET", b"/", JSON, b"")

    with pytest.raises(ReplicaLostError):
        asyncio.run(go())


def test_the_front_alone_may_ask() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        names = [name.decode() for name, _ in scope["headers"]]
        said = json.dumps([scope["state"]["route"], names]).encode()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": said})

    client = TestClient(FrontAlone(app, "secret"))
    own = {SECRET.decode(): "secret", ROUTE.decode(): "0123"}
    assert client.get("/").status_code == client.get("/", headers=own | {SECRET.decode(): "other"}).status_code == 403
    route, names = client.get("/", headers=own).json()
    assert route == "0123" and "host" in names and not own.keys() & set(names)
