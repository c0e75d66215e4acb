"""What all routes share: from fields to the engine's requests, and from what it writes to OpenAI's objects."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import secrets
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ahn.errors import AHNError
from ahn.serve.api.fields import ResponseFormat, TextFormat
from ahn.serve.api.metrics import ServerMetrics
from ahn.serve.api.problems import APIProblem
from ahn.serve.api.replies import RunningReplies, WrittenReply
from ahn.serve.api.settings import ServerSettings
from ahn.serve.api.texts import ChatText
from ahn.serve.request import GenerationRequest, SamplingOptions, TokenIds, TokenLogprobs

if TYPE_CHECKING:
    from ahn.serve.api.grammar import Grammars
    from ahn.serve.api.messages import MessageStore
    from ahn.serve.engine.engine import Engine
    from ahn.serve.engine.reply import Reply

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
    _tokens: dict[int, tuple[str, bytes]] = dataclasses.field(default_factory=dict)
    _sessions: weakref.WeakValueDictionary[tuple[str, str], asyncio.Lock] = dataclasses.field(
        default_factory=weakref.WeakValueDictionary
    )

    def session(self, owner: str, name: str) -> asyncio.Lock:
        """What a turn of a session holds: two at once would go on from the same place, and one would be lost."""
        return self._sessions.setdefault((owner, name), asyncio.Lock())

    def check_model(self, name: str | None) -> None:
        """Raises APIProblem for a model that is not served here."""
        if name is not None and name != self.settings.model:
            said = f"The model {ascii(name)[:100]} does not exist here; there is {self.settings.model!r}."
            raise APIProblem(404, said, "model", "model_not_found")

    def new_tokens(self, wanted: int | None, field: str, default: int, prompts: Sequence[TokenIds], source: str) -> int:
        """Tokens to write at most: what is wanted, else the default or as many as there is room for.

        Args:
            field: which says what is wanted.
            source: which says the prompts.

        Raises:
            APIProblem: this server does not write so many, or a conversation is empty or longer than allowed.
        """
        limit = self.settings.new_tokens
        if wanted is not None and wanted > limit:
            raise APIProblem(400, f"{field}: this server writes at most {limit} tokens.", field, "invalid_value")
        if not min(map(len, prompts)):
            raise APIProblem(400, f"{source}: there is nothing to read.", source, "invalid_value")
        longest = max(map(len, prompts))
        room = self.settings.prompt - longest
        new = wanted if wanted is not None else max(1, min(limit, default, room))
        if new > room:
            said = f"{source}: {longest} tokens and {new} to write are more than this server's {self.settings.prompt}."
            raise APIProblem(400, said, source, "context_length_exceeded")
        return new

    async def processors(self, form: ResponseFormat | TextFormat | None) -> tuple[Any, ...]:
        """What keeps a reply to the form that is asked for; for one reply.

        Raises:
            AHNError: the schema is wrong, or cannot be used with this tokenizer.
        """
        schema = form.schema_of_reply() if form is not None else None
        if schema is None:
            return ()
        return (await asyncio.to_thread(self.grammars.of_schema, schema),)

    def start(self, requests: Iterable[GenerationRequest]) -> RunningReplies:
        """Hand requests to the engine, all or none.

        Raises:
            EngineBusy, AHNError: as the engine's `submit`.
        """
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


def seeded(options: SamplingOptions, n: int) -> SamplingOptions:
    """The options of the n-th of several replies to one prompt: each draws in its own way."""
    return options if options.seed is None or not n else dataclasses.replace(options, seed=_wrapped(options.seed + n))


def _wrapped(seed: int) -> int:
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)


def usage(prompts: Sequence[int], written: Sequence[WrittenReply], each: int = 1) -> dict[str, Any]:
    """Counts of tokens; every prompt counts once, however many replies it has.

    Args:
        prompts: tokens of each.
        written: `each` replies for every prompt.
    """
    new = sum(len(reply.tokens) for reply in written)
    cached = sum(min(reply.cached for reply in written[n * each : (n + 1) * each]) for n in range(len(prompts)))
    return {
        "prompt_tokens": sum(prompts),
        "completion_tokens": new,
        "total_tokens": sum(prompts) + new,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def identity(prefix: str) -> str:
    """A new name that nobody can guess."""
    return f"{prefix}{secrets.token_hex(16)}"
