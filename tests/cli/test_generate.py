"""`ahn generate`: where the text comes from, where the output goes, and what is said about it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import speaking
import torch
from transformers import AutoModelForCausalLM

import ahn

TEXT = "import sys\n\n\ndef main():\n    sys.exit(run(sys.argv))\n" * 2


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> speaking.Speaking:
    return speaking.save(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def templated(tmp_path_factory: pytest.TempPathFactory) -> speaking.Speaking:
    return speaking.save(tmp_path_factory.mktemp("templated"), speaking.CHATML)


def pipe(monkeypatch: pytest.MonkeyPatch, raw: bytes) -> None:
    """Standard input with these bytes."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))


def expected(saved: speaking.Speaking, text: str, count: int = 12) -> str:
    """What transformers' generate says after a bare text."""
    model = ahn.from_pretrained(saved.adapter)
    words = speaking.AutoTokenizer.from_pretrained(saved.base)
    ids = words(text)["input_ids"]
    output = model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False)
    return words.decode(output[0, len(ids) :], skip_special_tokens=True)


def test_quantized_tokens(ahn_cli: Any, plain: speaking.Speaking) -> None:
    options = ("generate", "--base-model", plain.base, "--ahn-path", plain.adapter, "--max-new-tokens", 4)
    done = ahn_cli(*options, "--window", 6, "--sinks", 2, "--quantized", 5, "--prompt", TEXT)
    assert done.code == 0 and ", 5 before them at 4/2 bits per number, " in " ".join(done.err.split())
    published = ("--sliding-window", 6, "--num-attention-sink", 2)  # names of the published script
    told = json.loads(ahn_cli(*options, *published, "--quantized", 5, "--prompt", TEXT, "--json").out)["prompt"]
    assert (told["window"], told["sinks"]) == (6, 2)
    assert told["tokens_seen"] == told["window"] + told["sinks"] + told["tokens_quantized"] + told["tokens_in_memory"]


def test_quantized_tokens_need_no_adapter(
    ahn_cli: Any, plain: speaking.Speaking, caplog: pytest.LogCaptureFixture
) -> None:
    options = ("generate", "--model", plain.base, "--prompt", TEXT, "--max-new-tokens", 4)
    done = ahn_cli(*options, "--window", 6, "--sinks", 2, "--quantized", 5)
    assert done.code == 0 and "No adapter is named" in caplog.text
    assert ", 5 before them at 4/2 bits per number, 19 forgotten; cache " in " ".join(done.err.split())
    model = AutoModelForCausalLM.from_pretrained(plain.base)
    ahn.attach(model, ahn.AHNConfig("window_only", 6, 2, quantized=5))
    words = speaking.AutoTokenizer.from_pretrained(plain.base)
    ids = words(TEXT)["input_ids"]
    output = model.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False)
    assert done.out == words.decode(output[0, len(ids) :], skip_special_tokens=True) + "\n"
    for without in ((), ("--window", 6), ("--quantized", 0)):
        refused = ahn_cli(*options, *without)
        assert refused.code == 1 and "--quantized, which needs none" in " ".join(refused.err.split())


