"""What chat, completions and responses share: a request's replies, as a whole or as a stream."""

import asyncio
import contextlib
import dataclasses
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, ClassVar, Generic, TypeVar

from fastapi import Request, Response

from ahn.serve.api.fields import ReplyFields, SamplingFields, StreamOptions
from ahn.serve.api.problems import problem_of
from ahn.serve.api.replies import RunningReplies, WrittenReply
from ahn.serve.api.service import Service
from ahn.serve.api.wire import DONE, answer, event, event_stream, unless_gone
from ahn.serve.request import SamplingOptions, TokenIds

Fields = TypeVar("Fields", bound=ReplyFields)
Asked = TypeVar("Asked", bound=SamplingFields)
SAMPLED = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("seed", "stop", "logit_bias", "ignore_eos"),
)
"""Fields that say how tokens are chosen, by the names of `SamplingOptions`."""


def identity(prefix: str) -> str:
    """A new name that nobody can guess."""
    return f"{prefix}{secrets.token_hex(16)}"


def sampling(service: Service, fields: ReplyFields, prompts: Sequence[TokenIds], **own: Any) -> SamplingOptions:
    """How tokens are chosen: as the request says, else as the model's settings say."""
    given = {name: value for name in SAMPLED if (value := getattr(fields, name, None)) is not None}
    new = service.new_tokens(fields, prompts)
    return dataclasses.replace(service.defaults, **given, max_tokens=new, **own)


@dataclasses.dataclass
class Answering(Generic[Fields]):
    """A request and its replies: `n` for each of its prompts."""

    service: Service
    fields: Fields
    prompts: Sequence[TokenIds]
    running: RunningReplies
    id: str
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    async def respond(self, request: Request, end: contextlib.ExitStack | None = None) -> Response:
        """As the request wants it; `end` is closed when all is said, or the client has gone."""
        with end or contextlib.ExitStack() as end:
            end.callback(self.running.cancel)
            if self.fields.stream:
                return event_stream(self.events(), end.pop_all().close)
            return answer(await unless_gone(request, self.whole()))

    async def whole(self) -> dict[str, Any]:
        """The response, when all is written."""
        raise NotImplementedError

    def events(self) -> AsyncIterator[str]:
        """The same as a stream."""
        raise NotImplementedError

    @property
    def each(self) -> int:
        return len(self.running.written) // len(self.prompts)

    def progress(self, n: int, new: WrittenReply) -> str:
        """A comment, which clients skip: it keeps a connection open while nothing is written yet."""
        return f": read {new.read}/{len(self.prompts[n // self.each])}\n\n"

    def usage(self) -> dict[str, Any]:
        """Counts of tokens; every prompt counts once, however many replies it has."""
        read, written = sum(map(len, self.prompts)), self.running.written
        new = sum(len(reply.tokens) for reply in written)
        groups = [written[n : n + self.each] for n in range(0, len(written), self.each)]
        cached = sum(min(reply.cached for reply in group) for group in groups)
        counts = {"prompt_tokens": read, "completion_tokens": new, "total_tokens": read + new}
        return counts | {"prompt_tokens_details": {"cached_tokens": cached}}


class Completion(Answering[Asked]):
    """Choices, as chat and plain completions have them."""

    KIND: ClassVar[str]
    CHUNK: ClassVar[str]

    async def whole(self) -> dict[str, Any]:
        written = await self.running.all()
        await self.keep()
        # Probabilities of long prompts take a while; so they do in a stream's first part.
        choices = await asyncio.to_thread(lambda: [self.choice(n, reply) for n, reply in enumerate(written)])
        return self.object(self.KIND, choices) | {"usage": self.usage()}

    async def events(self) -> AsyncIterator[str]:
        options = self.fields.stream_options or StreamOptions()

        def chunk(*choices: dict[str, Any]) -> str:
            made = self.object(self.CHUNK, list(choices))
            if options.include_usage:
                made["usage"] = None if choices and not options.continuous_usage_stats else self.usage()
            return event(made)

        try:
            for first in self.first():
                yield chunk(first)
            async for n, new in self.running.news():
                if new.finish is not None:
                    await self.keep()
                if new.only_read:
                    yield self.progress(n, new)
                elif new.prompt_logprobs:
                    yield chunk(await asyncio.to_thread(self.part, n, new))
                else:
                    yield chunk(self.part(n, new))
            if options.include_usage:
                yield chunk()
        except Exception as error:
            yield event(problem_of(error).body)
        yield DONE

    async def keep(self) -> None:
        """Write down what is to be kept, before the client is told that a reply is finished."""

    def first(self) -> list[dict[str, Any]]:
        return []

    def choice(self, n: int, reply: WrittenReply) -> dict[str, Any]:
        raise NotImplementedError

    def part(self, n: int, new: WrittenReply) -> dict[str, Any]:
        raise NotImplementedError

    def object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        base = {"id": self.id, "object": kind, "created": self.created, "model": self.service.settings.model}
        return base | {"choices": choices}
