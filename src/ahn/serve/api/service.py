"""What all routes share: from fields to the engine's requests, and from what it writes to OpenAI's objects."""

import asyncio
import contextlib
import dataclasses
import itertools
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import Request

from ahn.errors import AHNError
from ahn.serve.api.fields import ReplyFields
from ahn.serve.api.grammar import Grammars
from ahn.serve.api.messages import MessageStore
from ahn.serve.api.metrics import ServerMetrics
from ahn.serve.api.problems import APIProblem
from ahn.serve.api.replies import RunningReplies
from ahn.serve.api.settings import ServerSettings
from ahn.serve.api.texts import ChatText
from ahn.serve.api.wire import unless_gone
from ahn.serve.engine.engine import Engine
from ahn.serve.engine.reply import Reply
from ahn.serve.request import EngineBusy, GenerationRequest, SamplingOptions, TokenIds, TokenLogprobs

NEVER = -9999.0
"""Logarithm of a probability of 0, which JSON cannot say."""


@dataclasses.dataclass
class Service:
    """An engine and what is around it.

    Attributes:
        defaults: how tokens are chosen where a request does not say it.
        full_bytes: what a conversation of so many tokens would take with full attention.
        created: when the server was started, in seconds since 1970.
    """

    engine: Engine
    text: ChatText
    settings: ServerSettings
    store: MessageStore
    metrics: ServerMetrics
    grammars: Grammars
    defaults: SamplingOptions = dataclasses.field(default_factory=SamplingOptions)
    full_bytes: Callable[[int], int] = lambda tokens: 0
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))
    _turns: int = 0
    """That wait for others of their sessions."""
    _tokens: dict[int, tuple[str, bytes]] = dataclasses.field(default_factory=dict)
    _sessions: weakref.WeakValueDictionary[tuple[str, str], asyncio.Lock] = dataclasses.field(
        default_factory=weakref.WeakValueDictionary
    )

    async def hold_session(self, request: Request, name: str) -> asyncio.Lock:
        """What a turn of a session holds: two at once would go on from the same place, and one would be lost.

        Raises:
            EngineBusy: too many turns wait for others of their sessions.
            ClientDisconnect: the client does not wait.
        """
        lock = self._sessions.setdefault((request.state.owner, name), asyncio.Lock())
        if self._turns >= self.settings.queue:
            raise EngineBusy(f"{self._turns} turns wait for others of their sessions already.")
        self._turns += 1
        try:
            await unless_gone(request, lock.acquire())
        finally:
            self._turns -= 1
        return lock

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.settings.model:
            said = f"The model {ascii(name)[:100]} does not exist here; there is {self.settings.model!r}."
            raise APIProblem(404, said, "model", "model_not_found")

    def check_choices(self, each: int, prompts: int = 1) -> None:
        if (choices := each * prompts) > self.settings.choices:
            field = "n" if each > 1 else "prompt"
            said = f"{field}: one request may ask for {self.settings.choices} replies, not {choices}."
            raise APIProblem(400, said, field, "invalid_value")

    def new_tokens(self, fields: ReplyFields, prompts: Sequence[TokenIds]) -> int:
        """Tokens to write at most: what is wanted, else the default or as many as there is room for."""
        limit, source = self.settings.new_tokens, fields.SOURCE
        wanted, field = next(((n, f) for f in fields.LIMITS if (n := getattr(fields, f)) is not None), (None, ""))
        if wanted is not None and wanted > limit:
            raise APIProblem(400, f"{field}: this server writes at most {limit} tokens.", field, "invalid_value")
        if not min(map(len, prompts)):
            raise APIProblem(400, f"{source}: there is nothing to read.", source, "invalid_value")
        longest = max(map(len, prompts))
        room = self.settings.prompt - longest
        new = wanted if wanted is not None else max(1, min(limit, fields.DEFAULT, room))
        if new > room:
            said = f"{source}: {longest} tokens and {new} to write are more than this server's {self.settings.prompt}."
            raise APIProblem(400, said, source, "context_length_exceeded")
        return new

    async def start(
        self,
        prompts: Sequence[TokenIds],
        options: SamplingOptions,
        each: int,
        schema: dict[str, Any] | None,
        **kept: Any,
    ) -> RunningReplies:
        """Hand requests to the engine, all or none: `each` for every prompt, which draw in their own ways.

        Args:
            schema: that every reply must follow.
            kept: fields of `GenerationRequest`.
        """
        if options.logprobs is not None or options.prompt_logprobs is not None:
            with contextlib.suppress(AHNError):  # for `token`, which is not to hold up others the first time
                await asyncio.to_thread(self.grammars.loaded)
        requests = []
        for prompt, n in itertools.product(prompts, range(each)):
            own = options
            if n and options.seed is not None:
                own = dataclasses.replace(own, seed=options.seed + n)
            if schema is not None:
                grammar = await asyncio.to_thread(self.grammars.of_schema, schema)
                own = dataclasses.replace(own, processors=(grammar,))
            requests.append(GenerationRequest(prompt, own, **kept))
        replies: list[Reply] = []
        try:
            for request in requests:
                replies.append(self.engine.submit(request))
        except BaseException:
            for reply in replies:
                reply.cancel()
            raise
        watches = [self.metrics.watch() for _ in replies]
        return RunningReplies(replies, watches, self.settings.seconds, self.engine.alive)

    def token(self, token: int) -> tuple[str, bytes]:
        r"""What a token looks like alone, and its bytes; a part of a character looks like `bytes:\xe2`, as with OpenAI.

        It is remembered, as the probabilities of a long prompt name the same ones often.
        """
        known = self._tokens.get(token)
        if known is None:
            text = self.text.decode([token], special=True)
            content = text.encode()
            if "\ufffd" in text:
                with contextlib.suppress(AHNError):  # of a tokenizer that does not tell
                    content = self.grammars.token_bytes(token)
                text = content.decode(errors="replace")
                if "\ufffd" in text:
                    text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)
            known = self._tokens[token] = text, content
        return known

    def spread(self, token: TokenLogprobs, top: int) -> dict[str, Any]:
        """One token's probability as chat completions say it."""

        def one(number: int, logprob: float | None) -> dict[str, Any]:
            text, content = self.token(number)
            return {"token": text, "logprob": finite(logprob), "bytes": list(content)}

        best = [one(*pair) for pair in token.top[:top]]
        return one(token.token, token.logprob) | {"top_logprobs": best}


def finite(logprob: float | None) -> float:
    """A logarithm as JSON can say it."""
    return NEVER if logprob is None or logprob < NEVER else float(logprob)
