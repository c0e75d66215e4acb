"""`/v1/chat/completions`."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response

from ahn.serve.api.fields import ChatFields, SamplingFields
from ahn.serve.api.problems import APIProblem
from ahn.serve.api.replies import RunningReplies, WrittenReply
from ahn.serve.api.service import Service, identity, seeded, usage
from ahn.serve.api.sessions import Turn, session_turn, turn_name
from ahn.serve.api.wire import DONE, JSONRoute, answer, comment, event, event_stream, unless_gone
from ahn.serve.request import Delta, GenerationRequest, SamplingOptions, TokenIds

DEFAULT = 1024
"""Tokens of a reply where a request does not say it."""


def router(service: Service) -> APIRouter:
    """The route, for a service."""
    routes = APIRouter(tags=["chat"], route_class=JSONRoute)

    @routes.post("/v1/chat/completions")
    async def chat_completions(fields: ChatFields, request: Request) -> Response:
        """Answer a conversation."""
        service.check_model(fields.model)
        with contextlib.ExitStack() as end:
            if fields.session_id is not None:
                lock = service.session(request.state.owner, fields.session_id)
                await lock.acquire()
                end.callback(lock.release)
            chat = await Chatting.begin(service, fields, request.state.owner)
            end.callback(chat.running.cancel)
            if fields.stream:
                return event_stream(chat.events(), end.pop_all().close)
            return answer(await unless_gone(request, chat.whole()))

    return routes


def sampling(service: Service, fields: SamplingFields, new: int, logprobs: int | None) -> SamplingOptions:
    """How tokens are chosen: as the request says, else as the model's settings say."""
    wanted = {name: getattr(fields, name) for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")}
    if wanted["top_k"] == -1:
        wanted["top_k"] = 0
    return dataclasses.replace(
        service.defaults,
        **{name: value for name, value in wanted.items() if value is not None},
        max_tokens=new,
        presence_penalty=fields.presence_penalty,
        frequency_penalty=fields.frequency_penalty,
        seed=fields.seed,
        stop=tuple(fields.stop),
        logit_bias={int(token): bias for token, bias in fields.logit_bias.items()},
        ignore_eos=fields.ignore_eos,
        logprobs=logprobs,
    )


def check_choices(service: Service, choices: int) -> None:
    """Raises APIProblem for more replies at once than one request may ask for."""
    if choices > service.settings.choices:
        said = f"n: one request may ask for {service.settings.choices} replies, not {choices}."
        raise APIProblem(400, said, "n", "invalid_value")


@dataclasses.dataclass
class Chatting:
    """One request and its replies."""

    service: Service
    fields: ChatFields
    turn: Turn
    prompt: TokenIds
    running: RunningReplies
    id: str = dataclasses.field(default_factory=lambda: identity("chatcmpl-"))
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    @classmethod
    async def begin(cls, service: Service, fields: ChatFields, owner: str) -> Chatting:
        """Check a request and hand it to the engine."""
        check_choices(service, fields.n)
        wanted, field = fields.max_completion_tokens, "max_completion_tokens"
        if wanted is None:
            wanted, field = fields.max_tokens, "max_tokens"
        turn = await session_turn(service, owner, fields.session_id, [each.message() for each in fields.messages])
        prompt = await asyncio.to_thread(service.text.prompt, turn.messages)
        new = service.new_tokens(wanted, field, DEFAULT, [prompt], "messages")
        options = sampling(service, fields, new, fields.top_logprobs if fields.logprobs else None)
        requests = []
        for n in range(fields.n):
            processors = await service.processors(fields.response_format)
            chosen = dataclasses.replace(seeded(options, n), processors=processors)
            known = service.text.known_as(turn.messages, prompt, options.stop)
            requests.append(GenerationRequest(prompt, chosen, owner, fields.session_id, fields.store, known))
        return cls(service, fields, turn, prompt, service.start(requests))

    async def whole(self) -> dict[str, Any]:
        """The response, when all is written."""
        written = await self.running.all()
        await self._keep()
        choices = [self._choice(n, reply) for n, reply in enumerate(written)]
        return self._object("chat.completion", choices) | {"usage": self._usage()}

    async def events(self) -> AsyncIterator[str]:
        """The same as a stream."""
        try:
            for n in range(self.fields.n):
                yield self._chunk(n, {"role": "assistant", "content": ""})
            async for n, delta in self.running.deltas():
                if delta.finish is not None:
                    await self._keep()
                yield self._event(n, delta)
            if self.fields.stream_options is not None and self.fields.stream_options.include_usage:
                yield event(self._object("chat.completion.chunk", []) | {"usage": self._usage()})
        except APIProblem as problem:
            yield event(problem.body)
        yield DONE

    async def _keep(self) -> None:
        if self.turn.session is not None and self.fields.store:  # a session's request has one reply
            await self.turn.keep(self.service, self.running.written[0].text, turn_name())

    def _event(self, n: int, delta: Delta) -> str:
        if not delta.tokens and not delta.text and delta.finish is None:
            return comment(f"read {delta.read}/{len(self.prompt)}")
        content = {"content": delta.text} if delta.text or delta.logprobs else {}
        return self._chunk(n, content, delta)

    def _chunk(self, n: int, content: dict[str, Any], delta: Delta | None = None) -> str:
        delta = delta or Delta()
        choice = {"index": n, "delta": content, "logprobs": self._logprobs(delta), "finish_reason": delta.finish}
        chunk = self._object("chat.completion.chunk", [choice])
        options = self.fields.stream_options
        if options is not None and options.include_usage:
            chunk["usage"] = self._usage() if options.continuous_usage_stats else None
        return event(chunk)

    def _choice(self, n: int, reply: WrittenReply) -> dict[str, Any]:
        message = {"role": "assistant", "content": reply.text, "refusal": None}
        return {"index": n, "message": message, "logprobs": self._logprobs(reply), "finish_reason": reply.finish}

    def _logprobs(self, what: Delta | WrittenReply) -> dict[str, Any] | None:
        if not self.fields.logprobs or (isinstance(what, Delta) and not what.logprobs):
            return None
        return {"content": [self.service.spread(token, self.fields.top_logprobs) for token in what.logprobs]}

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        base = {"id": self.id, "object": kind, "created": self.created, "model": self.service.settings.model}
        return base | {"choices": choices} | ({"session_id": self.turn.session} if self.turn.session else {})

    def _usage(self) -> dict[str, Any]:
        return usage([len(self.prompt)], self.running.written, self.fields.n)
