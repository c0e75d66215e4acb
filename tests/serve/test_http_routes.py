"""Routes in this process, with an engine that repeats the prompt."""

from __future__ import annotations

import errno
import gzip
import json
import tempfile
import threading
from collections.abc import Callable
from typing import Any

import httpx
import llguidance.hf
import pytest
from models import base
from serve_fake import FakeEngine

import ahn
from ahn.errors import AHNError
from ahn.serve.api import wire
from ahn.serve.api.building import build
from ahn.serve.api.messages import MessageStore
from ahn.serve.api.settings import ServerSettings
from ahn.serve.api.texts import ChatText

HI = [{"role": "user", "content": "Hello there, how are you?"}]


def events(response: Any) -> list[Any]:
    """The data of a stream's events; a last `[DONE]` is left out."""
    assert response.headers["content-type"].startswith("text/event-stream")
    data = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    return [json.loads(each) for each in data if each != "[DONE]"]


def test_a_reply(served: Any) -> None:
    response = served.post("/v1/chat/completions", messages=HI, max_tokens=3)
    assert response.status_code == 200, response.text
    body = response.json()
    prompt = served.engine.replies[0].request.prompt
    assert served.service.text.decode(prompt) == "Hello there, how are you?"
    assert body["choices"][0]["message"]["content"] == served.service.text.decode(prompt[:3])
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["total_tokens"] == len(prompt) + 3


def test_a_stream_says_what_the_whole_says(served: Any) -> None:
    whole = served.post("/v1/chat/completions", messages=HI, max_tokens=5).json()
    response = served.post(
        "/v1/chat/completions", messages=HI, max_tokens=5, stream=True, stream_options={"include_usage": True}
    )
    assert response.text.endswith("data: [DONE]\n\n")
    chunks = events(response)
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1])
    assert text == whole["choices"][0]["message"]["content"]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"


def test_completions_of_several_prompts_echo_with_probabilities(served: Any) -> None:
    ids = [served.service.text.ids(text).tolist() for text in ("One two three", "Four")]
    body = served.post(
        "/v1/completions", prompt=ids, echo=True, logprobs=1, max_tokens=1, temperature=0, seed=1234
    ).json()
    for choice, prompt in zip(body["choices"], ids, strict=True):
        assert len(choice["logprobs"]["token_logprobs"]) == len(prompt) + 1
        assert choice["logprobs"]["token_logprobs"][0] is None
        assert choice["text"] == "".join(choice["logprobs"]["tokens"])
        assert choice["logprobs"]["text_offset"][-1] == len("".join(choice["logprobs"]["tokens"][:-1]))
    assert body["usage"]["prompt_tokens"] == sum(map(len, ids))


@pytest.mark.parametrize(
    "prompt", [[1, 2.5], [1, "a" * 10_000], [None], [-1], [1 << 31], [[1], [2, -3]], ["a", 5], 7, [True]]
)
def test_token_ids_are_checked_at_once(served: Any, prompt: Any) -> None:
    error = served.post("/v1/completions", prompt=prompt).json()["error"]
    assert error["param"] == "prompt" and "token ids from 0 to 2147483647" in error["message"]


@pytest.mark.parametrize(("asked", "field"), [({}, "prompt"), ({"n": 2}, "n")], ids=str)
def test_too_many_replies_name_what_asks_for_them(served: Any, asked: dict[str, int], field: str) -> None:
    response = served.post("/v1/completions", prompt=["a"] * 1000, **asked)
    assert response.status_code == 400 and response.json()["error"]["param"] == field, response.text


def test_what_is_wrong_with_a_pattern_is_said(served: Any) -> None:
    form = {"type": "json_schema", "json_schema": {"schema": {"type": "string", "pattern": "(?=a)b"}}}
    response = served.chat("x", response_format=form)
    assert response.status_code == 400 and "look-around" in response.json()["error"]["message"], response.text


