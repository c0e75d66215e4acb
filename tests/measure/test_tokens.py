"""Token ids of texts: long ones let Ctrl-C through, and each is as the tokenizer makes it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import speaking

from ahn.demo import make_documents
from ahn.evaluation import documents
from ahn.evaluation.prompt import shorten
from ahn.evaluation.task import Truncation
from ahn.measure.tokens import LONG, around, token_ids


class Deaf:
    """A tokenizer that lets no signal through until it is done, as those of long texts."""

    bos_token = chat_template = None

    def __init__(self) -> None:
        self.over = threading.Event()

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        while len(text) >= LONG and not self.over.is_set():
            with contextlib.suppress(KeyboardInterrupt):
                self.over.wait(0.01)
        return {"input_ids": [0]}

    def __len__(self) -> int:
        return 1

    def encode(self, text: str, **options: Any) -> list[int]:
        return [0, 0]


READERS: dict[str, Callable[[Deaf, Path], Any]] = {
    "perplexity": lambda deaf, file: documents.tokenised(deaf, documents.read(file)),
    "demo": lambda deaf, file: make_documents(deaf, [("a", file.read_text())], 1, 20, 5),
    "prompt": lambda deaf, file: shorten(file.read_text(), Truncation("halves", 10), 1, deaf),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("reader", READERS)
def test_ctrl_c_gets_through(reader: str, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("x" * LONG)
    deaf = Deaf()
    # A shell that puts its command into the background has it ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(10, deaf.over.set).start()
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    start = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            READERS[reader](deaf, tmp_path / "long.txt")
    finally:
        signal.signal(signal.SIGINT, before)
        deaf.over.set()
    assert time.monotonic() - start < 5


def test_a_long_text_has_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    words, text = speaking.tokenizer(), "import os\nprint(os.name)\n"
    short = token_ids(words, text)
    monkeypatch.setattr("ahn.measure.tokens.LONG", 3)
    assert token_ids(words, text) == short == words(text)["input_ids"]
    assert around(words) == ([], [])
