"""Real clients at a real port, with the shipped model."""

from __future__ import annotations

import asyncio
import copy
import json
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("openai")
pytest.importorskip("fastapi")

import openai
from starlette.testclient import TestClient

from ahn.serve.api.app import make_app
from ahn.serve.api.building import build
from ahn.serve.api.messages import MessageStore
from ahn.serve.api.settings import ServerSettings
from ahn.serve.engine.engine import Engine

MESSAGES = [{"role": "user", "content": "The keeper of the lighthouse"}]
GREEDY = {"model": "tiny", "messages": MESSAGES, "temperature": 0, "max_tokens": 8}


@pytest.fixture(scope="module")
def client(live: Any) -> Any:
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)


def alone(live: Any, text: str, new: int) -> str:
    """What the model itself writes, without a server."""
    from ahn.cli.session import Session
    from ahn.cli.writing import Sampling

    session = Session(live.service.engine.model, live.service.text.tokenizer)
    session.read(session.encode(text, start=True))
    return session.write(Sampling(new, temperature=0))


def test_openai_chat(client: Any, live: Any) -> None:
    whole = client.chat.completions.create(**GREEDY)
    assert whole.choices[0].message.content == alone(live, MESSAGES[0]["content"], 8)
    chunks = list(client.chat.completions.create(**GREEDY, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_openai_async(live: Any) -> None:
    async def both() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none") as client:
            whole = await client.chat.completions.create(**GREEDY)
            stream = await client.chat.completions.create(**GREEDY, stream=True)
            parts = [chunk.choices[0].delta.content or "" async for chunk in stream]
            return [whole.choices[0].message.content, "".join(parts)]

    whole, parts = asyncio.run(both())
    assert whole == parts


def test_openai_responses(client: Any) -> None:
    first = client.responses.create(model="tiny", input="One two three", max_output_tokens=6, temperature=0)
    assert first.output_text and client.responses.retrieve(first.id).output_text == first.output_text
    with client.responses.stream(
        model="tiny", input="And four?", previous_response_id=first.id, max_output_tokens=6, temperature=0
    ) as stream:
        events = list(stream)
    assert events[0].type == "response.created" and events[-1].type == "response.incomplete"
    assert "response.output_text.delta" in [event.type for event in events]
    second = events[-1].response
    assert second.usage.input_tokens_details.cached_tokens >= first.usage.total_tokens - 2
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)


def test_openai_completions_and_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    body = client.completions.create(model="tiny", prompt=["The", "A"], max_tokens=3, n=2, logprobs=2, seed=1)
    assert [choice.index for choice in body.choices] == [0, 1, 2, 3]
    assert all(len(choice.logprobs.token_logprobs) == 3 for choice in body.choices)
    again = client.completions.create(model="tiny", prompt=["The", "A"], max_tokens=3, n=2, logprobs=2, seed=1)
    assert [choice.text for choice in again.choices] == [choice.text for choice in body.choices]


def test_a_conversation_is_moved_with_its_state(client: Any, live: Any) -> None:
    import httpx

    first = client.responses.create(
        model="tiny", input="A lamp in the cellar. " * 20, max_output_tokens=4, temperature=0
    )
    kept = httpx.get(f"{live.url}/conversations/{first.id}").json()
    assert 0 < kept["bytes"] < kept["full_attention_bytes"] * 10 and kept["tokens"] >= first.usage.total_tokens - 1
    file = httpx.get(f"{live.url}/conversations/{first.id}/state").content
    assert httpx.put(f"{live.url}/conversations/moved/state", content=file).status_code == 200
    client.responses.delete(first.id)
    body = GREEDY | {"messages": [{"role": "user", "content": "And?"}], "extra_body": {"session_id": "moved"}}
    usage = client.chat.completions.create(**body).usage
    assert usage.prompt_tokens > first.usage.total_tokens
    assert usage.prompt_tokens_details.cached_tokens >= first.usage.total_tokens - 1
    damaged = file[: len(file) // 2] + bytes([file[len(file) // 2] ^ 1]) + file[len(file) // 2 + 1 :]
    refused = httpx.put(f"{live.url}/conversations/other/state", content=damaged)
    assert refused.status_code == 400 and "error" in refused.json()


def test_openai_knows_the_errors(client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="tools") as error:
        client.chat.completions.create(**GREEDY, tools=[{"type": "function", "function": {"name": "f"}}])
    assert error.value.param == "tools"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**GREEDY | {"model": "gpt"})


def test_a_reply_follows_a_json_schema(client: Any) -> None:
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 99}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}
    asked = {"model": "tiny", "messages": MESSAGES, "response_format": form}
    reply = client.chat.completions.create(**asked, max_tokens=200, seed=0)
    person = json.loads(reply.choices[0].message.content)
    assert set(person) == {"name", "age"} and isinstance(person["age"], int) and len(person["name"]) <= 8
    assert reply.choices[0].finish_reason == "stop"
    form["json_schema"]["schema"] = {"type": "nonsense"}
    with pytest.raises(openai.BadRequestError, match="JSON schema"):
        client.chat.completions.create(**asked)


def test_twenty_clients_at_once(client: Any, live: Any) -> None:
    """More than there are places: all are answered, and each as if it were alone."""
    texts = [f"Once upon a time there were {n} towns" for n in range(20)]

    def ask(text: str) -> str:
        body = GREEDY | {"messages": [{"role": "user", "content": text}], "max_tokens": 3}
        reply: str = client.chat.completions.create(**body).choices[0].message.content
        return reply

    with ThreadPoolExecutor(20) as pool:
        replies = list(pool.map(ask, texts))
    assert replies[::7] == [alone(live, text, 3) for text in texts[::7]]
    assert len(replies) == 20 and all(replies)


def test_turns_in_a_template_are_found_again(live: Any) -> None:
    """However a reply was drawn or stopped, the next turn reads what is new; several replies read once."""
    tokenizer = copy.deepcopy(live.service.text.tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}\n{{ m.content }}<|endoftext|>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant\n{% endif %}"
    )
    engine = Engine(live.service.engine.model, tokenizer, conversations=4)
    engine.start()
    app = make_app(build(live.service.engine.model, tokenizer, engine, ServerSettings(), MessageStore(None)))
    messages = [{"role": "user", "content": "The red lamp. " * 40}]
    with TestClient(app, base_url="http://127.0.0.1") as client:

        def ask(**fields: Any) -> Any:
            return client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 6} | fields).json()

        reply = ask(n=3, seed=1)
        prompt = reply["usage"]["prompt_tokens"]
        assert engine.stats().tokens_read < prompt  # once, but for the last token, of which all begin
        for turn, fields in enumerate([{"seed": 2}, {"stop": ["e", "a"], "temperature": 0}, {"temperature": 0}]):
            before = client.post("/tokenize", json={"messages": messages}).json()["count"]
            messages.append(reply["choices"][0]["message"])
            messages.append({"role": "user", "content": f"Turn {turn}"})
            reply = ask(**fields)
            assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] >= before - 1


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(live: Any) -> None:
    body = json.dumps(GREEDY | {"stream": True})
    said = subprocess.run(
        ["curl", "-sN", f"{live.url}/v1/chat/completions", "-H", "Content-Type: application/json", "-d", body],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert said.endswith("data: [DONE]\n\n") and said.count("data: ") > 3
