"""Errors in OpenAI's form, `{"error": {"message", "type", "param", "code"}}`, whatever went wrong and wherever."""

import json
import logging
import math
import sqlite3
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from ahn.errors import AHNError
from ahn.serve.api.messages import StorageError
from ahn.serve.api.wire import answer
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
    507: "storage_failed",
}
log = logging.getLogger(__name__)


class APIProblem(HTTPException):
    """An error that a client is told."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.param, self.code = param, code or CODES.get(status)

    @property
    def body(self) -> dict[str, Any]:
        kind = KINDS.get(self.status_code, "invalid_request_error" if self.status_code < 500 else "server_error")
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return answer(self.body, self.status_code, self.headers)


def problem_of(error: Exception) -> APIProblem:
    """What a client is told of an error; one that nobody expected goes into the log."""
    match error:
        case APIProblem():
            return error
        case RequestValidationError():
            return of_fields(error.errors())
        case EngineBusy():
            return APIProblem(429, str(error), headers={"Retry-After": str(max(1, math.ceil(error.retry_after)))})
        case StorageError():
            return APIProblem(507, str(error))
        case sqlite3.Error():
            return APIProblem(507, f"Conversations cannot be kept: {error}.")
        case AHNError():
            return APIProblem(400, str(error))
    log.error("A request failed", exc_info=error)
    return APIProblem(500, "The server failed; its log has more.")


def install(app: FastAPI) -> None:
    """Every error of an app takes this form; what nobody expected is told by the gate, which counts it."""

    async def told(_: Request, error: Exception) -> Response:
        return problem_of(error).response()

    for kind in (RequestValidationError, EngineBusy, sqlite3.Error, AHNError):
        app.add_exception_handler(kind, told)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        if isinstance(error, APIProblem):
            return error.response()
        said, status = str(error.detail), HTTPStatus(error.status_code).phrase
        if said == status:
            said = f"{request.method} {request.url.path}: {status}."
        if isinstance(error.__cause__, UnicodeDecodeError):
            said = "The request is not JSON in UTF-8."
        return APIProblem(error.status_code, said, headers=error.headers).response()


def of_fields(errors: Sequence[Any]) -> APIProblem:
    """What is wrong with a request's fields: the first unknown one, else the one that is wrong deepest inside."""
    unknown = [error for error in errors if error["type"] == "extra_forbidden"]
    worst = unknown[0] if unknown else max(errors, key=lambda error: len(_path(error["loc"])))
    if worst["type"] == "json_invalid":
        return APIProblem(400, f"The request is not JSON: {worst.get('ctx', {}).get('error', 'malformed')}.")
    param = _path(worst["loc"])
    if unknown:
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
