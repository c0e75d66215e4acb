"""The examples run as they are, with small settings, and do what they say."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import ahn

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_every_example_is_tried_and_listed() -> None:
    names = {path.name for path in EXAMPLES.glob("*.py")}
    assert names == {"attach_and_generate.py", "read_and_save.py", "distil.py"}
    assert all(f"examples/{name}" in (EXAMPLES / "README.md").read_text() for name in names)


def test_attach_and_generate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "attach_and_generate.py", "--prompt-tokens", 400, "--new-tokens", 4)
    printed = capsys.readouterr().out
    assert "the output is the base model's: True" in printed
    assert "after 400 tokens it goes on" in printed


@pytest.mark.slow
def test_read_and_save(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run(monkeypatch, "read_and_save.py", "--length", 2048, "--file", tmp_path / "book.safetensors")
    printed = capsys.readouterr().out
    assert "2048 tokens read" in printed
    assert "'\\n# recall: farm' -> ' daisy" in printed


@pytest.mark.slow
def test_distil(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ("--steps", 2, "--length", 96, "--batch", 1, "--out", tmp_path / "memory")
    run(monkeypatch, "distil.py", *arguments)
    assert capsys.readouterr().out.count("KL") == 2
    model = AutoModelForCausalLM.from_pretrained(ahn.tiny.path())
    loaded = ahn.load_adapter(model, tmp_path / "memory")
    written = [p for name, p in ahn.adapter_parameters(loaded).items() if name.endswith("o_proj.weight")]
    assert all(p.abs().max() > 0 for p in written)  # untrained, o_proj is zero
