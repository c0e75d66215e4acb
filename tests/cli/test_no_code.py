"""No verb runs code that lies in a model's folder, whatever standard input says."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

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


def place(words: list[str], model: Path, folder: Path) -> list[str]:
    """A verb's words, with paths for the names in capitals."""
    paths = {"MODEL": model, "OUT": folder / "out", "TEXT": folder / "text.txt"}
    paths["ADAPTER"] = tiny.adapter_path("gated_deltanet")
    return [str(paths.get(word, word)) for word in words]


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


@pytest.mark.slow  # a process for each verb
@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_runs_code_beside_a_model_that_needs_none(verb: str, hostile: Path, tmp_path: Path) -> None:
    """The same folder, of an architecture that transformers has: it works without its code, or says one sentence."""
    for file, name in (("config.json", "model_type"), ("tokenizer_config.json", "tokenizer_class")):
        settings = json.loads((hostile / file).read_text())
        settings[name] = json.loads((tiny.path() / file).read_text())[name]
        (hostile / file).write_text(json.dumps(settings))
    more = {"train": ["--max_steps", "1"], "bench": ["--context", "300"]}.get(verb, [])
    words = place(VERBS[verb], hostile, tmp_path) + more
    command = [sys.executable, "-c", "from ahn.cli import main; main()", *words]
    done = subprocess.run(command, input="y\n" * 9, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert not (tmp_path / "ran").exists() and not (hostile / "ran").exists()
    assert "Traceback" not in done.stderr and done.returncode in (0, 1), done.stderr


@pytest.mark.sample(1)
@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_runs_code_of_a_model(verb: str, hostile: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from ahn.cli import main; main()", *place(VERBS[verb], hostile, tmp_path)]
    done = subprocess.run(command, input="y\n" * 9, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert not (tmp_path / "ran").exists() and not (hostile / "ran").exists()
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert re.search(REFUSAL, done.stderr, flags=re.M), done.stderr
