"""`/v1/completions`: texts or token ids, several at once, with their own probabilities if wanted."""

from __future__ import annotations

import asyncio
import codecs
import dataclasses
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from ahn.serve.api.chat import check_choices, sampling
from ahn.serve.api.fields import CompletionFields
from ahn.serve.api.problems import APIProblem
from ahn.serve.api.replies import RunningReplies, WrittenReply
from ahn.serve.api.service import Service, finite, identity, seeded, usage
from ahn.serve.api.wire import DONE, JSONRoute, answer, comment, event, event_stream, unless_gone
from ahn.serve.request import Delta, GenerationRequest, TokenIds, TokenLogprobs

DEFAULT = 16
"""Tokens of a continuation where a request does not say it, as OpenAI has it."""


def router(service: Service) -> APIRouter:
    """The route, for a service."""
    routes = APIRouter(tags=["completions"], route_class=JSONRoute)

    @routes.post("/v1/completions")
    async def completions(fields: CompletionFields, request: Request) -> Response:
        """Continue texts."""
        service.check_model(fields.model)
        completing = await Completing.begin(service, fields, request.state.owner)
        if fields.stream:
            return event_stream(completing.events(), completing.running.cancel)
        return answer(await unless_gone(request, completing.whole()))

    return routes


class TextPlace:
    """Where tokens begin in their text, one after the other, whatever of it was shown with which of them."""

    def __init__(self) -> None:
        self._place, self._characters = 0, codecs.getincrementaldecoder("utf-8")("replace")  # a token may hold a part

    def of_next(self, content: bytes) -> int:
        """Characters before the next token, which stands for these bytes."""
        place = self._place
        self._place += len(self._characters.decode(content))
        return place


@dataclasses.dataclass
class Completing:
    """One request and its continuations: `n` for every prompt."""

    service: Service
    fields: CompletionFields
    prompts: list[TokenIds]
    running: RunningReplies
    id: str = dataclasses.field(default_factory=lambda: identity("cmpl-"))
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    @classmethod
    async def begin(cls, service: Service, fields: CompletionFields, owner: str) -> Completing:
        """Check a request and hand it to the engine."""
        check_choices(service, fields.n * len(fields.prompt))
        prompts = await asyncio.to_thread(_tokenised, service, fields.prompt)
        new = service.new_tokens(fields.max_tokens, "max_tokens", DEFAULT, prompts, "prompt")
        options = sampling(service, fields, new, fields.logprobs)
        if fields.echo and fields.logprobs is not None:
            options = dataclasses.replace(options, prompt_logprobs=fields.logprobs)
        requests = []
        for number in range(len(prompts) * fields.n):
            processors = await service.processors(fields.response_format)
            chosen = dataclasses.replace(seeded(options, number % fields.n), processors=processors)
            keep = fields.store and options.prompt_logprobs is None  # a text that is measured is not gone on with
            requests.append(GenerationRequest(prompts[number // fields.n], chosen, owner, keep=keep))
        return cls(service, fields, prompts, service.start(requests))

    async def whole(self) -> dict[str, Any]:
        """The response, when all is written."""
        written = await self.running.all()
        choices = await asyncio.to_thread(self._choices, written)  # probabilities of long prompts take a while
        return self._object(choices) | {"usage": self._usage()}

    def _choices(self, written: Sequence[WrittenReply]) -> list[dict[str, Any]]:
        return [self._choice(n, self._echo(n) + reply.text, reply, TextPlace()) for n, reply in enumerate(written)]

    async def events(self) -> AsyncIterator[str]:
        """The same as a stream."""
        places = [TextPlace() for _ in self.running.written]
        begun = [not self.fields.echo] * len(places)
        options = self.fields.stream_options
        try:
            async for n, delta in self.running.deltas():
                if not delta.tokens and not delta.text and delta.finish is None:
                    yield comment(f"read {delta.read}/{len(self.prompts[n // self.fields.n])}")
                    continue
                before = "" if begun[n] else self._echo(n)
                chunk = self._object([self._choice(n, before + delta.text, delta, places[n], not begun[n])])
                begun[n] = True
                if options is not None and options.include_usage:
                    chunk["usage"] = self._usage() if options.continuous_usage_stats else None
                yield event(chunk)
            if options is not None and options.include_usage:
                yield event(self._object([]) | {"usage": self._usage()})
        except APIProblem as problem:
            yield event(problem.body)
        yield DONE

    def _echo(self, n: int) -> str:
        return self.service.text.decode(self.prompts[n // self.fields.n], special=True) if self.fields.echo else ""

    def _choice(
        self, n: int, text: str, what: Delta | WrittenReply, place: TextPlace, first: bool = True
    ) -> dict[str, Any]:
        logprobs = None
        if self.fields.logprobs is not None:
            echoed = self.running.written[n].prompt_logprobs if first and self.fields.echo else ()
            logprobs = self._logprobs([*echoed, *what.logprobs], place)
        return {"index": n, "text": text, "logprobs": logprobs, "finish_reason": what.finish}

    def _logprobs(self, tokens: Sequence[TokenLogprobs], place: TextPlace) -> dict[str, Any]:
        shown = [self.service.token(token.token) for token in tokens]
        return {
            "tokens": [text for text, _ in shown],
            "token_logprobs": [None if token.logprob is None else finite(token.logprob) for token in tokens],
            "top_logprobs": [None if token.logprob is None else self._top(token) for token in tokens],
            "text_offset": [place.of_next(content) for _, content in shown],
        }

    def _top(self, token: TokenLogprobs) -> dict[str, float]:
        best: dict[str, float] = {}
        for number, logprob in token.top[: self.fields.logprobs]:
            best.setdefault(self.service.token(number)[0], finite(logprob))  # two can look the same: the better one
        best.setdefault(self.service.token(token.token)[0], finite(token.logprob))
        return best

    def _object(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        base = {"id": self.id, "object": "text_completion", "created": self.created}
        return base | {"model": self.service.settings.model, "choices": choices}

    def _usage(self) -> dict[str, Any]:
        return usage([len(prompt) for prompt in self.prompts], self.running.written, self.fields.n)


def _tokenised(service: Service, given: Sequence[str | TokenIds]) -> list[TokenIds]:
    return [service.text.ids(each, start=True) if isinstance(each, str) else each for each in given]
