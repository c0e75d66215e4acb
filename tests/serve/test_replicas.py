"""Which replica a request comes to, and the metrics of several as one page; tests/cli/test_serve.py runs real ones."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")

from prometheus_client.parser import text_string_to_metric_families

from ahn.errors import AHNError
from ahn.serve.api.messages import StorageError
from ahn.serve.api.settings import ServerSettings
from ahn.serve.replicas.pages import merged
from ahn.serve.replicas.routing import key_of, routing_key

USER, OTHER = {"role": "user", "content": "Hi."}, {"role": "user", "content": "Ho."}
SYSTEM, REPLY = {"role": "system", "content": "Be brief."}, {"role": "assistant", "content": "Yes?"}


def key(path: str = "/v1/chat/completions", **fields: Any) -> str:
    return routing_key(path, json.dumps(fields).encode())


def test_a_session_keeps_its_replica_whatever_is_said() -> None:
    asked = {key(messages=[USER], session_id="s"), key(messages=[OTHER], session_id="s", user="u")}
    asked |= {key("/close_session", session_id="s"), key("/conversations/s"), key("/conversations/s/state")}
    assert asked == {key_of("s")} != {key_of("t")}


def test_responses_keep_the_replica_of_the_first() -> None:
    first = key("/v1/responses", input="Hi.", user="u")
    response = f"resp_{first}{'0' * 32}"
    assert key("/v1/responses", input="Ho.", previous_response_id=response, user="v") == first
    assert (
        routing_key(f"/v1/responses/{response}", b"") == routing_key(f"/conversations/{response}/state", b"") == first
    )


def test_what_a_client_names_as_the_key_of_its_prompts_comes_before_the_user() -> None:
    assert key(messages=[USER], prompt_cache_key="k", user="u") == key_of("k") != key(messages=[USER], user="u")


def test_a_client_that_sends_all_messages_keeps_its_replica() -> None:
    first = key(messages=[SYSTEM, USER])
    assert key(messages=[SYSTEM, USER, REPLY, OTHER]) == first != key(messages=[SYSTEM, OTHER])


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"[" * 100_000, b'{"messages": 1}', b'{"session_id": 7}', b"\xff"])
def test_what_goes_on_from_nothing_is_spread(body: bytes) -> None:
    keys = {routing_key("/v1/completions", body) for _ in range(20)}
    assert len(keys) == 20 and all(len(each) == 16 for each in keys)


def test_a_name_that_is_no_valid_text_has_a_key() -> None:
    assert len(routing_key("/v1/chat/completions", b'{"session_id": "\\ud800"}')) == 16


def test_metrics_of_two_replicas_are_one_page(served: Any) -> None:
    served.chat("x")
    page = served.client.get("/metrics").content
    whole = list(text_string_to_metric_families(merged({"a:1": page, "b:2": page}).decode()))
    single = list(text_string_to_metric_families(page.decode()))
    assert [(f.name, f.type, f.documentation) for f in whole] == [(f.name, f.type, f.documentation) for f in single]
    for family, own in zip(whole, single, strict=True):
        assert len(family.samples) == 2 * len(own.samples)
        assert {sample.labels["replica"] for sample in family.samples} == ({"a:1", "b:2"} if own.samples else set())


@pytest.mark.slow  # importing Ray takes seconds
def test_replicas_that_cannot_be_started_are_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    from ahn.serve.replicas.cluster import replicated

    def slow(address: str, **_: Any) -> None:
        raise ConnectionError if address == "auto" else Exception("The current node timed out\nduring startup.")

    monkeypatch.setattr(ray, "init", slow)
    with pytest.raises(AHNError, match="could not be started: The current node timed out during startup"):
        replicated(lambda store: pytest.fail("a model was loaded"), ServerSettings(), 2, False, None, None)


@pytest.mark.slow
@pytest.mark.parametrize("kept", [True, False])
def test_the_process_that_keeps_messages_may_die(kept: bool, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    from ahn.serve.replicas.cluster import connect, keep_messages
    from ahn.serve.replicas.replica import RemoteMessages

    def processes() -> set[int]:
        listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
        return {int(line.split()[0]) for line in listed.splitlines() if "ray::MessageStore" in line}

    connect()
    try:
        before = processes()
        keeper = keep_messages(tmp_path if kept else None, None)
        store = RemoteMessages(keeper)
        store.add("me", "one", [USER])
        (process,) = processes() - before
        os.kill(process, signal.SIGKILL)
        assert store.messages("me", "one") == ([USER] if kept else None)
        store.add("me", "two", [OTHER])
        assert store.messages("me", "two") == [OTHER]
        with pytest.raises(StorageError) as said:
            store.add("me", "three", [USER], parent="gone")
        assert str(said.value) == "The conversation was deleted while this turn was written."
        ray.kill(keeper)  # for good, but not at once
        with pytest.raises(StorageError, match="is gone"):
            for _ in range(100):
                store.head("me", "s")
                time.sleep(0.1)
    finally:
        ray.shutdown()
