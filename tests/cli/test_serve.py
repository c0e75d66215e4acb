"""`ahn serve` as a program: what it refuses before a model is loaded, and what outlives it."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ahn.cli import serve
from ahn.errors import install_command

installed = pytest.mark.skipif(importlib.util.find_spec("fastapi") is None, reason="the extra serve is not installed")
ray_installed = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra ray is not installed")


def test_without_the_extra_it_says_what_to_install(
    ahn_cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "fastapi" else found(name))
    run = ahn_cli("serve")
    assert run.code == 1 and install_command("serve") in run.err and run.err.count("\n") == 1


@installed
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "example.org", "192.168.0.1"])
def test_another_host_needs_a_key(ahn_cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    monkeypatch.delenv("AHN_API_KEY", raising=False)
    run = ahn_cli("serve", "--host", host)
    assert run.code == 1 and "AHN_API_KEY" in run.err


@installed
def test_what_cannot_be_served_is_said_before_a_model_is_loaded(
    ahn_cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("ahn.cli.session.open_session", lambda *_: pytest.fail("a model was loaded"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        run = ahn_cli("serve", "--port", taken.getsockname()[1])
    assert run.code == 1 and "in use" in run.err
    (tmp_path / "file").write_text("")
    assert "kept in" in ahn_cli("serve", "--state-dir", tmp_path / "file").err
    if Path("/proc/self").exists():  # where nobody can write, whoever runs this
        assert "kept in /proc" in ahn_cli("serve", "--state-dir", "/proc").err
    assert "key" in ahn_cli("serve", "--api-key", "two words").err
    assert ahn_cli("serve", "--port", 70000).code == 2
    assert "--max-age" in ahn_cli("serve", "--max-age", 0).err


@pytest.mark.skipif(os.name != "posix", reason="permissions")
def test_a_directory_that_others_can_read_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "open").mkdir()
    for name, mode in (("open", 0o755), ("closed", 0o700)):
        if name == "open":
            (tmp_path / name).chmod(mode)
        directory = serve._directory(tmp_path / name)
        assert directory is not None and directory.stat().st_mode & 0o777 == mode
        assert ("chmod 700" in capsys.readouterr().err) == (name == "open")


@installed
def test_replicas_need_ray(ahn_cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else found(name))
    run = ahn_cli("serve", "--replicas", 2)
    assert run.code == 1 and install_command("ray") in run.err and run.err.count("\n") == 1


KILLS = 4
"""Times that the server is killed under load; AHN_KILLS sets another number."""


class Program:
    """`ahn serve` in a process of its own."""

    def __init__(self, state: Path, *words: str) -> None:
        words = ("serve", "--port", "0", "--state-dir", str(state), *words)
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from ahn.cli import main; main()", *words],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"COLUMNS": "200", "PYTHONUNBUFFERED": "1"},
        )
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if found := re.search(r"(http://127\.0\.0\.1:\d+)", line):
                self.url = found[1]
            if "startup complete" in line:
                return
        pytest.fail("the server did not start")

    def say(self, text: str, session: str = "s") -> tuple[str, int, int]:
        """A turn of a session: the reply, the prompt's tokens, and how many of them had been read before."""
        import httpx

        message = {"role": "user", "content": text}
        body = {"messages": [message], "session_id": session, "max_tokens": 4, "temperature": 0}
        said = httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=60).json()
        usage = said["usage"]
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return said["choices"][0]["message"]["content"], usage["prompt_tokens"], cached

    def end(self, how: signal.Signals) -> int:
        self.process.send_signal(how)
        self.process.stderr.read()  # type: ignore[union-attr]
        return self.process.wait(60)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Program]]:
    programs: list[Program] = []

    def run(*words: str) -> Program:
        programs.append(Program(tmp_path, *words))
        return programs[-1]

    yield run
    for program in programs:
        program.process.kill()
        program.process.wait()


@installed
@pytest.mark.slow
def test_conversations_outlive_the_program_however_it_ends(start: Callable[[], Program]) -> None:
    first = start()
    _, prompt, _ = first.say("The cello is red. " * 50)
    first.end(signal.SIGKILL)
    second = start()
    _, longer, cached = second.say("And then?")
    assert longer > prompt and cached >= prompt - 1  # the turn before the crash is there, and need not be read again
    assert second.end(signal.SIGINT) == 0
    third = start()
    _, longest, cached = third.say("And now?")
    assert longest > longer and cached >= longer - 1
    assert third.end(signal.SIGTERM) in (0, -signal.SIGTERM)


@installed
@pytest.mark.slow
def test_another_server_goes_on_when_one_is_killed(start: Callable[[], Program]) -> None:
    one, other = start(), start()
    _, first, _ = one.say("The cello is red. " * 50)
    _, before, _ = one.say("And then?")
    one.end(signal.SIGKILL)
    _, prompt, cached = other.say("And now?")
    assert prompt > before
    assert cached >= first - 1  # the second turn's state may be too new to be known, and is too short to be looked for


def by_replica(url: str, metric: str) -> dict[str, float]:
    """A metric of each replica."""
    import httpx

    page = httpx.get(f"{url}/metrics", timeout=60).text
    found = re.findall(rf'^{metric}{{[^}}]*replica="([^"]+)"[^}}]*}} (\S+)$', page, flags=re.M)
    return {replica: float(number) for replica, number in found}


