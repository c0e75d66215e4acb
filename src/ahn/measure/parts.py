"""Messages in a model's chat template, in the form that it shows.

Some show a message in parts alone, as those of models that see images (Idefics3, SmolVLM).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ahn.errors import AHNError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = "\ue000"
_known: dict[str, bool] = {}


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], ask: bool, **options: Any) -> str:
    """Messages in the model's chat template, up to where the next reply begins if `ask`."""
    shown = as_shown(tokenizer, messages)
    try:
        text: str = tokenizer.apply_chat_template(shown, tokenize=False, add_generation_prompt=ask, **options)
    except Exception as error:  # jinja2's errors, and what templates raise by themselves
        raise AHNError(f"The chat template refuses this conversation: {error}") from error
    return text


def as_shown(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages in the form that the tokenizer's template shows.

    Such a template goes through a string as if its characters were parts, and leaves it out without a word.
    """
    if not wants_parts(tokenizer):
        return list(messages)
    return [m | {"content": _parts(m["content"])} if isinstance(m.get("content"), str) else m for m in messages]


def wants_parts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template shows a text as `{"type": "text", "text": …}` and not as a string."""
    template = str(tokenizer.chat_template)
    if template not in _known:
        _known[template] = not _is_shown(tokenizer, _MARK) and _is_shown(tokenizer, _parts(_MARK))
    return _known[template]


def _parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _is_shown(tokenizer: PreTrainedTokenizerBase, content: Any) -> bool:
    try:
        return _MARK in str(tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False))
    except Exception:  # what templates raise
        return False
