"""Load generators that people use, where they are installed: locust and guidellm."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")

from ahn import tiny

FILE = """
import json

from locust import FastHttpUser, task


class Talker(FastHttpUser):
    turn = 0

    @task
    def chat(self):
        self.turn += 1
        body = {"messages": [{"role": "user", "content": f"Turn {self.turn}"}], "max_tokens": 4, "stream": True}
        body |= {"session_id": f"talker-{id(self)}", "stream_options": {"include_usage": True}}
        with self.client.post("/v1/chat/completions", json=body, catch_response=True) as response:
            data = [line[6:] for line in (response.text or "").splitlines() if line.startswith("data: ")]
            if not data or data[-1] != "[DONE]" or json.loads(data[-2])["usage"]["completion_tokens"] != 4:
                response.failure(f"{response.status_code}: {response.text}")
        if self.environment.stats.total.num_requests >= 40:
            self.environment.runner.quit()
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("locust") is None, reason="locust is not installed")
def test_locust_finds_no_failure(live: Any, tmp_path: Path) -> None:
    (tmp_path / "locustfile.py").write_text(FILE)
    words = ["--headless", "--users", "8", "--spawn-rate", "8", "--stop-timeout", "30"]
    subprocess.run(
        ["locust", *words, "--host", live.url, "--csv", "found", "--only-summary"],
        cwd=tmp_path,
        check=True,
        timeout=120,
    )
    with (tmp_path / "found_stats.csv").open() as file:
        total = list(csv.DictReader(file))[-1]
    assert int(total["Request Count"]) >= 40 and total["Failure Count"] == "0"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("guidellm") is None, reason="guidellm is not installed")
def test_guidellm_finds_no_failure(live: Any, tmp_path: Path) -> None:
    asked = {
        "--backend": f"kind=openai_http,target={live.url},model=tiny",
        "--profile": "kind=concurrent,streams=4",
        "--constraint": "kind=max_requests,count=12",
        "--tokenizer": f"kind=huggingface_auto,model={tiny.path()}",
        "--data": "kind=synthetic_text,prompt_tokens=200,output_tokens=8",
        "--output": f"kind=json,path={tmp_path / 'found.json'}",
    }
    words = [word for pair in asked.items() for word in pair]
    subprocess.run(["guidellm", "run", *words, "--disable-console"], cwd=tmp_path, check=True, timeout=300)
    (found,) = json.loads((tmp_path / "found.json").read_text())["benchmarks"]
    requests = found["requests"]
    assert len(requests["successful"]) == 12 and not requests["errored"], requests["errored"][:1]