def test_a_response_that_is_not_there_may_still_be_written(served: Any) -> None:
    """Its name is in the first event of a stream; it can be gone on from, read and deleted after the last."""
    asked = {"input": "x", "previous_response_id": "resp_1"}
    for response in (served.client.delete("/v1/responses/resp_1"), served.post("/v1/responses", **asked)):
        assert response.status_code == 404 and "is there when it has ended" in response.text


def test_a_prompt_is_a_text_or_ids_or_several(served: Any) -> None:
    for prompt, several in (
        ("ab", ["ab"]),
        ([5, 6], [[5, 6]]),
        (["ab", "c"], ["ab", "c"]),
        ([[5, 6], [7]], [[5, 6], [7]]),
    ):
        del served.engine.replies[:]
        served.post("/v1/completions", prompt=prompt, max_tokens=1)
        given = [reply.request.prompt.tolist() for reply in served.engine.replies]
        text = served.service.text
        assert given == [text.ids(one, start=True).tolist() if isinstance(one, str) else one for one in several]


def test_token_ids_go_to_the_engine_at_once(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that has nothing to do would have to be waited for all the same."""
    beside: list[Any] = []

    async def to_thread(work: Callable[..., Any], *given: Any) -> Any:
        beside.append(work)
        return work(*given)

    monkeypatch.setattr("asyncio.to_thread", to_thread)
    options = {"max_tokens": 1, "stream": True}
    assert served.post("/v1/completions", prompt=[[3, 4], [5]], **options).status_code == 200 and not beside
    assert served.post("/v1/completions", prompt="a text", **options).status_code == 200 and len(beside) == 1


def test_a_session_needs_only_what_is_new(served: Any) -> None:
    first = served.chat("My name is Ada.", session_id="s").json()
    said = first["choices"][0]["message"]["content"]
    served.chat("Who am I?", session_id="s")
    served.post("/v1/chat/completions", messages=[*HI, {"role": "assistant", "content": "x"}, *HI], session_id="s")
    prompts = [served.service.text.decode(reply.request.prompt) for reply in served.engine.replies]
    assert prompts[1] == f"My name is Ada.{said}\nWho am I?"
    assert prompts[2] == "Hello there, how are you?x\nHello there, how are you?"
    assert served.post("/close_session", session_id="s").json()["closed"]
    served.chat("Who am I?", session_id="s")
    assert served.service.text.decode(served.engine.replies[-1].request.prompt) == "Who am I?"


def test_a_session_keeps_nothing_that_is_not_to_be_stored(served: Any) -> None:
    first = served.chat("My name is Ada.", session_id="s").json()["choices"][0]["message"]["content"]
    served.chat("Forget this.", session_id="s", store=False)
    served.chat("Who am I?", session_id="s", stream=True)
    prompt = served.service.text.decode(served.engine.replies[-1].request.prompt)
    assert prompt == f"My name is Ada.{first}\nWho am I?"


def test_the_whole_conversation_in_a_session_is_not_added_to_it(served: Any) -> None:
    said = served.chat("One.", session_id="s").json()["choices"][0]["message"]["content"]
    whole = [
        {"role": "user", "content": "One."},
        {"role": "assistant", "content": said},
        {"role": "user", "content": "Two."},
    ]
    served.post("/v1/chat/completions", messages=whole, session_id="s")
    assert served.service.text.decode(served.engine.replies[-1].request.prompt) == f"One.{said}\nTwo."


def test_responses_go_on_from_each_other_and_can_be_forked_and_deleted(served: Any) -> None:
    first = served.post("/v1/responses", input="One.", max_output_tokens=3).json()
    said = first["output"][0]["content"][0]["text"]
    for question in ("Two?", "Three?"):
        served.post("/v1/responses", input=question, previous_response_id=first["id"], max_output_tokens=3)
        prompt = served.service.text.decode(served.engine.replies[-1].request.prompt)
        assert prompt == f"One.{said}\n{question}"
    assert served.client.get(f"/v1/responses/{first['id']}").json() == first
    assert served.client.delete(f"/v1/responses/{first['id']}").json()["deleted"]
    assert served.client.get(f"/v1/responses/{first['id']}").status_code == 404
    streamed = served.client.get(f"/v1/responses/{first['id']}?stream=true")
    assert streamed.status_code == 400 and streamed.json()["error"]["param"] == "stream"
    gone = served.post("/v1/responses", input="Four?", previous_response_id=first["id"])
    assert gone.status_code == 404 and gone.json()["error"]["param"] == "previous_response_id"


def test_what_a_response_said_can_be_sent_back(served: Any) -> None:
    first = served.post("/v1/responses", input="One.", max_output_tokens=3, top_logprobs=1).json()
    assert first["output"][0]["content"][0]["logprobs"]
    again = [{"role": "user", "content": "One."}, *first["output"], {"role": "user", "content": "Two?"}]
    response = served.post("/v1/responses", input=again, max_output_tokens=3)
    assert response.status_code == 200, response.text


def test_events_of_a_response(served: Any) -> None:
    got = events(served.post("/v1/responses", input="One two three", max_output_tokens=3, stream=True))
    assert [event["sequence_number"] for event in got] == list(range(len(got)))
    assert got[0]["type"] == "response.created" and got[-1]["type"] == "response.incomplete"
    text = "".join(event["delta"] for event in got if event["type"] == "response.output_text.delta")
    assert text == got[-1]["response"]["output"][0]["content"][0]["text"]
    assert served.client.get(f"/v1/responses/{got[0]['response']['id']}").json() == got[-1]["response"]


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"tools": [{}]}, "tools"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "warm"}, "temperature"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"max_tokens": 1 << 30}, "max_tokens"),
        ({"stop": [""]}, "stop[0]"),
        ({"n": 1000}, "n"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"n": 2, "session_id": "s"}, "n"),
        ({"session_id": "resp_1"}, "session_id"),
        ({"tool_choice": "required"}, "tool_choice"),
    ],
)
def test_what_is_wrong_is_named(served: Any, fields: dict[str, Any], param: str) -> None:
    response = served.post("/v1/chat/completions", **({"messages": HI} | fields))
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == param, error
    assert set(error) == {"message", "type", "param", "code"} and param.split("[")[0] in error["message"]
    assert "Value error" not in error["message"]


def test_texts_end_where_the_base_would_turn_keys_otherwise(tokenizer: Any) -> None:
    """They are read in chunks: a longer one would be refused in the middle, and its step ends the batch's."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    model = ahn.attach(
        base("llama", max_position_embeddings=64, rope_parameters=rope), ahn.AHNConfig(window=13, sinks=3)
    )
    service = build(model, tokenizer, FakeEngine(ChatText(tokenizer)), ServerSettings(), MessageStore(None))  # type: ignore[arg-type]
    assert service.settings.prompt == 64


