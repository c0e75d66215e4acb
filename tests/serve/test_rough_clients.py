"""Clients that go, stall, or send nonsense: none of them hurts the server or another client."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from support import effort

BODY = {"messages": [{"role": "user", "content": "x " * 200}], "max_tokens": 16000, "stream": True}
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize", "/close_session")


def opened(server: Any, body: dict[str, Any]) -> socket.socket:
    """A connection that has sent a request and read nothing."""
    raw = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    connection.sendall(head("/v1/chat/completions", len(raw)) + raw)
    return connection


def head(path: str, length: int) -> bytes:
    lines = (f"POST {path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json", f"Content-Length: {length}")
    return "\r\n".join([*lines, "", ""]).encode()


def wait(done: Callable[[], Any], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_ends_its_reply(live_fake: Callable[..., Any], stream: bool) -> None:
    server, engine = live_fake(pause=0.01)
    connection = opened(server, BODY | {"stream": stream})
    wait(lambda: engine.replies and engine.replies[0].given > 3)
    connection.close()
    wait(lambda: engine.replies[0].cancelled)
    given = engine.replies[0].given
    assert given < 1000
    wait(lambda: b'ahn_replies_total{finish="cancelled"} 1.0' in server.service.metrics.text())


def test_a_client_that_reads_nothing_is_left(live_fake: Callable[..., Any]) -> None:
    """What waits for it is bounded by the connection's buffers, not by the length of its reply."""
    server, engine = live_fake(stalled=0.5)
    connection = opened(server, BODY | {"n": 8, "logprobs": True, "top_logprobs": 1})
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    wait(lambda: engine.replies and engine.replies[0].cancelled, 30)
    written = sum(reply.given for reply in engine.replies)
    assert written < 8 * 16000
    connection.close()


def test_a_client_that_sends_no_body_is_told(live_fake: Callable[..., Any]) -> None:
    server, _ = live_fake(stalled=0.2)
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    connection.sendall(head("/tokenize", 100) + b"{")
    said = b"".join(iter(lambda: connection.recv(65536), b""))
    assert said.startswith(b"HTTP/1.1 408") and b'"error"' in said


@pytest.mark.parametrize("stream", [False, True])
def test_turns_of_a_session_that_come_at_once_follow_each_other(live_fake: Callable[..., Any], stream: bool) -> None:
    server, engine = live_fake(pause=0.02)

    def ask(text: str) -> None:
        body = {"messages": [{"role": "user", "content": text}], "session_id": "s", "max_tokens": 3, "stream": stream}
        assert httpx.post(f"{server.url}/v1/chat/completions", json=body).status_code == 200

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(ask, ("One. ", "Two. ", "Three. ")))
    ask("Four.")
    said = server.service.text.decode(engine.replies[-1].request.prompt)
    assert all(text in said for text in ("One.", "Two.", "Three."))
    wait(lambda: not server.service._sessions)  # nothing is left of it


def test_turns_that_wait_for_their_session_are_bounded(
    live_fake: Callable[..., Any],
) -> None:
    server, engine = live_fake(pause=0.01, queue=2)
    body = BODY | {"session_id": "s"}
    first = opened(server, body)
    wait(lambda: engine.replies)
    others = [opened(server, body) for _ in range(2)]
    wait(lambda: server.service._turns == 2)
    assert httpx.post(f"{server.url}/v1/chat/completions", json=body).status_code == 429
    others[0].close()
    wait(lambda: server.service._turns == 1)
    first.close()
    wait(lambda: len(engine.replies) == 2)
    others[1].close()
    wait(lambda: not server.service._sessions)


def test_headers_without_end_are_refused(live_fake: Callable[..., Any]) -> None:
    server, _ = live_fake()
    sent = 0
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection, contextlib.suppress(OSError):
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Long: ")
        while sent < 50 << 20:
            connection.sendall(b"a" * (1 << 18))
            sent += 1 << 18
            time.sleep(0.01)
    assert sent < 20 << 20


