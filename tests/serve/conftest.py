"""A served model: with an engine that only repeats, inside this process."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi")

from serve_fake import FakeEngine
from starlette.testclient import TestClient
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ahn import tiny
from ahn.serve.app import make_app
from ahn.serve.messages import MessageStore
from ahn.serve.metrics import ServerMetrics
from ahn.serve.service import Service
from ahn.serve.settings import ServerSettings
from ahn.serve.texts import ChatText


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
        service = Service(engine, text, ServerSettings(**settings), store or MessageStore(None), metrics)
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
