"""What every request passes first: its number, its key, and bounds of size and patience."""

import asyncio
import logging
import re
import secrets
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ahn.serve.api.metrics import ServerMetrics
from ahn.serve.api.problems import APIProblem
from ahn.serve.api.settings import ServerSettings

OPEN = ("/", "/health", "/openapi.json")
"""What needs no key: a page without content, whether the server lives, and what it can do."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")
GONE = 499
"""Status by which a request is counted whose client has gone before there was an answer."""
log = logging.getLogger(__name__)


class RequestGate:
    """Stands before the app."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, metrics: ServerMetrics | None = None) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["method"] == "HEAD":  # as GET; the server leaves the body out
            scope = {**scope, "method": "GET"}
        headers = Headers(scope=scope)
        number = headers.get("x-request-id", "")
        number = number if re.fullmatch(r"[\w.:-]{1,128}", number, re.ASCII) else f"req_{secrets.token_hex(12)}"
        state = scope.setdefault("state", {})
        state["request_id"], state["owner"] = number, ""
        state.setdefault("route", secrets.token_hex(8))
        passage = PassingRequest(self.settings, scope, receive, send, number)
        try:
            if problem := self._refused(scope, headers):
                await problem.response()(scope, receive, passage.send)
            else:
                state["owner"] = self.settings.owner(_key(headers)) or ""
                await self.app(scope, passage.receive, passage.send)
        except (asyncio.CancelledError, ClientDisconnect):
            pass  # The server stops, or there is nobody to tell. Returning closes the connection.
        except Exception:
            log.exception("Request %s failed", number)
            if passage.status == GONE:  # nothing was said yet
                said = f"The server failed; its log has more, under {number}."
                await APIProblem(500, said).response()(scope, receive, passage.send)
        finally:
            if self.metrics is not None:
                route = scope.get("route")
                self.metrics.requests.labels(getattr(route, "path", "none"), str(passage.status)).inc()

    def _refused(self, scope: Scope, headers: Headers) -> APIProblem | None:
        """Why a request may not pass; decided before anything of its body is read."""
        if self.settings.local and "host" in headers and _host(headers["host"]) not in LOOPBACK:  # browsers send it
            return APIProblem(403, "This server answers only to names of this machine.", code="host_not_allowed")
        if scope["path"] not in OPEN and self.settings.owner(_key(headers)) is None:
            said = "A key is needed: Authorization: Bearer KEY."
            return APIProblem(401, said, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()) or int(length[:18]) > allowed(self.settings, scope):
            return _too_large(self.settings, scope)
        if headers.get("content-encoding", "identity") != "identity":
            return APIProblem(415, "Send the request's body as it is, without Content-Encoding.")
        return None


class PassingRequest:
    """One request's way in and its answer's way out."""

    def __init__(self, settings: ServerSettings, scope: Scope, receive: Receive, send: Send, number: str) -> None:
        self._settings, self._scope, self._receive, self._send = settings, scope, receive, send
        self._number, self._bytes, self._whole = number, 0, False
        self.status = GONE

    async def receive(self) -> Message:
        """The next part of the body."""
        if self._whole:
            return await self._receive()  # waits until the client goes
        try:
            async with asyncio.timeout(self._settings.stalled):
                message = await self._receive()
        except TimeoutError as error:
            raise APIProblem(408, "The request does not come.", headers={"Connection": "close"}) from error
        if message["type"] == "http.request":
            self._bytes += len(message.get("body", b""))
            self._whole = not message.get("more_body", False)
            if self._bytes > allowed(self._settings, self._scope):
                raise _too_large(self._settings, self._scope)
        return message

    async def send(self, message: Message) -> None:
        """A part of the answer.

        Raises:
            ClientDisconnect: the client does not take it. What waits for it in memory is one such part and what the
                connection buffers.
        """
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["X-Request-Id"] = self._number
            headers["X-Content-Type-Options"] = "nosniff"
        try:
            async with asyncio.timeout(self._settings.stalled):
                await self._send(message)
        except TimeoutError as error:
            raise ClientDisconnect from error


def allowed(settings: ServerSettings, scope: Scope) -> int:
    """Bytes that a request may have; a conversation that is imported may be larger than others."""
    imported = scope["method"] == "PUT" and scope["path"].startswith("/conversations/")
    return settings.state if imported else settings.body


def _too_large(settings: ServerSettings, scope: Scope) -> APIProblem:
    said = f"A request may have {allowed(settings, scope)} bytes here."
    return APIProblem(413, said, headers={"Connection": "close"})


def _key(headers: Headers) -> str:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _host(header: str) -> str:
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""
