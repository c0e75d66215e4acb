"""The corpus: what is held out stays out, and what is left is used once, in a fixed order."""

from __future__ import annotations

from pathlib import Path

import pytest

from ahn.errors import AHNError
from ahn.tiny.corpus import HELD_OUT, held_out_text, train_documents


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A standard library of a few files."""
    long = "".join(f"a_long_line_that_is_easily_recognised_{n} = compute({n})\n" for n in range(20))
    files = {
        "argparse.py": long,
        "string.py": "letters = 'abc'\n",
        "copy_of_argparse.py": "import sys\n" + long,
        "json/decoder.py": "class Decoder: pass\n",
        "json/__init__.py": "from json.decoder import Decoder\n",
        "json/again.py": "letters = 'abc'\n",
        "test/test_argparse.py": "assert True\n",
        "test/test_inspect/test_inspect.py": "assert 1\n",
        "test/test_json.py": "assert 2\n",
        "encodings/cp437.py": "table = {}\n",
        "site-packages/other.py": "import os\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "latin.py").write_bytes("# caf\xe9\n".encode("latin-1"))
    return tmp_path


def test_train_split_leaves_out_what_it_must(root: Path) -> None:
    documents = dict(train_documents(root))
    # json/again.py is a copy of string.py, which comes later in the order, so it is the first of the two that stays.
    assert list(documents) == ["json", "test/test_json.py"]
    assert documents["json"] == "from json.decoder import Decoder\n\nletters = 'abc'\n\nclass Decoder: pass\n"


def test_held_out_text(root: Path) -> None:
    assert [name for name, _ in held_out_text(root)] == ["argparse"]


def test_no_sources(tmp_path: Path) -> None:
    with pytest.raises(AHNError, match="no standard library sources"):
        held_out_text(tmp_path)
    with pytest.raises(AHNError, match="no standard library sources"):
        train_documents(tmp_path)


def test_this_python() -> None:
    """Every held-out module is there, and long enough for 16 times a window of 256 tokens many times over."""
    texts = held_out_text()
    assert [name for name, _ in texts] == list(HELD_OUT)
    assert sum(len(text) for _, text in texts) > 500_000
    # About 3.5 characters a token: 12 000 tokens at least.
    assert min(len(text) for _, text in texts) > 35_000


@pytest.mark.slow
def test_no_held_out_module_is_trained_on() -> None:
    documents = train_documents()
    everything = "\n".join(text for _, text in documents)
    assert not {f"{name}.py" for name in HELD_OUT} & {name for name, _ in documents}
    for name, text in held_out_text():
        middle = len(text) // 2
        assert text[middle : middle + 500] not in everything, name
