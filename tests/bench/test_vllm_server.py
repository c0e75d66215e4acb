"""How benchmarks/serving starts vLLM's server and ends it, with a stand-in: vLLM itself needs a GPU."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest

SERVING = Path(__file__).parents[2] / "benchmarks" / "serving"
MODULES = ("client", "plan", "peer_vllm", "vllm_server")
PAGE = """# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="16",cache_dtype="auto",num_gpu_blocks="1000",sliding_window="None"} 1.0
"""
STAND_IN = """
import http.server, os, signal, subprocess, sys
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(os.environ["SAID"].encode())
deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); time.sleep(99)"
child = subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Answer).serve_forever()
"""


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """Those of the benchmark, of which nothing is left for the tests that follow."""
    monkeypatch.setattr(sys, "path", [str(SERVING), *sys.path])
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    import client
    import vllm_server

    yield {"client": client, "vllm_server": vllm_server}
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and is not yet collected does not."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")
def test_server_and_what_it_started_end_with_the_block(
    modules: dict[str, ModuleType], tmp_path: Path, port: int
) -> None:
    command, log = [sys.executable, "-c", STAND_IN, str(port)], tmp_path / "log"
    with modules["vllm_server"].running(command, f"http://127.0.0.1:{port}", log, {"SAID": "hello"}):
        assert httpx.get(f"http://127.0.0.1:{port}/metrics").text == "hello"
        child = int(log.read_text().splitlines()[0])
        assert alive(child)
    deadline = time.monotonic() + 10
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(child)  # it does not heed SIGTERM


def test_server_that_dies_says_why(
    modules: dict[str, ModuleType], tmp_path: Path, port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-c", "import sys; print('no memory left'); sys.exit(3)"]
    with (
        pytest.raises(RuntimeError, match="ended with 3"),
        modules["vllm_server"].running(command, f"http://127.0.0.1:{port}", tmp_path / "log", {}),
    ):
        pytest.fail("began")
    assert "no memory left" in capsys.readouterr().err


def test_server_that_never_answers_is_ended(modules: dict[str, ModuleType], tmp_path: Path, port: int) -> None:
    log = tmp_path / "log"
    command = ["sh", "-c", "echo $$; sleep 99"]
    with (
        pytest.raises(RuntimeError, match="did not answer within 0 s"),
        modules["vllm_server"].running(command, f"http://127.0.0.1:{port}", log, {}, seconds=0.4),
    ):
        pytest.fail("began")
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text()), 0)


def test_memory_that_it_says_it_has(modules: dict[str, ModuleType]) -> None:
    assert modules["vllm_server"].room(PAGE) == (16000, 16)
    with pytest.raises(RuntimeError, match="cache_config_info"):
        modules["vllm_server"].room("# nothing")


def test_conversations_that_it_holds(modules: dict[str, ModuleType]) -> None:
    server = modules["vllm_server"].VLLMServer("", {"max_num_seqs": 50}, 16000, 16)
    assert server.conversations(1000) == 15 and server.conversations(16) == 50


def test_settings_become_a_command_line(modules: dict[str, ModuleType]) -> None:
    chosen = {"load_format": "dummy", "skip_tokenizer_init": True, "enable_x": False, "some_config": {"sizes": [1, 2]}}
    made = list(modules["vllm_server"].arguments(chosen))
    assert made[:4] == ["--load-format", "dummy", "--skip-tokenizer-init", "--no-enable-x"]
    assert made[4] == "--some-config" and json.loads(made[5]) == chosen["some_config"]


def test_tokens_of_events_that_hold_several(modules: dict[str, ModuleType]) -> None:
    client = modules["client"]
    heard = client.Heard(sent=time.perf_counter())

    def event(written: int, **more: Any) -> str:
        return json.dumps({"choices": [{"text": ""}], "usage": {"completion_tokens": written}} | more)

    client.take(heard, event(1))
    client.take(heard, event(4))
    assert len(heard.times) == 4 and len(set(heard.times)) == 2
    usage = {"completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 32}}
    client.take(heard, event(4, choices=[], usage=usage))
    assert len(heard.times) == 4 and heard.cached == 32


def test_prompt_that_is_not_read(modules: dict[str, ModuleType]) -> None:
    client = modules["client"]
    work = {"model": "served", "vocabulary": 9, "counts": True}
    (filled,), (read,) = (client.bodies(client.Asked([(1, 3)], 2, filled=way), work) for way in (True, False))
    assert json.loads(filled)["kv_transfer_params"] == {"read": True}
    assert "kv_transfer_params" not in json.loads(read)
