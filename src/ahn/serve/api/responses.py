"""`/v1/responses`: each response is a conversation that can be gone on from, any number of times."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response

from ahn.serve.api.answers import Answering, identity, sampling
from ahn.serve.api.fields import ResponsesFields
from ahn.serve.api.problems import APIProblem, problem_of
from ahn.serve.api.replies import WrittenReply
from ahn.serve.api.service import Service
from ahn.serve.api.sessions import Turn, response_turn, unknown_response
from ahn.serve.api.settings import RESPONSE
from ahn.serve.api.wire import JSONRoute, answer, event
from ahn.serve.request import SamplingOptions


def router(service: Service) -> APIRouter:
    routes = APIRouter(route_class=JSONRoute, prefix="/v1/responses", tags=["responses"])

    @routes.post("")
    async def create_response(fields: ResponsesFields, request: Request) -> Response:
        """Answer, going on from an earlier response or from nothing."""
        service.check_model(fields.model)
        state = request.state
        return await (await begin(service, fields, state.owner, state.route)).respond(request)

    @routes.get("/{response_id}")
    async def get_response(response_id: str, request: Request, stream: bool = False) -> Response:
        """A response that was kept."""
        if stream:
            said = "stream: what is finished is not streamed again."
            raise APIProblem(400, said, "stream", "unsupported_parameter")
        shown = await asyncio.to_thread(service.store.shown, request.state.owner, response_id)
        if shown is None:
            raise _unknown(response_id)
        return answer(shown)

    @routes.delete("/{response_id}")
    async def delete_response(response_id: str, request: Request) -> Response:
        """Forget a response and the state of its conversation."""
        owner = request.state.owner
        if not await asyncio.to_thread(service.store.delete, owner, response_id):
            raise _unknown(response_id)
        await asyncio.to_thread(service.engine.store.forget, owner, response_id)
        return answer({"id": response_id, "object": "response", "deleted": True})

    return routes


def _unknown(name: str) -> APIProblem:
    return unknown_response(name, "response_id", "response_not_found")


async def begin(service: Service, fields: ResponsesFields, owner: str, route: str) -> Responding:
    """Check a request and hand it to the engine.

    Args:
        route: with which the response's id begins: of several replicas, the conversation's has it from there.
    """
    turn = await response_turn(service.store, owner, fields)
    prompt = await asyncio.to_thread(service.text.prompt, turn.messages)
    options = sampling(service, fields, [prompt], logprobs=fields.top_logprobs or None)
    name, known = identity(RESPONSE + route), service.text.known_as(turn.messages, prompt, ())
    own = {"owner": owner, "name": name if fields.store else None, "keep": fields.store, "known_as": known}
    running = await service.start([prompt], options, 1, fields.schema_of_reply, **own)
    return Responding(service, fields, [prompt], running, name, turn=turn, options=options)


@dataclasses.dataclass(kw_only=True)
class Responding(Answering[ResponsesFields]):
    turn: Turn
    options: SamplingOptions
    item: str = dataclasses.field(default_factory=lambda: identity("msg_"))

    @property
    def written(self) -> WrittenReply:
        return self.running.written[0]

    async def whole(self) -> dict[str, Any]:
        await self.running.all()
        return await self._kept()

    async def events(self) -> AsyncIterator[str]:
        numbers = itertools.count()

        def say(kind: str, **what: Any) -> str:
            return event({"type": kind, "sequence_number": next(numbers), **what}, kind)

        place = {"item_id": self.item, "output_index": 0, "content_index": 0}
        yield say("response.created", response=self._object("in_progress"))
        yield say("response.in_progress", response=self._object("in_progress"))
        yield say("response.output_item.added", output_index=0, item=self._item("in_progress", []))
        yield say("response.content_part.added", **place, part=self._part(WrittenReply()))
        try:
            async for n, new in self.running.news():
                if new.text or new.logprobs:  # a part of a character has no text yet
                    said = {"delta": new.text, "logprobs": self._logprobs(new)}
                    yield say("response.output_text.delta", **place, **said)
                elif new.only_read:
                    yield self.progress(n, new)
            final = await self._kept()
            part = self._part(self.written)
            yield say("response.output_text.done", **place, text=part["text"], logprobs=part["logprobs"])
            yield say("response.content_part.done", **place, part=part)
            yield say("response.output_item.done", output_index=0, item=final["output"][0])
            yield say(f"response.{final['status']}", response=final)
        except Exception as error:
            failed = self._object("failed")
            failed["error"] = {"code": "server_error", "message": problem_of(error).detail}
            yield say("response.failed", response=failed)

    async def _kept(self) -> dict[str, Any]:
        """The finished response, written down if it is to be kept."""
        status = "completed" if self.written.finish == "stop" else "incomplete"
        final = self._object(status)
        if self.fields.store:
            await self.turn.keep(self.service.store, self.written.text, self.id, final)
        return final

    def _item(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.item, "type": "message", "role": "assistant", "status": status, "content": content}

    def _part(self, what: WrittenReply) -> dict[str, Any]:
        return {"type": "output_text", "text": what.text, "annotations": [], "logprobs": self._logprobs(what)}

    def _logprobs(self, what: WrittenReply) -> list[dict[str, Any]]:
        return [self.service.spread(token, self.fields.top_logprobs) for token in what.logprobs]

    def _object(self, status: str) -> dict[str, Any]:
        done = status in ("completed", "incomplete")
        fields = self.fields
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": fields.instructions,
            "max_output_tokens": fields.max_output_tokens,
            "metadata": fields.metadata,
            "model": self.service.settings.model,
            "output": [self._item(status, [self._part(self.written)])] if done else [],
            "parallel_tool_calls": False,
            "previous_response_id": fields.previous_response_id,
            "store": fields.store,
            "temperature": self.options.temperature,
            "text": {"format": {"type": "text"}} if fields.text is None else fields.text.model_dump(by_alias=True),
            "tool_choice": "none",
            "tools": [],
            "top_p": self.options.top_p,
            "truncation": fields.truncation,
            "usage": self._usage() if done else None,
        }

    def _usage(self) -> dict[str, Any]:
        counts = self.usage()
        return {
            "input_tokens": counts["prompt_tokens"],
            "input_tokens_details": counts["prompt_tokens_details"],
            "output_tokens": counts["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": counts["total_tokens"],
        }
