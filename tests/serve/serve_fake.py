"""An engine without a model: it says the prompt again, as fast or as slowly as a test likes."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

from ahn.errors import AHNError
from ahn.serve.api.texts import ChatText
from ahn.serve.request import ConversationInfo, Delta, EngineBusy, EngineStats, GenerationRequest, TokenLogprobs


class FakeReply:
    """One token at a time; what is asked of it is remembered."""

    def __init__(self, request: GenerationRequest, text: ChatText, pause: float, error: str | None) -> None:
        self.request, self.text, self.pause, self.error = request, text, pause, error
        self.cancelled = False
        self.given = 0

    def cancel(self) -> None:
        self.cancelled = True

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self._deltas()

    async def _deltas(self) -> AsyncIterator[Delta]:
        prompt, options = [int(token) for token in self.request.prompt], self.request.options
        yield Delta(read=len(prompt) // 2)
        first = Delta(read=len(prompt))
        if options.prompt_logprobs is not None:
            known = tuple(TokenLogprobs(t, -1.0 if n else None, ((t, -1.0),)) for n, t in enumerate(prompt))
            first = dataclasses.replace(first, prompt_logprobs=known)
        if self.error:
            yield dataclasses.replace(first, finish="error", error=self.error)
            return
        for number in range(options.max_tokens):
            await asyncio.sleep(self.pause)
            if self.cancelled:
                break
            token = prompt[number % len(prompt)]
            logprobs = () if options.logprobs is None else (TokenLogprobs(token, -0.5, ((token, -0.5),)),)
            self.given += 1
            text = self.text.decode([token]).replace("\ufffd", "")  # as the engine holds parts of characters back
            yield dataclasses.replace(first, text=text, tokens=(token,), logprobs=logprobs)
            first = Delta(read=len(prompt))
        yield dataclasses.replace(first, finish="cancelled" if self.cancelled else "length")


class FakeEngine:
    """As the engine, without work."""

    def __init__(self, text: ChatText, pause: float = 0.0) -> None:
        self.text, self.pause = text, pause
        self.error: str | None = None
        self.busy = self.dead = False
        self.replies: list[FakeReply] = []
        self.lock = threading.Lock()
        self.store = self

    def submit(self, request: GenerationRequest) -> FakeReply:
        if self.busy:
            raise EngineBusy("Too many requests wait.", 2.5)
        reply = FakeReply(request, self.text, self.pause, self.error)
        with self.lock:
            self.replies.append(reply)
        return reply

    def forget(self, owner: str, name: str) -> bool:
        return any(info.name == name for info in self.conversations(owner))

    def conversations(self, owner: str) -> list[ConversationInfo]:
        return [
            ConversationInfo(reply.request.name, len(reply.request.prompt), {"exact": 8}, "memory", time.time())
            for reply in self.replies
            if reply.request.owner == owner
        ]

    def export(self, owner: str, name: str, path: Path, messages: list[dict[str, str]]) -> None:
        if not self.forget(owner, name):
            raise AHNError("unknown")
        path.write_text(json.dumps(messages))

    def take_in(self, owner: str, name: str, path: Path) -> list[dict[str, str]]:
        try:
            messages: list[dict[str, str]] = json.loads(path.read_text())
        except ValueError as error:
            raise AHNError("The state is damaged.") from error
        return messages

    def stats(self) -> EngineStats:
        return EngineStats(running=1, tokens_read=3)

    def alive(self) -> bool:
        return not self.dead

    def close(self, timeout: float) -> None:
        if not self.dead:
            self.dead = True
            time.sleep(timeout)
            for reply in self.replies:
                reply.cancel()
