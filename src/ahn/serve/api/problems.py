"""Errors in OpenAI's form, `{"error": {"message", "type", "param", "code"}}`, whatever went wrong and wherever."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from ahn.errors import AHNError
from ahn.serve.request import EngineBusy

KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
"""The type of an error by its status; other 4xx are `invalid_request_error`, 5xx `server_error`."""
NO_OBJECT = "The request needs a body that is a JSON object, and the header Content-Type: application/json."
CODES = {
    405: "method_not_allowed",
    408: "timeout",
    413: "request_too_large",
    415: "unsupported_media_type",
    429: "server_busy",
    503: "unavailable",
}


class APIProblem(HTTPException):
    """An error that a client is told.

    Args:
        status: of HTTP.
        message: one sentence.
        param: the field of the request that is wrong.
        code: a word for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.param, self.code = param, code

    @property
    def body(self) -> dict[str, Any]:
        """As JSON."""
        return error_body(self.status_code, str(self.detail), self.param, self.code)

    def response(self) -> Response:
        """The same as a response."""
        return _response(self.status_code, self.body, self.headers)


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error as JSON."""
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code or CODES.get(status)}}


def install(app: FastAPI) -> None:
    """Every error of an app takes this form."""

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        if not isinstance(error, APIProblem):
            detail = str(error.detail)
            status = HTTPStatus(error.status_code).phrase
            said = f"{request.method} {request.url.path}: {status}." if detail == status else detail
            if isinstance(error.__cause__, UnicodeDecodeError):
                said = "The request is not JSON in UTF-8."
            error = APIProblem(error.status_code, said, headers=error.headers)
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def fields(_: Request, error: RequestValidationError) -> Response:
        return of_fields(error.errors()).response()

    @app.exception_handler(EngineBusy)
    async def full(_: Request, error: EngineBusy) -> Response:
        later = str(max(1, math.ceil(error.retry_after)))
        return APIProblem(429, str(error), headers={"Retry-After": later}).response()

    @app.exception_handler(AHNError)
    async def refused(_: Request, error: AHNError) -> Response:
        return APIProblem(400, str(error)).response()

    @app.exception_handler(sqlite3.Error)
    async def storage(_: Request, error: sqlite3.Error) -> Response:
        return APIProblem(507, f"Conversations cannot be kept: {error}.", code="storage_failed").response()

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        number = request.scope.get("state", {}).get("request_id", "unknown")
        return APIProblem(500, f"The server failed; its log has more, under {number}.").response()


def of_fields(errors: Sequence[Any]) -> APIProblem:
    """What is wrong with a request's fields: the first unknown one, else the one that is wrong deepest inside."""
    unknown = [error for error in errors if error["type"] == "extra_forbidden"]
    worst = unknown[0] if unknown else max(errors, key=lambda error: len(_path(error["loc"])))
    if worst["type"] == "json_invalid":
        return APIProblem(400, f"The request is not JSON: {worst.get('ctx', {}).get('error', 'malformed')}.")
    param = _path(worst["loc"])
    if worst["type"] == "extra_forbidden":
        return APIProblem(400, f"{param}: this server does not know this field.", param, "unsupported_parameter")
    said = worst["msg"]
    if worst["type"] == "value_error":  # of our own validators, which name the field within theirs
        field, _, said = str(worst["ctx"]["error"]).partition(": ")
        param = f"{param}.{field}" if param else field
    if not param:
        return APIProblem(400, NO_OBJECT, code="invalid_value")
    return APIProblem(400, f"{param}: {said}.", param, "invalid_value")


def _path(place: Sequence[str | int]) -> str:
    """`("body", "messages", 0, "content")` as `messages[0].content`; names of alternatives are left out."""
    path = ""
    for part in place[1:]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() and part not in ("str", "int"):
            path += f".{part}" if path else part
        elif not path:
            path = json.dumps(part)[1:-1]
    return path[:200]


def _response(status: int, body: Any, headers: Mapping[str, str] | None) -> Response:
    # ASCII alone: a message may name a field that is no valid text.
    return Response(json.dumps(body), status, headers=dict(headers or {}), media_type="application/json")
