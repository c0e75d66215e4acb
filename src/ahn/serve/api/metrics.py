"""What operators watch, in Prometheus' form."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ahn.serve.request import Delta, EngineStats

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300)
COUNTED = ("tokens_", "evicted")
"""Beginnings of the statistics that only grow."""
WORDS = {
    "waiting": "Requests that wait for a place.",
    "running": "Requests that are read or answered now.",
    "in_memory": "Conversations whose state is in memory.",
    "on_disk": "Conversations whose state is on disk alone.",
    "bytes_in_memory": "Bytes of states in memory.",
    "bytes_on_disk": "Bytes of states on disk.",
    "tokens_read": "Tokens of prompts that were read.",
    "tokens_cached": "Tokens of prompts that had been read before.",
    "tokens_written": "Tokens of replies.",
    "evicted": "States that went to make room.",
}


class ServerMetrics:
    """Counts and times of one server."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(stats))
        self.requests = self._counter("ahn_requests", "Requests by route and status.", ("route", "status"))
        self.replies = self._counter("ahn_replies", "Replies by how they ended.", ("finish",))
        self.first = self._times("ahn_time_to_first_token_seconds", "From a request to its first token.")
        self.token = self._times("ahn_time_per_output_token_seconds", "Between two tokens of a reply.")
        self.whole = self._times("ahn_request_seconds", "From a request to the end of its reply.")

    def _counter(self, name: str, words: str, labels: tuple[str, ...]) -> Counter:
        return Counter(name, words, labels, registry=self.registry)

    def _times(self, name: str, words: str) -> Histogram:
        return Histogram(name, words, buckets=SECONDS, registry=self.registry)

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def watch(self) -> ReplyWatch:
        return ReplyWatch(self)


class ReplyWatch:
    """When the tokens of one reply came."""

    def __init__(self, metrics: ServerMetrics) -> None:
        self._metrics = metrics
        self._start = self._last = time.perf_counter()
        self._any = self._over = False

    def saw(self, delta: Delta) -> None:
        now = time.perf_counter()
        if delta.tokens:
            if not self._any:
                self._metrics.first.observe(now - self._start)
            else:
                for _ in delta.tokens:  # tokens that came together share the time since those before them
                    self._metrics.token.observe((now - self._last) / len(delta.tokens))
            self._any, self._last = True, now
        if delta.finish is not None and not self._over:
            self._over = True
            self._metrics.replies.labels(delta.finish).inc()
            self._metrics.whole.observe(now - self._start)


class EngineCollector(Collector):
    """The engine's statistics, asked for when they are read."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        for field in dataclasses.fields(stats):
            value = getattr(stats, field.name)
            kind = CounterMetricFamily if field.name.startswith(COUNTED) else GaugeMetricFamily
            yield kind(f"ahn_{field.name}", WORDS[field.name], value=float(value))