@pytest.mark.parametrize("path, own", [("/v1/chat/completions", {"messages": HI}), ("/v1/responses", {"input": "Hi."})])
def test_what_asks_for_nothing_is_taken(served: Any, path: str, own: dict[str, Any]) -> None:
    """Clients send it along whether they use it or not."""
    neutral = {"tools": [], "include": [], "tool_choice": "auto", "parallel_tool_calls": True, "logit_bias": None}
    names = {"user": "u", "safety_identifier": "u", "prompt_cache_key": "k", "service_tier": "auto", "metadata": {}}
    response = served.post(path, **own | neutral | names)
    assert response.status_code == 200, response.text
    assert served.post(path, **own, include=["x"]).json()["error"]["param"] == "include"


@pytest.mark.parametrize(
    "body, kind, said",
    [
        (b'{"messages": []}', "text/plain", "Content-Type: application/json"),
        (b"", "application/json", "a JSON object"),
        (b"[]", "application/json", "a JSON object"),
        ('{"messages": "é"}'.encode("latin-1"), "application/json", "UTF-8"),
    ],
)
def test_a_body_that_is_no_object_is_told_what_is_needed(served: Any, body: bytes, kind: str, said: str) -> None:
    response = served.client.post("/v1/chat/completions", content=body, headers={"content-type": kind})
    assert response.status_code == 400 and said in response.json()["error"]["message"], response.text