@installed
@pytest.mark.slow
@ray_installed
def test_a_conversation_goes_on_when_its_replica_is_killed(start: Callable[..., Program], tmp_path: Path) -> None:
    """`make test-all` installs Ray; with it this takes a minute."""
    import httpx

    program = start("--replicas", "2")
    where: dict[str, set[str]] = {}
    said: dict[tuple[str, int], str] = {}
    for turn in range(3):
        for session in "abcdefgh":
            before = by_replica(program.url, "ahn_tokens_written_total")
            said[session, turn] = program.say(f"Turn {turn} of {session}. " * 20, session)[0]
            after = by_replica(program.url, "ahn_tokens_written_total")
            where.setdefault(session, set()).update(name for name in after if after[name] > before[name])
    assert all(len(replicas) == 1 for replicas in where.values()), where
    assert len(set.union(*where.values())) == 2, where

    _, prompt, _ = program.say("One more.", "a")
    message = {"role": "user", "content": "And now?"}
    long = {"messages": [message], "session_id": "a", "max_tokens": 8000, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{program.url}/v1/chat/completions", json=long, timeout=60) as reply:
        lines = reply.iter_lines()
        next(lines)
        host, process = max(by_replica(program.url, "ahn_running").items(), key=lambda pair: pair[1])[0].split(":")
        assert {f"{host}:{process}"} == where["a"]
        os.kill(int(process), signal.SIGKILL)
        data = [line for line in lines if line.startswith("data: ")]
    assert json.loads(data[-1].removeprefix("data: "))["error"]["code"] == "replica_lost"
    last, longer, cached = program.say("And now?", "a")
    assert longer > prompt and cached >= prompt - 1  # from the disk: what the other replica wrote
    until = time.monotonic() + 60
    while httpx.get(f"{program.url}/health", timeout=60).json()["replicas"] < 2 and time.monotonic() < until:
        time.sleep(0.5)
    assert len(by_replica(program.url, "ahn_running")) == 2  # Ray has started another
    assert program.end(signal.SIGINT) == 0
    alone = start("--state-dir", str(tmp_path / "alone"))  # the same turns, one engine
    for turn in range(3):
        assert alone.say(f"Turn {turn} of a. " * 20, "a")[0] == said["a", turn]
    alone.say("One more.", "a")
    assert alone.say("And now?", "a")[0] == last


class Talker:
    """A client whose responses go on from each other; it remembers what it was told is finished."""

    def __init__(self, number: int) -> None:
        self.number, self.last = number, None
        self.finished: dict[str, str] = {}

    def talk(self, url: str) -> None:
        """Turn after turn, until the server is gone."""
        import httpx

        with httpx.Client(base_url=url, timeout=60) as client:
            while True:
                body = {"input": f"Turn {len(self.finished)} of client {self.number}. ", "max_output_tokens": 3}
                try:
                    said = client.post("/v1/responses", json=body | {"previous_response_id": self.last})
                except httpx.HTTPError:
                    return
                assert said.status_code == 200, said.text
                self.last = said.json()["id"]
                self.finished[self.last] = said.json()["output"][0]["content"][0]["text"]

    def check(self, url: str) -> None:
        """All that was finished is there, whole."""
        import httpx

        for name, text in self.finished.items():
            said = httpx.get(f"{url}/v1/responses/{name}", timeout=60)
            assert said.status_code == 200 and said.json()["output"][0]["content"][0]["text"] == text


@installed
@pytest.mark.slow
def test_no_finished_turn_is_lost_when_the_server_is_killed(start: Callable[[], Program]) -> None:
    draw, talkers = random.Random(0), [Talker(number) for number in range(4)]
    for _ in range(int(os.environ.get("AHN_KILLS", KILLS))):
        program = start()
        for talker in talkers:
            talker.check(program.url)
        threads = [threading.Thread(target=talker.talk, args=(program.url,)) for talker in talkers]
        for thread in threads:
            thread.start()
        time.sleep(draw.uniform(0.5, 4))
        program.end(signal.SIGKILL)
        for thread in threads:
            thread.join()
    program = start()
    for talker in talkers:
        talker.check(program.url)
    assert sum(len(talker.finished) for talker in talkers) > KILLS


@installed
@pytest.mark.slow
@ray_installed
def test_conversations_go_on_when_a_machine_is_gone(
    start: Callable[..., Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two nodes of Ray on one machine, with a folder that both see."""
    import httpx
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        other = cluster.add_node(num_cpus=1)  # a replica takes one
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        program = start("--replicas", "2")
        prompts = {session: program.say(f"A turn of {session}. " * 20, session)[1] for session in "abcdefgh"}
        written = by_replica(program.url, "ahn_tokens_written_total")
        assert len(written) == 2 and all(written.values()), written
        cluster.remove_node(other, allow_graceful=False)
        until = time.monotonic() + 60
        while httpx.get(f"{program.url}/health", timeout=60).json().get("replicas") != 1 and time.monotonic() < until:
            time.sleep(0.5)
        for session, prompt in prompts.items():
            _, longer, cached = program.say("And now?", session)
            assert longer > prompt and cached >= prompt - 1, session
        assert program.end(signal.SIGINT) == 0
    finally:
        cluster.shutdown()
