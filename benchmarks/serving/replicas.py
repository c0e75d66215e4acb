"""Replicas behind one port, by Ray Serve: what each gives alone, what all give, and what follows when one is killed."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import torch
from client import Asked, Client, Heard
from own import LONGEST, listening
from questions import Row, rate

from ahn.serve.api.messages import MessageStore
from ahn.serve.api.service import Service
from ahn.serve.api.settings import ServerSettings

WRITTEN = re.compile(r'^ahn_tokens_written_total\{replica="([^"]+)"\} (\S+)$', re.MULTILINE)
PROBES = 64
"""Users that are tried until every replica has one."""


def measured(start: Callable[[MessageStore], Service], options: argparse.Namespace, folder: Path) -> Row:
    """The row of the part `replicas`."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    from ahn.serve.replicas.cluster import replicated

    begun, gpu = time.monotonic(), torch.cuda.is_available()
    app = replicated(start, ServerSettings(model="served", prompt=LONGEST), options.replicas, gpu, folder, None)
    ready = time.monotonic() - begun
    with listening(app) as url, contextlib.closing(Client(url, "served", options.vocabulary)) as client:
        work = Replicas(url, client, options)
        return {"replicas": options.replicas, "ready_after_s": ready, **work.together(), **work.one_killed()}


class Replicas:
    """Some of them, and for each a user whose requests come to it."""

    def __init__(self, url: str, client: Client, options: argparse.Namespace) -> None:
        self.url, self.client, self.options = url, client, options
        self.text = (1, options.context[-1])
        self._seeds = itertools.count(1000)
        self.users: dict[str, str] = {}
        for n in range(PROBES):
            before = self.written()
            self.client.ask(Asked([(next(self._seeds), 8)], 1, user=f"user-{n}"))
            came_to = [replica for replica, count in self.written().items() if count > before.get(replica, 0)]
            self.users.setdefault(came_to[0], f"user-{n}")
            if len(self.users) == options.replicas:
                return
        raise RuntimeError(f"{PROBES} users came to {len(self.users)} replicas.")

    def written(self) -> dict[str, float]:
        """Tokens that each replica (host:process) has written."""
        return {replica: float(count) for replica, count in WRITTEN.findall(self.page())}

    def page(self) -> str:
        """The metrics of all."""
        return httpx.get(f"{self.url}/metrics", timeout=60).text

    def streams(self, user: str, tokens: int) -> list[Asked]:
        """Conversations of one user on the text."""
        rows = self.options.conversations
        return [Asked([self.text, (next(self._seeds), 4)], tokens, user=user) for _ in range(rows)]

    def together(self) -> Row:
        """Tokens per second of each replica alone and of all at once."""
        found: dict[str, Any] = {"text_read_s": [], "alone": []}
        for user in self.users.values():  # the first one reads it, the others take its state from the folder
            heard = self.ask(Asked([self.text], 1, keep=True, user=user))[0]
            found["text_read_s"].append(heard.times[0])
        for user in self.users.values():
            found["alone"].append(rate(self.ask(*self.streams(user, self.options.tokens))))
        before = self.written()
        everyone = [stream for user in self.users.values() for stream in self.streams(user, self.options.tokens)]
        together = rate(self.ask(*everyone))
        each = [count - before[replica] for replica, count in self.written().items()]
        found |= {"tokens_per_second": together, "of_the_sum": together / sum(found["alone"])}
        return found | {"stayed": each == [self.options.conversations * self.options.tokens] * len(each)}

    def one_killed(self) -> Row:
        """Under load, and what becomes of its conversations."""
        (lost, user), *others = self.users.items()
        turn = [self.text, (next(self._seeds), 300)]
        self.ask(Asked(turn, 1, keep=True, user=user))  # a finished turn, which is on disk now
        streams = [
            stream for _, own in [(lost, user), *others] for stream in self.streams(own, 4 * self.options.tokens)
        ]
        heard: list[Heard] = []
        load = threading.Thread(target=lambda: heard.extend(self.client.ask(*streams)))
        load.start()
        before = self.written()[lost]
        while self.written().get(lost, before) < before + 2 * self.options.conversations:
            time.sleep(0.05)
        os.kill(int(lost.rpartition(":")[2]), signal.SIGKILL)
        killed = time.monotonic()
        load.join()
        rows = self.options.conversations
        found: Row = {"broken_off": sum(one.error is not None for one in heard[:rows])}
        found["others_broken_off"] = sum(one.error is not None for one in heard[rows:])
        found["others_longest_gap_s"] = max(max(one.gaps(), default=0.0) for one in heard[rows:])
        times: list[float] = []
        while True:
            again = self.client.ask(Asked([*turn, (next(self._seeds), 16)], 2, user=user))[0]
            if again.error is None:
                break
            times.append(again.ended)
            if time.monotonic() - killed > 120:
                raise RuntimeError(f"The conversation did not go on: {again.error}")
            time.sleep(0.2)
        found |= {"refused_turns": len(times), "next_turn_cached": again.cached, "next_turn_s": again.times[0]}
        return found | {"next_turn_prompt": sum(length for _, length in turn) + 16}

    def ask(self, *streams: Asked) -> list[Heard]:
        """What came of some streams.

        Raises:
            RuntimeError: one failed.
        """
        heard = self.client.ask(*streams)
        if errors := [one.error for one in heard if one.error]:
            raise RuntimeError(f"{len(errors)} of {len(heard)} streams failed, the first with {errors[0]}")
        return heard