@pytest.mark.parametrize(
    "path, fields",
    [
        ("/v1/completions", {"prompt": [5, 6, 7], "max_tokens": 1}),
        ("/v1/chat/completions", {"messages": HI, "max_tokens": 1}),
        ("/v1/responses", {"input": "Hello", "max_output_tokens": 1}),
        ("/tokenize", {"prompt": "Hello"}),
        ("/close_session", {"session_id": "s"}),
    ],
)
def test_the_faster_reader_of_json_is_asked_first(
    served: Any, monkeypatch: pytest.MonkeyPatch, path: str, fields: dict[str, Any]
) -> None:
    read: list[bytes] = []
    monkeypatch.setattr(wire, "from_json", lambda body: read.append(body) or json.loads(body))
    served.post(path, **fields)
    assert [json.loads(body) for body in read] == [fields]


def test_json_that_the_faster_reader_refuses_is_read_all_the_same(served: Any) -> None:
    body = json.dumps({"messages": HI, "max_tokens": 1}).encode("utf-16")
    headers = {"content-type": "application/json"}
    assert served.client.post("/v1/chat/completions", content=body, headers=headers).status_code == 200


def test_a_compressed_body_is_refused(served: Any) -> None:
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    response = served.client.post("/v1/chat/completions", content=gzip.compress(b"{}"), headers=headers)
    assert response.status_code == 415 and "Content-Encoding" in response.json()["error"]["message"]


@pytest.mark.sample(3)
@pytest.mark.parametrize("path", ["/", "/health", "/metrics", "/v1/models", "/v1/models/tiny", "/conversations"])
def test_head_says_what_get_says(live_fake: Callable[..., Any], path: str) -> None:
    server, _ = live_fake()
    head, get = (httpx.request(method, server.url + path) for method in ("HEAD", "GET"))
    assert head.status_code == get.status_code == 200 and not head.content
    assert head.headers["content-length"] == get.headers["content-length"] or path == "/metrics"


def test_tokens_that_are_parts_of_a_character(served: Any) -> None:
    """Their bytes are those of the text, and offsets count its characters."""
    text = "é☃x"
    ids = served.service.text.ids(text)
    asked = {"prompt": text, "echo": True, "logprobs": 1, "max_tokens": len(ids), "temperature": 0}
    given = served.post("/v1/completions", **asked).json()["choices"][0]["logprobs"]
    assert given["tokens"][: len(ids)] == [
        r"bytes:\xc3",
        r"bytes:\xa9",
        *(rf"bytes:\x{b:x}" for b in "☃".encode()),
        "x",
    ]
    assert given["text_offset"] == [0, 0, 1, 1, 1, 2, 3, 3, 4, 4, 4, 5]
    streamed = events(served.post("/v1/completions", **asked, stream=True))
    parts = [chunk["choices"][0]["logprobs"] for chunk in streamed]
    assert {name: [one for part in parts for one in part[name]] for name in given} == given
    response = events(served.post("/v1/responses", input=text, top_logprobs=1, max_output_tokens=len(ids), stream=True))
    deltas = [event["logprobs"] for event in response if event["type"] == "response.output_text.delta"]
    assert [one for part in deltas for one in part] == response[-1]["response"]["output"][0]["content"][0]["logprobs"]
    chat = served.chat(text, logprobs=True, max_tokens=len(ids)).json()["choices"][0]["logprobs"]["content"]
    assert bytes(byte for token in chat for byte in token["bytes"]).decode() == text


