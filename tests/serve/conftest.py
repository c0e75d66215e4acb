"""A served model: with an engine that only repeats, or the shipped one with its own."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi")

from serve_fake import FakeEngine
from starlette.testclient import TestClient
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ahn import tiny
from ahn.serve.api.app import StoppingServer, make_app
from ahn.serve.api.building import bound, build
from ahn.serve.api.grammar import Grammars
from ahn.serve.api.messages import MessageStore
from ahn.serve.api.metrics import ServerMetrics
from ahn.serve.api.service import Service
from ahn.serve.api.settings import ServerSettings
from ahn.serve.api.texts import ChatText


@dataclasses.dataclass
class Served:
    """A server and a client of it."""

    service: Service
    engine: FakeEngine
    client: TestClient

    def post(self, path: str, key: str | None = None, **fields: Any) -> Any:
        """The answer to a request of JSON."""
        return self.client.post(path, json=fields, headers={"Authorization": f"Bearer {key}"} if key else {})

    def chat(self, content: str, **fields: Any) -> Any:
        """The answer to one message."""
        asked = {"messages": [{"role": "user", "content": content}], "max_tokens": 4} | fields
        return self.post("/v1/chat/completions", **asked)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """Of the shipped model."""
    return AutoTokenizer.from_pretrained(tiny.path())


@pytest.fixture
def serve(tokenizer: PreTrainedTokenizerBase) -> Iterator[Callable[..., Served]]:
    """`serve(keys=("a",))` serves with these settings."""
    clients = []

    def start(pause: float = 0.0, store: MessageStore | None = None, **settings: Any) -> Served:
        text = ChatText(tokenizer)
        engine = FakeEngine(text, pause)
        metrics = ServerMetrics(engine.stats)
        own = ServerSettings(**settings), store or MessageStore(None), metrics, Grammars(tokenizer, len(tokenizer), [])
        service = Service(engine, text, *own)
        client = TestClient(make_app(service), base_url="http://127.0.0.1", raise_server_exceptions=False)
        clients.append(client)
        return Served(service, engine, client)

    yield start
    for client in clients:
        client.close()


@pytest.fixture
def served(serve: Callable[..., Served]) -> Served:
    """A server with everything as it is."""
    return serve()


class LiveServer:
    """An app behind a real port, for real clients.

    Args:
        service: what is served; its engine was started.
    """

    def __init__(self, service: Service, stop: float = 1.0) -> None:
        self.service = service
        place = bound("127.0.0.1", 0)
        self.port: int = place.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._server = StoppingServer(make_app(service), stop, log_level="error")
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [place]}, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    def stop(self) -> None:
        """Stop, and wait until it has."""
        self._server.should_exit = True
        self._thread.join()


@pytest.fixture
def live_fake(tokenizer: PreTrainedTokenizerBase) -> Iterator[Callable[..., tuple[LiveServer, FakeEngine]]]:
    """A port in front of an engine that repeats."""
    servers = []

    def start(pause: float = 0.0, **settings: Any) -> tuple[LiveServer, FakeEngine]:
        text = ChatText(tokenizer)
        engine = FakeEngine(text, pause)
        metrics = ServerMetrics(engine.stats)
        own = ServerSettings(**settings), MessageStore(None), metrics, Grammars(tokenizer, len(tokenizer), [])
        servers.append(LiveServer(Service(engine, text, *own)))
        return servers[-1], engine

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def live(tokenizer: PreTrainedTokenizerBase) -> Iterator[LiveServer]:
    """The shipped model behind a port."""
    from ahn.cli.session import open_session
    from ahn.serve.engine.engine import Engine

    session = open_session(None, None)
    engine = Engine(session.model, session.tokenizer, conversations=4, queue=64)
    engine.start()
    server = LiveServer(build(session.model, session.tokenizer, engine, ServerSettings(), MessageStore(None)))
    yield server
    server.stop()
