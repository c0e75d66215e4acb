"""What is asked of a server: any with OpenAI's API, and with more to see, our own."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import statistics
from collections.abc import Sequence
from typing import Any

from client import Asked, Client, Heard
from own import OwnServer

Row = dict[str, Any]
OWN, ONE, FILLED = "a text each", "one text, forked", "a text each, in memory that is filled and not read"


@dataclasses.dataclass
class Questions:
    """Questions to one server; each gives a row.

    Attributes:
        context: tokens of a text.
        tokens: of a reply.
        own: the server, where it is ours and in this process.
    """

    client: Client
    context: int
    conversations: int
    tokens: int
    repeats: int
    own: OwnServer | None = None
    _seed: int = 0
    _document: tuple[int, int] | None = None

    def text(self, length: int | None = None) -> tuple[int, int]:
        """One that no request has held before."""
        self._seed += 100
        return self._seed, length or self.context

    def ask(self, *streams: Asked) -> list[Heard]:
        """What came of some streams.

        Raises:
            RuntimeError: the server refused one, or it ended with an error.
        """
        heard = self.client.ask(*streams)
        if errors := [one.error for one in heard if one.error]:
            raise RuntimeError(f"{len(errors)} of {len(heard)} streams failed, the first with {errors[0]}")
        return heard

    def document(self) -> tuple[tuple[int, int], Heard]:
        """The text that several parts go on from, and what came of asking for it: it is read once."""
        text = self._document = self._document or self.text()
        heard = self.ask(Asked([text], 1, keep=True))[0]
        if self.own is not None:
            self.own.forget_shorter()
        return text, heard

    def read(self, lengths: Sequence[int]) -> Row:
        """Seconds to the first token after a text that nobody has read."""
        found: Row = {}
        for length in lengths:
            self.ask(Asked([self.text(length)], 1))  # what has to be compiled for this length
            times = [self.ask(Asked([self.text(length)], 1))[0].times[0] for _ in range(2)]
            found[str(length)] = min(times)
        return {"first_token_s": found}

    def second_turn(self) -> Row:
        """Seconds to the first token of a turn that goes on from a text that was read before, by where its state is."""
        text, first = self.document()
        found: Row = {"read_anew_s": first.times[0], "finished_after_s": first.ended}
        if self.own is not None:
            found["state_bytes"] = self.own.states()[0].nbytes
        places = ("kept",) if self.own is None else ("device", "memory", "disk", "cold")
        if self.own is not None and self.own.reads_turns:
            places = ("device", "device_by_steps", *places[1:])
        for place in places:
            times = []
            for _ in range(self.repeats):
                way: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
                if self.own is not None:
                    self.own.move(place.removesuffix("_by_steps"))
                    way = self.own.token_by_token() if place.endswith("_by_steps") else way
                with way:
                    heard = self.ask(Asked([text, self.text(16)], 2))[0]
                if heard.cached is not None and heard.cached < 0.9 * self.context:
                    raise RuntimeError(f"The text was read again ({place}): {heard.cached} tokens were known.")
                times.append(heard.times[0])
            found |= {f"{place}_s": statistics.median(times), f"{place}_times_s": times, "cached": heard.cached}
        return found

    def throughput(self, made: str) -> Row:
        """Tokens per second of all conversations, between the first token of the last and the last of the first."""
        rows = self.conversations
        if made == ONE:
            text, _ = self.document()
            streams = [Asked([text, self.text(4)], self.tokens) for _ in range(rows)]
        else:
            streams = [Asked([self.text()], self.tokens, filled=made == FILLED) for _ in range(rows)]
        heard = self.ask(*streams)
        start, stop = common(heard)
        found = {"conversations": rows, "made": made, "tokens_per_second": rate(heard), "measured_s": stop - start}
        found |= {"all_began_after_s": start - min(one.sent for one in heard)}
        if self.own is not None:
            found |= {"gpu_bytes": self.own.memory()}
            found |= {"batch_tokens_per_second": self.own.bare_steps(rows, 3.0)}
        return found

    def pace(self) -> Row:
        """Seconds between a reply's tokens, alone and while others' texts are read one after the other."""
        text, _ = self.document()
        alone = self.ask(Asked([text, self.text(4)], self.tokens))[0]
        found: Row = {"alone": shares(alone.gaps())}
        # What has to be compiled for chunks of other sizes comes first.
        for name in ("first_time", "while_others_read"):
            gaps: list[float] = []
            # Of a small model a reply can be over before a busy client has asked for a text: then a longer one is.
            for tokens in (4 * self.tokens, 16 * self.tokens, 64 * self.tokens):
                writer = Asked([text, self.text(4)], tokens)
                heard, reader = self.ask(writer, Asked([self.text()], 1, again=True))
                gaps = [after - at for at, after in itertools.pairwise(heard.arrivals()) if at > reader.sent]
                if gaps:
                    break
            found[name] = shares(gaps)
            found |= {"text_read_s": reader.times[0], "texts_read": 1 + reader.repeated}
        return found

    def idle(self, count: int) -> Row:
        """What conversations on disk take of the GPU's memory."""
        assert self.own is not None
        text, _ = self.document()
        self.own.move("disk")
        before = self.own.memory()
        self.ask(*(Asked([text, self.text(64)], 1, keep=True) for _ in range(count)))
        self.own.settle()
        there = sum(state.nbytes for state in self.own.states())
        self.own.move("disk")
        return {
            "conversations": count,
            "bytes_on_disk": there,
            "gpu_bytes_before": before,
            "gpu_bytes_after": self.own.memory(),
        }


def common(heard: Sequence[Heard]) -> tuple[float, float]:
    """From when to when all streams brought tokens."""
    return max(one.arrivals()[0] for one in heard), min(one.arrivals()[-1] for one in heard)


def rate(heard: Sequence[Heard]) -> float:
    """Tokens per second of all streams while all brought some; 0 if they never did."""
    start, stop = common(heard)
    tokens = sum(start < at <= stop for one in heard for at in one.arrivals())
    return tokens / (stop - start) if stop > start else 0.0


def shares(seconds: Sequence[float]) -> dict[str, float]:
    """Median, 99th percentile and largest."""
    ordered = sorted(seconds)
    if not ordered:
        return {"count": 0}
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return {"median_s": statistics.median(ordered), "p99_s": p99, "largest_s": ordered[-1], "count": len(ordered)}
