"""What goes between the front and a replica: HTTP/1.1, a connection for each request, whose bytes go on as they come.

Ray says where a replica is; an object of Ray's for every token would cost more than making the token.
"""

import hmac
from collections.abc import AsyncIterator

import aiohttp
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from yarl import URL

SECRET, ROUTE = b"x-ahn-front", b"x-ahn-route"
"""Headers in which the front says who it is, and the key of a request's conversation."""
OF_A_CONNECTION = {b"connection", b"keep-alive", b"transfer-encoding", b"upgrade", b"expect", b"te", b"trailer"}
Headers = list[tuple[bytes, bytes]]


class ReplicaLostError(ConnectionError):
    """The other side is gone before it had said all."""


class FrontAlone:
    """Lets only the front ask, and takes from its headers what the app is to know."""

    def __init__(self, app: ASGIApp, secret: str) -> None:
        self.app, self.secret = app, secret.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        own = {name: value for name, value in scope["headers"] if name in (SECRET, ROUTE)}
        if not hmac.compare_digest(own.get(SECRET, b""), self.secret):
            await PlainTextResponse("Ask the server, not its replicas.", 403)(scope, receive, send)
            return
        asked = {**scope, "state": {"route": own[ROUTE].decode()}}
        asked["headers"] = [pair for pair in scope["headers"] if pair[0] not in own]
        await self.app(asked, receive, send)


async def body_of(answer: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """As it comes: what came together comes together."""
    try:
        async for content in answer.content.iter_any():
            yield content
    except (aiohttp.ClientError, OSError) as error:
        raise ReplicaLostError(str(error)) from error


def line() -> aiohttp.ClientSession:
    """What requests to replicas are made with: a connection for each, for as long as it takes, and nothing added."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None),
        auto_decompress=False,
        skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
    )


async def ask(
    session: aiohttp.ClientSession, address: tuple[str, int], method: str, target: bytes, headers: Headers, body: bytes
) -> aiohttp.ClientResponse:
    """A replica's answer to a request, up to its body; it is to be closed when no more of it is wanted."""
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    where = URL(f"http://{host}:{address[1]}{target.decode('latin-1')}", encoded=True)
    own = OF_A_CONNECTION | {b"content-length"}
    passed = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers if name not in own]
    try:
        return await session.request(method, where, headers=passed, data=body, allow_redirects=False)
    except (aiohttp.ClientError, OSError) as error:
        raise ReplicaLostError(str(error)) from error


def answered(answer: aiohttp.ClientResponse) -> Headers:
    """Of an answer's headers, those that are passed on: the others are of its connection, or added anew."""
    headers = [(name.lower(), value) for name, value in answer.raw_headers]
    return [pair for pair in headers if pair[0] not in OF_A_CONNECTION and pair[0] not in (b"date", b"server")]
