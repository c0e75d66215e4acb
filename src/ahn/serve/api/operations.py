"""What is not about one reply: the models, the page, tokens, health, metrics, and the conversations that are kept."""

import asyncio
import contextlib
import dataclasses
import secrets
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.responses import FileResponse

from ahn.errors import AHNError, reason
from ahn.serve.api.answers import identity
from ahn.serve.api.fields import SessionFields, TokenizeFields
from ahn.serve.api.messages import StorageError
from ahn.serve.api.problems import APIProblem
from ahn.serve.api.service import Service
from ahn.serve.api.settings import RESPONSE, is_session
from ahn.serve.api.wire import JSONRoute, answer
from ahn.serve.request import ConversationInfo

PAGE = Path(__file__).with_name("page.html")


def router(service: Service) -> APIRouter:
    routes = APIRouter(route_class=JSONRoute, tags=["server"])

    @routes.get("/", include_in_schema=False)
    async def page() -> Response:
        nonce = secrets.token_urlsafe(16)
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; "
            "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        html = PAGE.read_text(encoding="utf-8").replace("NONCE", nonce)
        headers = {"Content-Security-Policy": policy, "Cache-Control": "no-cache", "Referrer-Policy": "no-referrer"}
        return Response(html, headers=headers, media_type="text/html")

    @routes.get("/health")
    async def health() -> Response:
        """200 while the engine works, 503 when it does not."""
        if not service.engine.alive():
            raise APIProblem(503, "The engine has stopped.")
        return answer({"status": "ok"})

    @routes.get("/metrics")
    async def metrics() -> Response:
        """Counts and times, for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @routes.get("/v1/models")
    async def models() -> Response:
        """The model that is served."""
        return answer({"object": "list", "data": [_model(service)]})

    @routes.get("/v1/models/{model:path}")
    async def model(model: str) -> Response:
        """The model that is served, by its name."""
        service.check_model(model)
        return answer(_model(service))

    @routes.post("/tokenize")
    async def tokenize(fields: TokenizeFields) -> Response:
        """Token ids of a text, or of messages up to where a reply begins."""
        service.check_model(fields.model)
        if fields.messages is not None:
            given = [message.message() for message in fields.messages]
            ids = await asyncio.to_thread(service.text.prompt, given)
        else:
            ids = await asyncio.to_thread(service.text.ids, fields.prompt or "", fields.add_special_tokens)
        return answer({"count": len(ids), "max_model_len": service.settings.prompt, "tokens": ids.tolist()})

    return routes


def conversations(service: Service) -> APIRouter:
    """Routes for the conversations that are kept: sessions by their name, responses by their id."""
    routes = APIRouter(route_class=JSONRoute, tags=["conversations"])

    @routes.post("/close_session")
    async def close_session(fields: SessionFields, request: Request) -> Response:
        """Forget a session."""
        owner, session = request.state.owner, fields.session_id
        known = await asyncio.to_thread(service.store.close_session, owner, session)
        state = await asyncio.to_thread(service.engine.store.forget, owner, session)
        if not known and not state:
            said = f"There is no session {ascii(session)[:150]}."
            raise APIProblem(404, said, "session_id", "session_not_found")
        return answer({"session_id": session, "closed": True})

    @routes.get("/conversations")
    async def listed(request: Request) -> Response:
        """All that are kept under a name."""
        kept = await asyncio.to_thread(_newest, service, request.state.owner)
        return answer({"object": "list", "data": [_shown(service, info) for info in kept.values()]})

    @routes.get("/conversations/{name}")
    async def one(name: str, request: Request) -> Response:
        """What a conversation takes, and what it would take with full attention."""
        return answer(_shown(service, await asyncio.to_thread(_named, service, request.state.owner, name)))

    @routes.get("/conversations/{name}/state")
    async def exported(name: str, request: Request) -> Response:
        """A conversation as a file: its state and what was said."""
        with contextlib.ExitStack() as end:
            file = end.enter_context(_room("ahn-export-"))
            await asyncio.to_thread(_export, service, request.state.owner, name, file)
            return TemporaryFileResponse(file, end.pop_all(), filename=f"{name}.safetensors")

    @routes.put("/conversations/{name}/state")
    async def imported(name: str, request: Request) -> Response:
        """Take a conversation in that was exported, by this server or one with the same model, as a session.

        The answer has its messages, and the name of its last turn, from which a response can go on.
        """
        if not is_session(name):
            said = f"a session has 1 to 128 letters, digits and signs of _.:- and does not begin with {RESPONSE}."
            raise APIProblem(400, f"name: {said}", "name", "invalid_value")
        owner = request.state.owner
        with _room("ahn-import-") as file:
            await _received(request.stream(), file)
            try:
                messages = await asyncio.to_thread(service.engine.store.take_in, owner, name, file)
            except AHNError as error:
                raise APIProblem(400, str(error).replace(str(file), "The file")) from error
        turn = identity("turn_") if messages else None
        if turn is not None:
            await asyncio.to_thread(service.store.add, owner, turn, messages, session=name)
        return answer({"name": name, "imported": True, "turn": turn, "messages": messages})

    return routes


@contextlib.contextmanager
def _room(prefix: str) -> Iterator[Path]:
    """A place for a file, which is deleted afterwards."""
    try:
        with tempfile.TemporaryDirectory(prefix=prefix) as directory:
            yield Path(directory) / "state"
    except OSError as error:
        raise StorageError(f"There is no room for the file: {reason(error)}.") from error


class TemporaryFileResponse(FileResponse):
    """A file that is deleted when it was sent, or could not be."""

    def __init__(self, file: Path, end: contextlib.ExitStack, **options: Any) -> None:
        super().__init__(file, **options)
        self._end = end

    async def __call__(self, *where: Any) -> None:
        try:
            await super().__call__(*where)
        finally:
            await asyncio.to_thread(self._end.close)


def _model(service: Service) -> dict[str, Any]:
    base = {"id": service.settings.model, "object": "model", "created": service.created, "owned_by": "ahn"}
    return base | {"max_model_len": service.settings.prompt}


def _newest(service: Service, owner: str) -> dict[str, ConversationInfo]:
    """By name, the newest state of each: older ones are kept as long as there is room, to be forked."""
    kept = sorted(service.engine.store.conversations(owner), key=lambda info: info.used)
    return {info.name: info for info in kept if info.name is not None}


def _named(service: Service, owner: str, name: str) -> ConversationInfo:
    if (info := _newest(service, owner).get(name)) is None:
        said = f"There is no conversation {ascii(name)[:150]}."
        raise APIProblem(404, said, "name", "conversation_not_found")
    return info


def _shown(service: Service, info: ConversationInfo) -> dict[str, Any]:
    whole = {"bytes": sum(info.parts.values()), "full_attention_bytes": service.full_bytes(info.tokens)}
    return dataclasses.asdict(info) | whole


def _export(service: Service, owner: str, name: str, file: Path) -> None:
    """Raises APIProblem for a conversation that is not kept, or a disk that is full."""
    _named(service, owner, name)
    turn = name if name.startswith(RESPONSE) else service.store.head(owner, name)
    said = [] if turn is None else service.store.messages(owner, turn) or []
    try:
        service.engine.store.export(owner, name, file, said)
    except AHNError as error:
        raise APIProblem(507, str(error).replace(str(file), "The file")) from error


async def _received(chunks: AsyncIterator[bytes], file: Path) -> None:
    with file.open("wb") as out:
        async for chunk in chunks:
            await asyncio.to_thread(out.write, chunk)
