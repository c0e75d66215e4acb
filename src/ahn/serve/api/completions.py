"""`/v1/completions`: texts or token ids, several at once, with their own probabilities if wanted."""

from __future__ import annotations

import asyncio
import codecs
import dataclasses
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from ahn.serve.api.answers import Completion, identity, sampling
from ahn.serve.api.fields import CompletionFields
from ahn.serve.api.replies import WrittenReply
from ahn.serve.api.service import Service, finite
from ahn.serve.api.wire import JSONRoute
from ahn.serve.request import TokenLogprobs


def router(service: Service) -> APIRouter:
    routes = APIRouter(route_class=JSONRoute, tags=["completions"])

    @routes.post("/v1/completions")
    async def completions(fields: CompletionFields, request: Request) -> Response:
        """Continue texts."""
        service.check_model(fields.model)
        return await (await begin(service, fields, request.state.owner)).respond(request)

    return routes


async def begin(service: Service, fields: CompletionFields, owner: str) -> TextCompletion:
    service.check_choices(fields.n, len(fields.prompt))
    text = service.text
    prompts = [await asyncio.to_thread(text.ids, p, True) if isinstance(p, str) else p for p in fields.prompt]
    measured = fields.logprobs if fields.echo else None
    options = sampling(service, fields, prompts, logprobs=fields.logprobs, prompt_logprobs=measured)
    keep = fields.store and measured is None  # a text that is measured is not gone on with
    running = await service.start(prompts, options, fields.n, fields.schema_of_reply, owner=owner, keep=keep)
    return TextCompletion(service, fields, prompts, running, identity("cmpl-"))


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
class TextCompletion(Completion[CompletionFields]):
    KIND = CHUNK = "text_completion"

    def __post_init__(self) -> None:
        self._places = [TextPlace() for _ in self.running.written]
        self._echoes = [self.fields.echo] * len(self._places)
        """Whether the prompt is still to be said."""

    def part(self, n: int, new: WrittenReply) -> dict[str, Any]:
        text, tokens = new.text, list(new.logprobs)
        if self._echoes[n]:
            self._echoes[n] = False
            text = self.service.text.decode(self.prompts[n // self.each], special=True) + text
            tokens = [*self.running.written[n].prompt_logprobs, *tokens]
        logprobs = None if self.fields.logprobs is None else self._logprobs(tokens, self._places[n])
        return {"index": n, "text": text, "logprobs": logprobs, "finish_reason": new.finish}

    def choice(self, n: int, reply: WrittenReply) -> dict[str, Any]:
        return self.part(n, reply)

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
        for number, logprob in (*token.top[: self.fields.logprobs], (token.token, token.logprob)):
            best.setdefault(self.service.token(number)[0], finite(logprob))  # two can look the same: the better one
        return best
