"""Completions over HTTP with token ids as prompts, from any server with OpenAI's API; in a process of its own.

A client in the server's process would take its time. This one imports little, gets a line of JSON for each piece of
work and answers with one: when each stream's tokens came.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import httpx

PATIENCE = 300.0
"""Seconds that a server may take for anything."""
TEXTS = 4
"""Prompts that a stream that begins again takes in turn."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """One stream.

    Attributes:
        prompt: parts (seed, tokens) of random ids, one after the other.
        tokens: of the reply.
        keep: whether the conversation may be kept.
        again: begin when a stream that does not has its first token, and then anew, with other ids in the last part,
            until all of those have ended.
        user: by whom requests are spread over replicas.
        filled: read nothing of the prompt: a vLLM that we start fills its memory with random numbers instead.
    """

    prompt: Sequence[tuple[int, int]]
    tokens: int
    keep: bool = False
    again: bool = False
    user: str | None = None
    filled: bool = False


@dataclasses.dataclass
class Heard:
    """What came of it: seconds from when it was sent to each token, and to the end; for `again`, the first time only.

    Attributes:
        sent: on the client's clock.
        cached: tokens of the prompt that the server says it had read before.
        error: what the server said, or what became of the connection.
    """

    sent: float = 0.0
    times: list[float] = dataclasses.field(default_factory=list)
    ended: float = 0.0
    cached: int | None = None
    error: str | None = None
    repeated: int = 0

    def arrivals(self) -> list[float]:
        """On the client's clock."""
        return [self.sent + seconds for seconds in self.times]

    def gaps(self) -> list[float]:
        """Between one token and the next."""
        return [after - before for before, after in itertools.pairwise(self.times)]


class Client:
    """The process, and what it is to ask.

    Args:
        url: of the server, without /v1.
        model: the name by which it knows its model.
        vocabulary: token ids are below it.
        counts: ask for the number of tokens with every event, of a server whose events may hold several.
    """

    def __init__(self, url: str, model: str, vocabulary: int, counts: bool = False) -> None:
        self.where = {"url": url, "model": model, "vocabulary": vocabulary, "counts": counts}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, *streams: Asked) -> list[Heard]:
        """All at once, but for those that are `again`."""
        assert self._process.stdin is not None and self._process.stdout is not None
        work = {**self.where, "streams": [dataclasses.asdict(stream) for stream in streams]}
        print(json.dumps(work), file=self._process.stdin, flush=True)
        if not (line := self._process.stdout.readline()):
            raise RuntimeError("The client's process has ended.")
        return [Heard(**heard) for heard in json.loads(line)]

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def random_ids(parts: Sequence[tuple[int, int]], vocabulary: int) -> list[int]:
    """The token ids of a prompt."""
    drawn = ((random.Random(seed), length) for seed, length in parts)
    return [token for draw, length in drawn for token in draw.choices(range(vocabulary), k=length)]


def bodies(stream: Asked, work: dict[str, Any]) -> list[bytes]:
    """What is sent: made beforehand, as that would disturb the clock."""
    *first, (seed, length) = stream.prompt
    known = random_ids(first, work["vocabulary"])
    made = []
    for n in range(TEXTS if stream.again else 1):
        fields = {
            "model": work["model"],
            "prompt": [*known, *random_ids([(seed + n, length)], work["vocabulary"])],
            "max_tokens": stream.tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": work["counts"]},
            "store": stream.keep,
        }
        fields |= {"user": stream.user} if stream.user else {}
        fields |= {"kv_transfer_params": {"read": True}} if stream.filled else {}
        made.append(json.dumps(fields).encode())
    return made


async def listen(client: httpx.AsyncClient, body: bytes, begun: asyncio.Event | None = None) -> Heard:
    """One stream from its request to its end.

    Args:
        begun: set when its first token comes, or none will.
    """
    heard = Heard(sent=time.perf_counter())
    headers = {"Content-Type": "application/json"}
    try:
        async with client.stream("POST", "/v1/completions", content=body, headers=headers) as response:
            if response.status_code != 200:
                heard.error = f"{response.status_code}: {(await response.aread()).decode()[:300]}"
                return heard
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    take(heard, line[6:])
                if begun is not None and heard.times:
                    begun.set()
    except httpx.HTTPError as error:
        heard.error = f"{type(error).__name__}: {error}"
    finally:
        if begun is not None:
            begun.set()
    heard.ended = time.perf_counter() - heard.sent
    return heard


def take(heard: Heard, text: str) -> None:
    """One event."""
    now = time.perf_counter() - heard.sent
    if '"usage":null' not in text and '"usage"' in text:
        event = json.loads(text)
        if (usage := event.get("usage")) is not None:
            heard.cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
            # An event may hold several tokens: those of a client that is slow come together.
            missing = usage["completion_tokens"] - len(heard.times)
            heard.times += ([now] if event.get("choices") else heard.times[-1:]) * missing
            return
        if not event.get("choices"):
            return
    if text.startswith('{"error"'):
        heard.error = text[:300]
    elif '"choices"' in text:
        heard.times.append(now)


async def work_on(work: dict[str, Any]) -> list[Heard]:
    """All streams of one line."""
    streams = [Asked(**stream) for stream in work["streams"]]
    prepared = [bodies(stream, work) for stream in streams]
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    begun, over = asyncio.Event(), asyncio.Event()
    async with httpx.AsyncClient(base_url=work["url"], timeout=PATIENCE, limits=limits) as client:

        async def again(made: list[bytes]) -> Heard:
            await begun.wait()
            heard, turns = await listen(client, made[0]), itertools.cycle([*made[1:], made[0]])
            while not over.is_set() and heard.error is None:
                listening = asyncio.create_task(listen(client, next(turns)))
                await asyncio.wait({listening, ending}, return_when=asyncio.FIRST_COMPLETED)
                heard.repeated += listening.done()
                listening.cancel()
            return heard

        ending = asyncio.create_task(over.wait())
        tasks = [
            asyncio.create_task(again(made) if stream.again else listen(client, made[0], begun))
            for made, stream in zip(prepared, streams, strict=True)
        ]
        await asyncio.gather(*(task for task, stream in zip(tasks, streams, strict=True) if not stream.again))
        over.set()
        return await asyncio.gather(*tasks)


def main() -> None:
    for line in sys.stdin:
        heard = asyncio.run(work_on(json.loads(line)))
        print(json.dumps([dataclasses.asdict(one) for one in heard]), flush=True)


if __name__ == "__main__":
    main()
