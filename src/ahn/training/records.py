"""One raw row to a conversation or a text, whatever form it has."""

from __future__ import annotations

import json
from typing import Any, TypeAlias

Conversation: TypeAlias = list[dict[str, str]]
"""Messages with `role` and `content`."""

ROLES = {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
ROLES |= {"human": "user", "gpt": "assistant", "model": "assistant", "observation": "tool", "function": "tool"}
PROMPTS, RESPONSES = ("prompt", "instruction", "question"), ("response", "output", "answer", "completion")


class BadRowError(Exception):
    """A row that cannot be used; the message says why."""


def decode(row: dict[str, Any]) -> Any:
    """The content of a row: what a JSON line says, a text file's text, or the columns themselves.

    Raises:
        BadRowError: the bytes are not UTF-8, or not JSON.
    """
    if set(row) != {"bytes", "form", "where"}:
        return row
    try:
        text = row["bytes"].decode("utf-8")
        return json.loads(text) if row["form"] == "json" else {"text": text}
    except UnicodeDecodeError as error:
        raise BadRowError(f"not UTF-8 at byte {error.start}") from None
    except ValueError as error:
        raise BadRowError(f"not JSON: {error}") from None


def normalise(row: Any) -> Conversation | str:
    """A conversation from `messages`, `conversations` or a prompt and a response; else the plain `text`.

    Raises:
        BadRowError: none of these, an unknown role, a content that is not text, or no assistant's turn to learn from.
    """
    if isinstance(row, str):
        row = {"text": row}
    if not isinstance(row, dict):
        raise BadRowError(f"a {type(row).__name__} instead of an object")
    for name in ("messages", "conversations"):
        if row.get(name) is not None:
            return _conversation(row[name], name)
    prompt, response = (next((n for n in names if row.get(n) is not None), None) for names in (PROMPTS, RESPONSES))
    if prompt and response:
        return _pair(row, prompt, response)
    if row.get("text") is not None:
        return _text(row["text"], "text")
    raise BadRowError(
        f"none of messages, conversations, prompt and response, or text (it has {', '.join(row) or 'nothing'})"
    )


def _conversation(messages: Any, name: str) -> Conversation:
    if not isinstance(messages, list) or not messages:
        raise BadRowError(f"{name} is not a list of messages")
    found = [_message(message) for message in messages]
    if not any(message["role"] == "assistant" for message in found):
        raise BadRowError("no assistant's turn to learn from")
    return found


def _message(message: Any) -> dict[str, str]:
    if not isinstance(message, dict):
        raise BadRowError("a message is not an object")
    role = message.get("role", message.get("from"))
    if role not in ROLES:
        raise BadRowError(f"unknown role {role!r}")
    content = message.get("content", message.get("value"))
    if isinstance(content, list):  # parts, as some APIs write them
        if any(not isinstance(part, dict) or part.get("type") != "text" for part in content):
            raise BadRowError("a message holds something other than text")
        content = "".join(str(part.get("text", "")) for part in content)
    return {"role": ROLES[role], "content": _text(content, "content", may_be_empty=ROLES[role] != "assistant")}


def _pair(row: dict[str, Any], prompt: str, response: str) -> Conversation:
    question = _text(row[prompt], prompt)
    if prompt == "instruction" and row.get("input"):  # Alpaca's form
        question += "\n" + _text(row["input"], "input")
    answer = {"role": "assistant", "content": _text(row[response], response)}
    system = row.get("system")
    first = [{"role": "system", "content": _text(system, "system")}] if system else []
    return [*first, {"role": "user", "content": question}, answer]


def _text(value: Any, name: str, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise BadRowError(f"{name} is not text")
    if not (value.strip() or may_be_empty):
        raise BadRowError(f"{name} is empty")
    return value