def test_a_client_of_http_1_0(live_fake: Callable[..., Any]) -> None:
    """Load balancers ask so, without a host; a stream is not in chunks, and ends with the connection."""
    server, _ = live_fake()
    assert said(server, b"GET /health HTTP/1.0\r\n\r\n").startswith("HTTP/1.1 200")
    raw = json.dumps({"prompt": "a b", "max_tokens": 2, "stream": True}).encode()
    answer = said(server, head("/v1/completions", len(raw)).replace(b"HTTP/1.1", b"HTTP/1.0") + raw)
    assert "chunked" not in answer and answer.endswith("data: [DONE]\n\n")


def said(server: Any, request: bytes) -> str:
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(request)
        return b"".join(iter(lambda: connection.recv(65536), b"")).decode()


def test_a_connection_is_idle_for_longer_than_clients_keep_it(live_fake: Callable[..., Any]) -> None:
    """Pools of httpx keep theirs for 5 seconds, nginx for 60: who asks as it is closed gets an error."""
    server, _ = live_fake()
    assert server._server.config.timeout_keep_alive > 60


@pytest.mark.sample(3)
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["chat/completions", "completions", "responses"])
def test_a_server_that_stops_says_so(live_fake: Callable[..., Any], path: str, stream: bool) -> None:
    server, engine = live_fake(pause=0.01)
    asked = {"chat/completions": BODY, "completions": {"prompt": "x", "max_tokens": 16000}, "responses": {"input": "x"}}
    raw = json.dumps(asked[path] | {"stream": stream}).encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(head(f"/v1/{path}", len(raw)) + raw)
        wait(lambda: engine.replies and engine.replies[0].given > 3)
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        said = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
    stopping.join()
    assert "The reply was ended by the server." in said
    if stream:
        assert said.endswith("0\r\n\r\n")  # whole, as HTTP has it
        assert ("[DONE]" in said) == (path != "responses") and ("response.failed" in said) == (path == "responses")
    else:
        assert said.startswith("HTTP/1.1 503")


def test_malformed_requests(serve: Callable[..., Any]) -> None:
    """Requests cut, with bytes changed, fields renamed, values swapped: errors of 4xx in one form, or an answer."""
    served = serve(body=1 << 20, new_tokens=8, seconds=5)
    draw = random.Random(0)
    for number in range(effort.examples(300, 10_000)):
        path, body = draw.choice(PATHS), nonsense(draw)
        headers = {"content-type": draw.choice(["application/json"] * 6 + ["text/plain", "", "multipart/form-data"])}
        response = served.client.request(draw.choice(["POST"] * 9 + ["PUT"]), path, content=body, headers=headers)
        assert response.status_code < 500, (number, path, body, response.text)
        if response.status_code >= 400:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}, response.text
    assert served.client.get("/health").status_code == 200


VALUES = (None, True, -1, 0, 1e308, 10**30, "", "x", "\ud800", "\0", "ü", [], [[]], {}, {"a": 1}, [None], [-1], ["x"])
NAMES = ("temperature", "top_p", "top_k", "stop", "logit_bias", "n", "seed", "stream_options", "session_id", "model")
NAMES += ("response_format", "metadata", "messages", "prompt", "input", "text", "previous_response_id", "unknown")


def nonsense(draw: random.Random) -> bytes:
    """A request that is nearly right."""
    body: dict[str, Any] = {"max_tokens": 2}
    body |= draw.choice(
        [
            {"messages": [{"role": "user", "content": "hello"}]},
            {"prompt": "hello", "logprobs": 1, "echo": True},
            {"prompt": [[1, 2, 3]], "n": 2},
            {"input": "hello", "max_output_tokens": 2},
            {"session_id": "s"},
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}], "stop": ["a"], "seed": 1},
        ]
    )
    for _ in range(draw.randrange(3)):
        body[draw.choice(NAMES)] = draw.choice(VALUES)
    raw = json.dumps(body).encode()
    way = draw.randrange(4)
    if way == 0:
        return raw[: draw.randrange(len(raw))]
    if way == 1:
        place = draw.randrange(len(raw))
        return raw[:place] + bytes(draw.randrange(256) for _ in range(draw.randrange(1, 4))) + raw[place + 1 :]
    return raw