def test_others_do_not_wait_until_the_tokenizers_bytes_are_known(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes a second for a large vocabulary, in which no stream would go on."""
    right, threads = llguidance.hf.from_tokenizer, []

    def noted(*given: Any, **named: Any) -> Any:
        threads.append(threading.current_thread().name)
        return right(*given, **named)

    monkeypatch.setattr(llguidance.hf, "from_tokenizer", noted)
    served.chat("é", logprobs=True, stream=True, max_tokens=2)
    assert len(threads) == 1 and threads[0].startswith("asyncio_")


@pytest.mark.parametrize(
    "method, path, body, status",
    [
        ("POST", "/v1/chat/completions", b"{", 400),
        ("POST", "/v1/chat/completions", b"\xff\xfe", 400),
        ("POST", "/v1/chat/completions", b"[" * 100_000, 400),
        ("POST", "/v1/chat/completions", b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400),
        ("POST", "/v1/chat/completions", b'{"\\ud800": 1, "messages": []}', 400),
        ("POST", "/v1/completions", b'{"prompt": "a", "temperature": NaN}', 400),
        ("POST", "/v1/completions", b'{"prompt": "a", "seed": ' + b"9" * 6000 + b"}", 400),
        ("GET", "/v1/chat/completions", b"", 405),
        ("GET", "/nothing", b"", 404),
        ("POST", "/tokenize", b"x" * 2000, 413),
    ],
)
def test_every_error_has_one_form(serve: Callable[..., Any], method: str, path: str, body: bytes, status: int) -> None:
    served = serve(body=1000) if status == 413 else serve()
    response = served.client.request(method, path, content=body, headers={"content-type": "application/json"})
    assert response.status_code == status, response.text
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"].startswith("req_")


def test_a_body_without_a_length_is_bounded_too(serve: Callable[..., Any]) -> None:
    response = serve(body=1000).client.post("/tokenize", content=iter([b"x" * 600] * 3))
    assert response.status_code == 413, response.text


def test_keys(serve: Callable[..., Any]) -> None:
    served = serve(keys=("first", "second"))
    for key in (None, "third", "firs"):
        assert served.post("/v1/chat/completions", key, messages=HI).status_code == 401
    said = served.post("/v1/responses", "first", input="Secret.", max_output_tokens=2).json()
    path = f"/v1/responses/{said['id']}"
    assert served.client.get(path, headers={"Authorization": "Bearer first"}).status_code == 200
    assert served.client.get(path, headers={"Authorization": "Bearer second"}).status_code == 404
    assert served.post("/v1/responses", "second", input="x", previous_response_id=said["id"]).status_code == 404
    assert served.client.get("/conversations", headers={"Authorization": "Bearer second"}).json()["data"] == []
    assert served.client.get("/health").status_code == 200
    assert served.client.get("/metrics").status_code == 401


def test_busy_says_when_to_come_again(served: Any) -> None:
    served.engine.busy = True
    response = served.chat("x")
    assert response.status_code == 429 and response.headers["retry-after"] == "3"
    assert response.json()["error"]["code"] == "server_busy"


def test_health_says_when_the_engine_is_dead(served: Any) -> None:
    assert served.client.get("/health").status_code == 200
    assert served.client.head("/health").status_code == 200
    served.engine.dead = True
    assert served.client.get("/health").status_code == served.client.head("/health").status_code == 503


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_in_a_reply_is_told(served: Any, stream: bool) -> None:
    served.engine.error = "The model gave no number."
    response = served.chat("x", stream=stream)
    told = events(response)[-1] if stream else response.json()
    assert response.status_code == (200 if stream else 500)
    assert told["error"]["message"] == "The model gave no number."


def test_a_request_that_takes_too_long_ends_where_it_is(serve: Callable[..., Any]) -> None:
    served = serve(pause=0.02, seconds=0.3)
    body = served.chat("Hello", max_tokens=1000).json()
    assert body["choices"][0]["finish_reason"] == "length"
    assert 0 < body["usage"]["completion_tokens"] < 1000
    assert served.engine.replies[0].cancelled


def test_a_prompt_may_be_too_long(serve: Callable[..., Any]) -> None:
    response = serve(prompt=10).chat("one two three four five six seven eight nine ten eleven")
    assert response.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("path, own", [("/v1/chat/completions", {"messages": HI}), ("/v1/responses", {"input": "Hi."})])
def test_who_does_not_say_how_much_gets_what_there_is_room_for(
    serve: Callable[..., Any], path: str, own: dict[str, Any]
) -> None:
    assert serve(prompt=20).post(path, **own).json()["usage"]["total_tokens"] == 20
    refused = serve(prompt=2).post(path, **own)
    assert refused.status_code == 400 and refused.json()["error"]["code"] == "context_length_exceeded"


def test_other_hosts_are_refused_where_nothing_else_protects(serve: Callable[..., Any]) -> None:
    served = serve()
    assert served.client.get("/v1/models", headers={"host": "evil.example"}).status_code == 403
    assert serve(local=False).client.get("/v1/models", headers={"host": "a.example"}).status_code == 200


def test_metrics_count(served: Any) -> None:
    served.chat("x")
    text = served.client.get("/metrics").text
    assert 'ahn_requests_total{route="/v1/chat/completions",status="200"} 1.0' in text
    assert "ahn_time_to_first_token_seconds_count 1.0" in text
    assert "ahn_time_per_output_token_seconds_count 3.0" in text
    assert "ahn_tokens_read_total 3.0" in text and "ahn_running 1.0" in text
    assert all(line.endswith(".") for line in text.splitlines() if line.startswith("# HELP ahn_"))


def test_what_nobody_expected_is_told_and_counted(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(request: Any) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr(served.engine, "submit", broken)
    response = served.chat("x")
    assert response.status_code == 500 and response.json()["error"]["type"] == "server_error"
    assert response.headers["x-request-id"] in response.json()["error"]["message"]
    counted = 'ahn_requests_total{route="/v1/chat/completions",status="500"} 1.0'
    assert counted in served.client.get("/metrics").text


@pytest.mark.parametrize(
    "path, own", [("chat/completions", {"messages": HI, "session_id": "s"}), ("responses", {"input": "x"})]
)
def test_a_stream_that_fails_ends_with_an_error(
    served: Any, monkeypatch: pytest.MonkeyPatch, path: str, own: dict[str, Any]
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr(served.service.store, "add", broken)
    last = events(served.post(f"/v1/{path}", **own, stream=True))[-1]
    assert "The server failed" in last.get("response", last)["error"]["message"]


@pytest.mark.parametrize(
    "own", [{"metadata": {"a": "\ud800"}}, {"metadata": {"\ud800": "a"}}, {"text": {"format": {"name": "\ud800"}}}]
)
def test_what_is_no_text_is_sent_back_as_it_came(served: Any, own: dict[str, Any]) -> None:
    if "text" in own:
        own["text"]["format"] |= {"type": "json_schema", "schema": {}}
    body = json.dumps({"input": "x", "max_output_tokens": 1} | own)
    for stream in (False, True):
        sent = body[:-1] + f', "stream": {json.dumps(stream)}}}'
        response = served.client.post("/v1/responses", content=sent, headers={"content-type": "application/json"})
        given = events(response)[-1]["response"] if stream else response.json()
        assert response.status_code == 200 and given["metadata"] == own.get("metadata", {})


def test_a_schema_that_is_missing_is_not_passed_over(served: Any) -> None:
    for form in ({"type": "json_schema", "name": "x"}, {"type": "text", "schema": {}}):
        response = served.post("/v1/responses", input="x", text={"format": form})
        assert response.status_code == 400 and response.json()["error"]["param"] == "text.format.schema", response.text


def test_a_full_disk_is_told_as_such(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither is it the client's fault, nor is the conversation unknown."""
    served.chat("One.", session_id="s")

    def full(owner: str, name: str, path: Any, messages: Any) -> None:
        raise AHNError(f"{path} cannot be written: No space left on device.")

    monkeypatch.setattr(served.engine, "export", full)
    served.service.store._db.execute("PRAGMA max_page_count=1")
    state = json.dumps([{"role": "user", "content": "x" * 100_000}]).encode()
    answers = [
        served.client.get("/conversations/s/state"),
        served.client.put("/conversations/t/state", content=state),
        served.chat("x" * 100_000, session_id="s"),
    ]

    def nowhere(**_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryDirectory", nowhere)
    answers += [served.client.get("/conversations/s/state"), served.client.put("/conversations/t/state", content=state)]
    for response in answers:
        error = response.json()["error"]
        assert response.status_code == 507 and error["code"] == "storage_failed" and "/" not in error["message"], error


def test_models_and_tokens(served: Any) -> None:
    assert [model["id"] for model in served.client.get("/v1/models").json()["data"]] == ["tiny"]
    assert served.client.get("/v1/models/other").status_code == 404
    assert served.chat("x", model="other").json()["error"]["code"] == "model_not_found"
    body = served.post("/tokenize", prompt="Hello there").json()
    assert served.service.text.decode(body["tokens"]) == "Hello there" and body["count"] == len(body["tokens"])
    assert served.post("/tokenize", messages=HI).json()["count"] > 0


def test_a_conversation_can_be_taken_elsewhere(serve: Callable[..., Any]) -> None:
    here, there = serve(), serve()
    asked = "Remember 42."
    said = here.chat(asked, session_id="s").json()["choices"][0]["message"]["content"]
    file = here.client.get("/conversations/s/state")
    assert file.status_code == 200, file.text
    taken = there.client.put("/conversations/moved/state", content=file.content).json()
    assert taken["name"] == "moved" and taken["imported"] and [m["content"] for m in taken["messages"]] == [asked, said]
    there.post("/v1/responses", input="And?", previous_response_id=taken["turn"], max_output_tokens=1)
    assert there.service.text.decode(there.engine.replies[-1].request.prompt) == f"{asked}{said}\nAnd?"
    there.chat("What?", session_id="moved")
    prompt = there.service.text.decode(there.engine.replies[-1].request.prompt)
    assert prompt == f"Remember 42.{said}\nWhat?"
    bad = there.client.put("/conversations/moved/state", content=b"no conversation")
    assert bad.status_code == 400 and "/" not in bad.json()["error"]["message"]  # the server's own places are its own
    assert "letters" in there.client.put("/conversations/a%20b/state", content=b"").json()["error"]["message"]
    assert here.client.get("/conversations/unknown/state").status_code == 404
    assert here.client.get("/conversations/s").json()["bytes"] == 8


def test_a_page_without_outside_requests(served: Any) -> None:
    response = served.client.get("/")
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "http" not in policy
    assert "NONCE" not in response.text


def test_n_replies_draw_in_their_own_ways(served: Any) -> None:
    body = served.chat("x", n=3, seed=5).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert [reply.request.options.seed for reply in served.engine.replies] == [5, 6, 7]


def test_options_reach_the_engine(served: Any) -> None:
    served.chat("x", temperature=0, top_k=-1, top_p=0.5, stop="a", logit_bias={"7": 3}, ignore_eos=True, store=False)
    request = served.engine.replies[0].request
    options = request.options
    assert (options.temperature, options.top_k, options.top_p, options.stop) == (0, 0, 0.5, ("a",))
    assert options.logit_bias == {7: 3.0} and options.ignore_eos and not request.keep


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_a_page_elsewhere_cannot_ask(served: Any, kind: str) -> None:
    """A browser sends these kinds to any host without asking first; JSON it does not."""
    body = json.dumps({"messages": HI, "max_tokens": 1}).encode()
    response = served.client.post("/v1/chat/completions", content=body, headers={"content-type": kind})
    assert response.status_code == 400 and not served.engine.replies
    assert "access-control-allow-origin" not in response.headers
