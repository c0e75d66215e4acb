"""A tokenizer for tests of generated tasks: a token is a word with the white space before it."""

from __future__ import annotations

import re
from typing import Any


class WordTokenizer:
    """What `ahn.evaluation.tasks.generated` needs of a tokenizer."""

    def __init__(self, template: bool = False) -> None:
        self.chat_template = "<user>{message}<model>" if template else None

    def __call__(self, text: str, **kwargs: Any) -> dict[str, list[int]]:
        return {"input_ids": [hash(word) for word in re.findall(r"\s*\S+", text)]}

    def apply_chat_template(self, messages: list[dict[str, str]], **kwargs: Any) -> str:
        assert self.chat_template is not None
        assert kwargs["add_generation_prompt"] and not kwargs["tokenize"] and not kwargs["enable_thinking"]
        (message,) = messages
        return self.chat_template.format(message=message["content"])
