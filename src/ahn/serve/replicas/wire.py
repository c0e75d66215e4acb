"""What goes between the front and a replica: HTTP/1.1, a connection for each request, whose bytes go on as they come.

Ray says where a replica is; an object of Ray's for every token would cost more than making the token.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hmac
from collections.abc import AsyncIterator, Iterable, Sequence

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

SECRET, ROUTE = b"x-ahn-front", b"x-ahn-route"
"""Headers in which the front says who it is, and the key of a request's conversation."""
OF_A_CONNECTION = {b"connection", b"keep-alive", b"transfer-encoding", b"upgrade", b"expect", b"te", b"trailer"}
READ = 1 << 16
Headers = list[tuple[bytes, bytes]]


class ReplicaLostError(ConnectionError):
    """The other side is gone before it had said all."""


class FrontAlone:
    """Lets only the front ask, and takes from its headers what the app is to know.

    Args:
        app: what answers.
        secret: of the front.
    """

    def __init__(self, app: ASGIApp, secret: str) -> None:
        self.app, self.secret = app, secret.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            return
        own = {name: value for name, value in scope["headers"] if name in (SECRET, ROUTE)}
        if not hmac.compare_digest(own.get(SECRET, b""), self.secret):
            await PlainTextResponse("Ask the server, not its replicas.", 403)(scope, receive, send)
            return
        asked = {**scope, "state": {"route": own[ROUTE].decode()}}
        asked["headers"] = [pair for pair in scope["headers"] if pair[0] not in own]
        await self.app(asked, receive, send)


@dataclasses.dataclass
class Answer:
    """What a replica answers; `close` is to be called when no more of it is wanted."""

    status: int
    headers: Headers
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def body(self) -> AsyncIterator[bytes]:
        """As it comes: what came together comes together.

        Raises:
            ReplicaLostError: it ended too early.
        """
        named = dict(self.headers)
        chunked = b"chunked" in named.get(b"transfer-encoding", b"")
        parts = Chunks() if chunked else Counted(int(named.get(b"content-length", 0)))
        while not parts.done:
            if not (came := await self._read()):
                raise ReplicaLostError("The connection was closed.")
            if content := parts.take(came):
                yield content

    async def _read(self) -> bytes:
        try:
            return await self.reader.read(READ)
        except OSError as error:
            raise ReplicaLostError(str(error)) from error

    def close(self) -> None:
        """The connection is no longer needed."""
        self.writer.close()


class Counted:
    """A body of a known length."""

    def __init__(self, length: int) -> None:
        self._left = length

    @property
    def done(self) -> bool:
        """Whether all has come."""
        return not self._left

    def take(self, came: bytes) -> bytes:
        """The content in some bytes."""
        content = came[: self._left]
        self._left -= len(content)
        return content


class Chunks:
    """A body in chunks, each with its length before it."""

    def __init__(self) -> None:
        self.done = False
        self._rest = b""

    def take(self, came: bytes) -> bytes:
        """The content in some bytes: of whole chunks."""
        held, place, content = self._rest + came, 0, []
        while (line := held.find(b"\r\n", place)) >= 0:
            size = int(held[place:line].partition(b";")[0], 16)
            start, place_after = line + 2, line + 4 + size
            if len(held) < place_after:
                break
            content.append(held[start : start + size])
            place = place_after
            if not size:
                self.done = True
                break
        self._rest = held[place:]
        return b"".join(content)


async def ask(address: tuple[str, int], method: str, target: bytes, headers: Headers, body: bytes) -> Answer:
    """A replica's answer to a request, up to its body.

    Raises:
        ReplicaLostError: there is nobody, or the answer ended too early.
    """
    try:
        reader, writer = await asyncio.open_connection(*address)
    except OSError as error:
        raise ReplicaLostError(str(error)) from error
    try:
        lines = [b"%s %s HTTP/1.1" % (method.encode(), target)]
        lines += [b"%s: %s" % pair for pair in [*_passed(headers), (b"content-length", b"%d" % len(body))]]
        writer.write(b"\r\n".join([*lines, b"connection: close", b"", b""]))
        writer.write(body)
        await writer.drain()
        head = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
        answered = [line.split(b": ", 1) for line in head[1:-2]]
        named = [(name.lower(), value) for name, value in answered]
        return Answer(int(head[0].split()[1]), named, reader, writer)
    except (OSError, asyncio.IncompleteReadError) as error:
        writer.close()
        raise ReplicaLostError(str(error)) from error
    except BaseException:
        writer.close()
        raise


def _passed(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    return [pair for pair in headers if pair[0] not in OF_A_CONNECTION and pair[0] != b"content-length"]


def answered(headers: Sequence[tuple[bytes, bytes]]) -> Headers:
    """Of an answer's headers, those that are passed on: the others are of its connection, or added anew."""
    return [pair for pair in headers if pair[0] not in OF_A_CONNECTION and pair[0] not in (b"date", b"server")]