def test_text_from_everywhere(
    ahn_cli: Any, plain: speaking.Speaking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "text.py"
    file.write_text(TEXT)
    options = ("generate", "--base-model", plain.base, "--ahn-path", plain.adapter, "--max-new-tokens", 5)
    right = expected(plain, TEXT, 5) + "\n"
    assert ahn_cli(*options, "--prompt", TEXT).out == right
    assert ahn_cli(*options, "--file", file).out == right
    pipe(monkeypatch, TEXT.encode())
    assert ahn_cli(*options).out == right
    pipe(monkeypatch, TEXT.encode())
    assert ahn_cli(*options, "--file", "-").out == right
    both = ahn_cli(*options, "--file", file, "--prompt", "What?")
    assert both.out == expected(plain, TEXT.rstrip() + "\n\nWhat?", 5) + "\n"


def test_says_what_was_read(ahn_cli: Any, plain: speaking.Speaking) -> None:
    done = ahn_cli(
        "generate", "--model", plain.adapter, "--prompt", TEXT, "--window", 9, "--sinks", 3, "--max-new-tokens", 7
    )
    assert done.code == 0
    seen = len(speaking.tokenizer()(TEXT)["input_ids"])
    assert f"Read {seen} tokens: the first 3 and the last 9 exact, {seen - 12} in the memory" in done.err
    assert "Wrote 7 tokens" in done.err


def test_a_prompt_lookup_says_the_same(ahn_cli: Any, plain: speaking.Speaking, monkeypatch: pytest.MonkeyPatch) -> None:
    for verb in ("generate", "chat"):
        said = []
        for name in ("", "--prompt-lookup", "--prompt-lookup-num-tokens"):
            pipe(monkeypatch, TEXT.replace("\n", " ").encode() * 3)
            options = ("--temperature", 0, "--max-new-tokens", 8, "--window", 9, "--sinks", 3)
            said.append(ahn_cli(verb, "--model", plain.adapter, *options, *([name, 5] if name else [])).out)
        assert said[0] and said == [said[0]] * 3


def test_json_is_all_of_standard_output(ahn_cli: Any, plain: speaking.Speaking) -> None:
    done = ahn_cli("generate", "--model", plain.adapter, "--prompt", TEXT, "--max-new-tokens", 12, "--json")
    result = json.loads(done.out)
    assert result["text"] == expected(plain, TEXT)
    assert (result["new_tokens"], result["finished"]) == (12, False)
    assert result["prompt"]["tokens_in_memory"] == result["prompt"]["tokens_seen"] - speaking.WINDOW - speaking.SINKS


def test_chat_template(ahn_cli: Any, templated: speaking.Speaking) -> None:
    def seen(*options: str) -> int:
        done = ahn_cli(
            "generate", "--model", templated.adapter, "--prompt", "Hi", "--max-new-tokens", 1, "--json", *options
        )
        return json.loads(done.out)["prompt"]["tokens_seen"]

    def count(text: str) -> int:
        return len(speaking.tokenizer(speaking.CHATML)(text)["input_ids"])

    turn = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert seen("--no-chat-template") == count("Hi")
    assert seen() == count(turn)
    assert seen("--system", "Be kind.") == count("<|im_start|>system\nBe kind.<|im_end|>\n" + turn)
    refused = ahn_cli("generate", "--model", templated.adapter, "--prompt", "x", "--system", "y", "--no-chat-template")
    assert refused.code == 1 and "--system needs a chat template" in refused.err


def test_a_template_that_refuses_is_one_line(ahn_cli: Any, tmp_path: Path) -> None:
    broken = speaking.save(tmp_path, speaking.CHATML + "{{ raise_exception('no system\\nmessages here') }}")
    done = ahn_cli("generate", "--model", broken.adapter, "--prompt", "x", "--system", "y")
    assert done.code == 1 and done.out == ""
    assert done.err.strip() == "ahn: The chat template refuses this conversation: no system messages here"


def test_the_models_own_generation_settings_hold(ahn_cli: Any, tmp_path: Path) -> None:
    saved = speaking.save(tmp_path)
    options = ("generate", "--model", saved.adapter, "--prompt", TEXT, "--max-new-tokens", 12)
    plain = ahn_cli(*options).out
    (saved.base / "generation_config.json").write_text('{"repetition_penalty": 3.0}')
    assert ahn_cli(*options).out == expected(saved, TEXT) + "\n" != plain


def test_the_shipped_model_continues_the_bare_text(ahn_cli: Any) -> None:
    done = ahn_cli("generate", "--prompt", "def main():", "--max-new-tokens", 4, "--json")
    count = len(speaking.tokenizer()("def main():")["input_ids"])
    assert json.loads(done.out)["prompt"]["tokens_seen"] == count


def test_what_is_wrong_is_said_in_one_line(
    ahn_cli: Any, plain: speaking.Speaking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def error(*arguments: object) -> str:
        done = ahn_cli("generate", *arguments)
        assert (done.code, done.out) == (1, "")
        last = done.err.strip().splitlines()[-1]
        assert last.startswith("ahn: ")
        return last

    (tmp_path / "binary").write_bytes(b"abc\xff")
    assert "No such file" in error("--model", plain.adapter, "--file", tmp_path / "none")
    assert "not UTF-8 text (byte 3)" in error("--model", plain.adapter, "--file", tmp_path / "binary")
    assert "--adapter" in error("--model", plain.base, "--prompt", "x")
    assert "no text" in error("--model", plain.adapter, "--prompt", "")
    assert "temperature" in error("--model", plain.adapter, "--prompt", "x", "--top-p", "2")

    class Keyboard(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Keyboard())
    assert ahn_cli("generate", "--model", plain.adapter).code == 2


@pytest.mark.slow
def test_as_a_program_in_a_pipe(plain: speaking.Speaking) -> None:
    command = [
        sys.executable,
        "-c",
        "from ahn.cli import main; main()",
        "generate",
        "--model",
        plain.adapter,
        "--max-new-tokens",
        "12",
    ]
    done = subprocess.run([str(part) for part in command], input=TEXT.encode(), capture_output=True, check=True)
    assert done.stdout.decode() == expected(plain, TEXT) + "\n"
    first, _ = done.stderr.decode().splitlines()  # no traces of progress bars
    assert first.startswith("Read ")
