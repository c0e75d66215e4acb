"""vLLM's own server with OpenAI's API: a process that is started on a shape with dummy weights, asked, and ended."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx

sys.path.append(str(Path(__file__).parents[1] / "peers"))  # how vLLM is set, and the shape's directory
from peer_vllm import CAPTURED, settings, variables
from plan import held, write_shape

MORE = [256, 320, 384, 448, 512]
"""Of captured batches, beyond those of `benchmarks/peers`: of short texts more conversations are held."""
START_S, END_S = 240.0, 20.0
"""Seconds within which a server answers, and within which it ends when it is asked to."""
ROOM = re.compile(r"^vllm:cache_config_info\{(.*)\} ", re.MULTILINE)
TAIL = 80
"""Lines of a server's log that are shown when it ends by itself."""


@dataclasses.dataclass(frozen=True)
class VLLMServer:
    """One that answers.

    Attributes:
        settings: of its engine.
        capacity: tokens of all conversations together, for which it has memory.
        block: tokens that are given memory at once.
    """

    url: str
    settings: Mapping[str, Any]
    capacity: int
    block: int

    def conversations(self, tokens: int) -> int:
        """How many of so many tokens each it holds, none of which has anything in common with another."""
        return held(self.capacity, tokens + self.block, self.settings["max_num_seqs"])

    def row(self) -> dict[str, Any]:
        """What rows say of it."""
        versions = {name: version(name) for name in ("vllm", "torch", "transformers", "triton", "fastapi")}
        return {"versions": versions, "settings": self.settings, "capacity_tokens": self.capacity}


@contextlib.contextmanager
def started(model: str, contexts: Sequence[int], folder: Path) -> Iterator[VLLMServer]:
    """vLLM's server while the block runs.

    Args:
        model: a shape's name.
        contexts: tokens of the texts that it will be asked to read.
        folder: for the model's directory and the log.

    Raises:
        RuntimeError: it ended before it answered, or did not answer in time.
    """
    sizes = [*CAPTURED, *MORE]
    options = argparse.Namespace(contexts=contexts, splits=64)
    chosen = settings(options, write_shape(folder, model, max(contexts)), "auto")
    chosen |= {"enable_prefix_caching": True, "enable_prompt_tokens_details": True, "max_num_seqs": sizes[-1]}
    chosen |= {"compilation_config": {"cudagraph_capture_sizes": sizes}}
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments(chosen)]
    command += ["--served-model-name", "served", "--host", "127.0.0.1", "--port", str(port)]
    url = f"http://127.0.0.1:{port}"
    with running([*command, "--disable-uvicorn-access-log"], url, folder / "server.log", variables()):
        yield VLLMServer(url, chosen | {"model": model}, *room(httpx.get(f"{url}/metrics", timeout=60).text))


def arguments(chosen: Mapping[str, Any]) -> Iterator[str]:
    """Of the command line, for an engine's settings."""
    for name, value in chosen.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            yield f"--{option}" if value else f"--no-{option}"
        else:
            yield from (f"--{option}", json.dumps(value) if isinstance(value, dict) else str(value))


def room(page: str) -> tuple[int, int]:
    """Tokens for which there is memory, and those of a block, from the server's metrics.

    Raises:
        RuntimeError: they do not say it.
    """
    if (found := ROOM.search(page)) is None:
        raise RuntimeError("The server's /metrics have no vllm:cache_config_info, which says how much memory it has.")
    said = dict(re.findall(r'(\w+)="([^"]*)"', found[1]))
    block = int(said["block_size"])
    return int(said["num_gpu_blocks"]) * block, block


@contextlib.contextmanager
def running(
    command: Sequence[str], url: str, log: Path, variables: Mapping[str, str], seconds: float = START_S
) -> Iterator[None]:
    """A server and all processes that it starts, from its first answer at /health until the block ends.

    Raises:
        RuntimeError: it ended before, or did not answer within so many seconds. The end of its log is on stderr.
    """
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | variables, start_new_session=True
        )
    try:
        until = time.monotonic() + seconds
        while not answers(url):
            ended = process.poll()
            if ended is not None or time.monotonic() > until:
                print(*log.read_text(errors="replace").splitlines()[-TAIL:], sep="\n", file=sys.stderr, flush=True)
                what = f"did not answer within {seconds:.0f} s" if ended is None else f"ended with {ended}"
                raise RuntimeError(f"The server {what}: {' '.join(command)}. What it printed last is above.")
            time.sleep(0.2)
        yield
    finally:
        end(process)


def answers(url: str) -> bool:
    """Whether a server is ready."""
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all of its group: first it is asked to."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_S)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
