"""No verb runs code that lies in a model's folder, whatever standard input says."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ahn import tiny

CODE = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nPath({ran!r}).touch()\n"
REFUSAL = r"^ahn: .*(model_type 'own', unknown to this transformers|contains custom code|model type `own`)"
VERBS = {
    "generate": ["generate", "--model", "MODEL", "--adapter", "ADAPTER", "--prompt", "x", "--max-new-tokens", "1"],
    "chat": ["chat", "--model", "MODEL", "--adapter", "ADAPTER", "--max-new-tokens", "1"],
    "info": ["info", "MODEL"],
    "eval": ["eval", "needle/fact", "--method", "full", "--model", "MODEL", "--limit", "1", "--out", "OUT"],
    "perplexity": ["eval", "perplexity", "--text", "TEXT", "--method", "full", "--model", "MODEL", "--out", "OUT"],
    "inspect": ["inspect", "--model", "MODEL", "--adapter", "ADAPTER", "--text", "TEXT"],
    "bench": ["bench", "decode", "--model", "MODEL", "--out", "OUT"],
    "train": ["train", "--model_name_or_path", "MODEL", "--dataset", "TEXT", "--output_dir", "OUT"],
    "merge": ["merge", "--model", "MODEL", "--adapter", "ADAPTER", "--output-path", "OUT"],
}


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A model of an architecture that only its own code knows, for configuration, model and tokenizer."""
    model = Path(shutil.copytree(tiny.path(), tmp_path / "model"))
    code = CODE.format(ran=str(tmp_path / "ran"))
    (model / "own.py").write_text(code + "class Own:\n    pass\n")
    auto = {name: "own.Own" for name in ("AutoConfig", "AutoModel", "AutoModelForCausalLM")}
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": auto}))
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "text.txt").write_text("some text\n" * 300)
    return model


@pytest.fixture
def run(ahn_cli: Any, hostile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A verb, asked with "y" on standard input for whatever it asks: no code of the model has run afterwards."""
    paths = {"MODEL": hostile, "OUT": tmp_path / "out", "TEXT": tmp_path / "text.txt"}
    paths["ADAPTER"] = tiny.adapter_path("gated_deltanet")

    def run(verb: str, *more: str) -> Any:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"y\n" * 9)))
        done = ahn_cli(*(paths.get(word, word) for word in VERBS[verb]), *more)
        assert not (tmp_path / "ran").exists() and not (hostile / "ran").exists()
        assert "Traceback" not in done.err, done.err
        return done

    return run


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_runs_code_beside_a_model_that_needs_none(verb: str, hostile: Path, run: Callable[..., Any]) -> None:
    """The same folder, of an architecture that transformers has: it works without its code, or says one sentence."""
    for file, name in (("config.json", "model_type"), ("tokenizer_config.json", "tokenizer_class")):
        settings = json.loads((hostile / file).read_text())
        settings[name] = json.loads((tiny.path() / file).read_text())[name]
        (hostile / file).write_text(json.dumps(settings))
    more = {"train": ["--max_steps", "1"], "bench": ["--context", "300"]}.get(verb, [])
    assert run(verb, *more).code in (0, 1)


@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_runs_code_of_a_model(verb: str, run: Callable[..., Any]) -> None:
    done = run(verb)
    assert done.code == 1 and re.search(REFUSAL, done.err, flags=re.M), done.err
