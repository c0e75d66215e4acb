"""`/v1/chat/completions`."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from typing import Any

from fastapi import APIRouter, Request, Response

from ahn.serve.api.answers import Completion, identity, sampling
from ahn.serve.api.fields import ChatFields
from ahn.serve.api.replies import WrittenReply
from ahn.serve.api.service import Service
from ahn.serve.api.sessions import Turn, session_turn
from ahn.serve.api.wire import JSONRoute


def router(service: Service) -> APIRouter:
    routes = APIRouter(route_class=JSONRoute, tags=["chat"])

    @routes.post("/v1/chat/completions")
    async def chat_completions(fields: ChatFields, request: Request) -> Response:
        """Answer a conversation."""
        service.check_model(fields.model)
        with contextlib.ExitStack() as end:
            if fields.session_id is not None:
                lock = await service.hold_session(request, fields.session_id)
                end.callback(lock.release)
            return await (await begin(service, fields, request.state.owner)).respond(request, end)

    return routes


async def begin(service: Service, fields: ChatFields, owner: str) -> ChatCompletion:
    service.check_choices(fields.n)
    turn = await session_turn(service.store, owner, fields.session_id, [each.message() for each in fields.messages])
    prompt = await asyncio.to_thread(service.text.prompt, turn.messages)
    options = sampling(service, fields, [prompt], logprobs=fields.top_logprobs if fields.logprobs else None)
    known = service.text.known_as(turn.messages, prompt, options.stop)
    own = {"owner": owner, "name": fields.session_id, "keep": fields.store, "known_as": known}
    running = await service.start([prompt], options, fields.n, fields.schema_of_reply, **own)
    return ChatCompletion(service, fields, [prompt], running, identity("chatcmpl-"), turn=turn)


@dataclasses.dataclass
class ChatCompletion(Completion[ChatFields]):
    KIND, CHUNK = "chat.completion", "chat.completion.chunk"

    turn: Turn = dataclasses.field(kw_only=True)

    async def keep(self) -> None:
        if self.turn.session is not None and self.fields.store:  # a session's request has one reply
            await self.turn.keep(self.service.store, self.running.written[0].text, identity("turn_"))

    def first(self) -> list[dict[str, Any]]:
        return [self._of(n, "delta", {"role": "assistant", "content": ""}) for n in range(self.fields.n)]

    def choice(self, n: int, reply: WrittenReply) -> dict[str, Any]:
        message = {"role": "assistant", "content": reply.text, "refusal": None}
        return self._of(n, "message", message, reply)

    def part(self, n: int, new: WrittenReply) -> dict[str, Any]:
        return self._of(n, "delta", {"content": new.text} if new.text or new.logprobs else {}, new)

    def _of(self, n: int, name: str, said: dict[str, Any], what: WrittenReply | None = None) -> dict[str, Any]:
        logprobs = None
        if self.fields.logprobs and what is not None and (what.logprobs or name == "message"):
            logprobs = {"content": [self.service.spread(token, self.fields.top_logprobs) for token in what.logprobs]}
        return {"index": n, name: said, "logprobs": logprobs, "finish_reason": what and what.finish}

    def object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return super().object(kind, choices) | ({"session_id": self.turn.session} if self.turn.session else {})
