"""`/v1/responses`: each response is a conversation that can be gone on from, any number of times."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response

from ahn.serve.api.chat import DEFAULT
from ahn.serve.api.fields import InputItem, ResponsesFields
from ahn.serve.api.problems import APIProblem
from ahn.serve.api.replies import RunningReplies, WrittenReply
from ahn.serve.api.service import Service, identity, usage
from ahn.serve.api.sessions import Turn, response_turn
from ahn.serve.api.settings import RESPONSE
from ahn.serve.api.wire import JSONRoute, answer, comment, event, event_stream, unless_gone
from ahn.serve.request import Delta, GenerationRequest, SamplingOptions, TokenIds


def router(service: Service) -> APIRouter:
    """The routes, for a service."""
    routes = APIRouter(prefix="/v1/responses", tags=["responses"], route_class=JSONRoute)

    @routes.post("")
    async def create_response(fields: ResponsesFields, request: Request) -> Response:
        """Answer, going on from an earlier response or from nothing."""
        service.check_model(fields.model)
        responding = await Responding.begin(service, fields, request.state.owner, request.state.route)
        if fields.stream:
            return event_stream(responding.events(), responding.running.cancel)
        return answer(await unless_gone(request, responding.whole()))

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
    return APIProblem(404, f"There is no response {ascii(name)[:150]}.", "response_id", "response_not_found")


@dataclasses.dataclass
class Responding:
    """One response while it is written."""

    service: Service
    fields: ResponsesFields
    turn: Turn
    prompt: TokenIds
    id: str
    running: RunningReplies
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))
    item: str = dataclasses.field(default_factory=lambda: identity("msg_"))

    @classmethod
    async def begin(cls, service: Service, fields: ResponsesFields, owner: str, route: str) -> Responding:
        """Check a request and hand it to the engine.

        Args:
            route: with which the response's id begins: of several replicas, the conversation's has it from there.
        """
        turn = await response_turn(service, owner, fields.previous_response_id, fields.instructions, _messages(fields))
        prompt = await asyncio.to_thread(service.text.prompt, turn.messages)
        new = service.new_tokens(fields.max_output_tokens, "max_output_tokens", DEFAULT, [prompt], "input")
        form = fields.text.format if fields.text is not None else None
        options = dataclasses.replace(
            _sampling(service.defaults, fields),
            max_tokens=new,
            processors=await service.processors(form),
        )
        name, known = identity(RESPONSE + route), service.text.known_as(turn.messages, prompt, ())
        kept = name if fields.store else None
        running = service.start([GenerationRequest(prompt, options, owner, kept, fields.store, known)])
        return cls(service, fields, turn, prompt, name, running)

    @property
    def written(self) -> WrittenReply:
        """The reply so far."""
        return self.running.written[0]

    async def whole(self) -> dict[str, Any]:
        """The response, when all is written."""
        await self.running.all()
        return await self._kept()

    async def events(self) -> AsyncIterator[str]:
        """The same as a stream."""
        numbers = itertools.count()

        def say(kind: str, **what: Any) -> str:
            return event({"type": kind, "sequence_number": next(numbers), **what}, kind)

        place = {"item_id": self.item, "output_index": 0, "content_index": 0}
        yield say("response.created", response=self._object("in_progress"))
        yield say("response.in_progress", response=self._object("in_progress"))
        yield say("response.output_item.added", output_index=0, item=self._item("in_progress", []))
        yield say("response.content_part.added", **place, part=self._part(Delta()))
        try:
            async for _, delta in self.running.deltas():
                if delta.text or delta.logprobs:  # a part of a character has no text yet
                    said = {"delta": delta.text, "logprobs": self._logprobs(delta)}
                    yield say("response.output_text.delta", **place, **said)
                elif not delta.tokens and delta.finish is None:
                    yield comment(f"read {delta.read}/{len(self.prompt)}")
            final = await self._kept()
            part = self._part(self.written)
            yield say("response.output_text.done", **place, text=part["text"], logprobs=part["logprobs"])
            yield say("response.content_part.done", **place, part=part)
            yield say("response.output_item.done", output_index=0, item=final["output"][0])
            yield say(f"response.{final['status']}", response=final)
        except APIProblem as problem:
            failed = self._object("failed")
            failed["error"] = {"code": "server_error", "message": str(problem.detail)}
            yield say("response.failed", response=failed)

    async def _kept(self) -> dict[str, Any]:
        """The finished response, written down if it is to be kept."""
        status = "completed" if self.written.finish == "stop" else "incomplete"
        final = self._object(status)
        if self.fields.store:
            await self.turn.keep(self.service, self.written.text, self.id, final)
        return final

    def _item(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.item, "type": "message", "role": "assistant", "status": status, "content": content}

    def _part(self, what: Delta | WrittenReply) -> dict[str, Any]:
        return {"type": "output_text", "text": what.text, "annotations": [], "logprobs": self._logprobs(what)}

    def _logprobs(self, what: Delta | WrittenReply) -> list[dict[str, Any]]:
        return [self.service.spread(token, self.fields.top_logprobs) for token in what.logprobs]

    def _object(self, status: str) -> dict[str, Any]:
        done = status in ("completed", "incomplete")
        fields, chosen = self.fields, _sampling(self.service.defaults, self.fields)
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
            "temperature": chosen.temperature,
            "text": {"format": {"type": "text"}} if fields.text is None else fields.text.model_dump(by_alias=True),
            "tool_choice": "none",
            "tools": [],
            "top_p": chosen.top_p,
            "truncation": fields.truncation,
            "usage": self._usage() if done else None,
        }

    def _usage(self) -> dict[str, Any]:
        counts = usage([len(self.prompt)], [self.written])
        return {
            "input_tokens": counts["prompt_tokens"],
            "input_tokens_details": counts["prompt_tokens_details"],
            "output_tokens": counts["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": counts["total_tokens"],
        }


def _messages(fields: ResponsesFields) -> list[dict[str, str]]:
    if isinstance(fields.input, str):
        return [{"role": "user", "content": fields.input}]
    return [InputItem.message(item) for item in fields.input]


def _sampling(defaults: SamplingOptions, fields: ResponsesFields) -> SamplingOptions:
    """How tokens are chosen, but for what is to come out."""
    return dataclasses.replace(
        defaults,
        temperature=defaults.temperature if fields.temperature is None else fields.temperature,
        top_p=defaults.top_p if fields.top_p is None else fields.top_p,
        seed=fields.seed,
        logprobs=fields.top_logprobs or None,
    )
