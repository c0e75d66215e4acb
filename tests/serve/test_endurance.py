"""Killed at any moment, and thousands of conversations: nothing finished is lost, nothing grows."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from engines import Letters, Whole, alone, ask, engine, model, prompt, request
from held import grown, resident

from ahn.serve.engine.engine import Engine

HERE = Path(__file__).parent


def finished_until_killed(folder: Path, seed: int, seconds: float) -> list[Any]:
    """Run `killed.py`, kill it after so long; the turns that it said were finished."""
    path = os.pathsep.join([str(HERE), str(HERE.parent), *sys.path])
    command = [sys.executable, str(HERE / "killed.py"), str(folder), str(seed)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path})
    assert process.stdout is not None
    process.stdout.readline()  # it is ready
    threading.Timer(seconds, process.kill).start()
    lines = process.stdout.read().splitlines()
    process.wait()
    turns = []
    for line in lines:
        try:
            turns.append(json.loads(line))
        except json.JSONDecodeError:  # killed while it said so
            assert line is lines[-1]
    return turns


@pytest.mark.slow
def test_killed_at_any_moment_every_finished_turn_is_there(tmp_path: Path) -> None:
    draw, of = random.Random(0), model()
    latest: dict[int, tuple[list[int], list[int]]] = {}
    for seed in range(20):
        for number, _, ids, reply in finished_until_killed(tmp_path, seed, draw.uniform(0.05, 1.5)):
            latest[number] = ids, reply
    assert len(latest) > 20
    with engine(of, state_dir=tmp_path) as running:
        assert not list(tmp_path.glob("states-*/*.damaged"))
        for ids, reply in latest.values():
            more = [*ids, *reply, *prompt(3, seed=7)]
            got = ask(running, more, 3)
            assert got.cached == len(ids) + len(reply) - 1 and got.tokens == alone(of, more, 3)
        names = {info.name for info in running.store.conversations("")}
        assert {f"talk-{number}" for number in latest} <= names


def talk(running: Engine, number: int) -> list[Whole]:
    """A conversation of three turns, some on a document that others ask about too."""
    ids = prompt(1000, seed=number if number % 3 else number % 10)
    ids, turns = [*ids, *prompt(5, seed=number)], []
    for turn in range(3):
        turns.append(ask(running, ids, 8, name=str(number), temperature=number % 2, seed=number))
        ids = [*ids, *turns[-1].tokens, *prompt(20, seed=turn)]
    return turns


def test_an_engine_at_its_limits_holds_no_more_with_each_conversation(tmp_path: Path) -> None:
    with engine(state_dir=tmp_path, state_bytes=20 << 10, disk_bytes=40 << 10) as running:
        running.scheduler._seen.limit = 16

        def several(number: int) -> None:
            """Turns of a conversation, one beside it on the same document, and one whose client goes."""
            ids, name = prompt(80, seed=number), f"talk-{number}"
            first = ask(running, ids, 3, name=name, logprobs=2)
            assert ask(running, [*ids, *first.tokens, 5, 6], 3, name=name).cached
            assert ask(running, [*ids, 7], 3, owner=f"owner-{number}", temperature=1.0, stop=["x"]).finish == "length"
            gone = running.submit(request([*ids[:70], 9], 500))
            gone.cancel()
            assert [delta.finish for delta in gone][-1] == "cancelled"

        def rest() -> None:
            until = time.monotonic() + 10
            while not running.scheduler.idle and time.monotonic() < until:
                time.sleep(0.01)
            running.store.trim()

        assert grown(several, rest) == {}


@pytest.mark.slow
def test_a_server_holds_no_more_with_each_request(
    live_fake: Callable[..., tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its engine's part left out, and whatever is asked: new names, texts, schemas, paths, mistakes."""
    import httpx

    # uvicorn holds a request whose client left in the middle of it for as long as a connection may be idle.
    monkeypatch.setattr("ahn.serve.api.app.IDLE", 1)
    server, fake = live_fake()
    with httpx.Client(base_url=server.url) as client:

        def every_kind(number: int) -> None:
            word = f"word{number}"
            said, one = [{"role": "user", "content": word}], {"max_tokens": 2}
            form = {"name": "x", "schema": {"type": "object", "properties": {word: {"type": "string"}}}}
            session, schema = {"session_id": word}, {"response_format": {"type": "json_schema", "json_schema": form}}

            def post(path: str, expected: int, **fields: Any) -> Any:
                answer = client.post(path, json=fields, headers={"X-Request-Id": word})
                assert answer.status_code == expected, answer.text
                return answer

            for stream in (False, True):
                post("/v1/completions", 200, prompt=word, user=word, logprobs=1, echo=True, stream=stream, **one)
                post("/v1/chat/completions", 200, messages=said, stream=stream, **session, **one)
            post("/v1/chat/completions", 200, messages=said, **schema, **one)
            post("/close_session", 200, **session)
            post("/v1/completions", 404, prompt=word, model=word)
            post("/v1/completions", 400, prompt=word, **{word: 1})
            post(f"/v1/{word}", 404)
            first = post("/v1/responses", 200, input=word, max_output_tokens=2).json()["id"]
            post("/v1/responses", 200, input=word, previous_response_id=first, max_output_tokens=2)
            client.delete(f"/v1/responses/{first}").raise_for_status()
            client.get("/metrics").raise_for_status()
            with client.stream(
                "POST", "/v1/completions", json={"prompt": word, "max_tokens": 999, "stream": True}
            ) as left:
                next(left.iter_lines())

        def rest() -> None:
            time.sleep(1.5)
            fake.replies.clear()

        assert grown(every_kind, rest) == {}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_thousands_of_conversations_take_no_more_memory(tmp_path: Path) -> None:
    limit, files = 4 << 20, 8 << 20
    with engine(
        model(), conversations=8, chunk=256, state_dir=tmp_path, state_bytes=limit, disk_bytes=files
    ) as running:
        with ThreadPoolExecutor(16) as clients:
            sizes = []
            for part in range(10):
                for turns in clients.map(lambda n: talk(running, n), range(part * 200, (part + 1) * 200)):
                    assert [turn.finish for turn in turns] == ["length"] * 3
                    assert all(turn.cached > 0 for turn in turns[1:])
                sizes.append(resident())
        until = time.monotonic() + 10
        while running.stats().bytes_in_memory > limit and time.monotonic() < until:
            time.sleep(0.05)
        stats = running.stats()
        assert stats.bytes_in_memory <= limit and stats.bytes_on_disk <= files
        assert stats.waiting == stats.running == 0 and stats.tokens_written == 2000 * 3 * 8
    # What Python and torch keep for themselves is taken by then.
    assert sizes[-1] - sizes[2] < 32 << 20, [size >> 20 for size in sizes]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_two_million_tokens_over_http_take_no_more_memory(tmp_path: Path) -> None:
    """Of prompts; half of them are found again."""
    pytest.importorskip("fastapi")
    import httpx
    from conftest import LiveServer

    from ahn.serve.api.building import build
    from ahn.serve.api.messages import MessageStore
    from ahn.serve.api.settings import ServerSettings

    of = model()
    options = {"state_dir": tmp_path, "state_bytes": 4 << 20, "disk_bytes": 8 << 20}
    with engine(of, conversations=8, chunk=512, **options) as running:
        server = LiveServer(build(of, Letters(), running, ServerSettings(), MessageStore(tmp_path)))  # type: ignore[arg-type]
        client = httpx.Client(base_url=server.url, timeout=120)

        def ask_twice(number: int) -> int:
            ids, read = prompt(1000, seed=number), 0
            for _ in range(2):
                asked = {"prompt": ids, "max_tokens": 4, "stream": bool(number % 2), "user": str(number)}
                said = client.post("/v1/completions", json=asked)
                assert said.status_code == 200, said.text
                read += len(ids)
                ids = [*ids, *prompt(30, seed=number + 1)]
            return read

        sizes, tokens = [], 0
        with ThreadPoolExecutor(16) as clients:
            for part in range(10):
                tokens += sum(clients.map(ask_twice, range(part * 100, (part + 1) * 100)))
                sizes.append(resident())
        client.close()
        server.stop()
    assert tokens >= 2_000_000
    assert sizes[-1] - sizes[2] < 16 << 20, [size >> 20 for size in sizes]
