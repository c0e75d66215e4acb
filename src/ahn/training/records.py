"""One raw row to a conversation or a text, in the layouts of LLaMA-Factory, TRL and OpenAI."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any, TypeAlias

from ahn.training.messages import BYTES, FORM, WHERE, BadRowError, Message, from_json, message, text_of, tools_of

PROMPTS = ("prompt", "instruction", "question", "query", "input")
RESPONSES = ("response", "output", "answer", "completion", "chosen")
MEDIA = ("images", "image", "videos", "video", "audios", "audio")


KNOWN = {
    *("role", "from", "content", "value", "weight", "name", "tool_calls", "tool_call_id", "function_call", "refusal"),
    *("reasoning_content", "reasoning", "thinking"),
}
"""What is read of a message."""


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages as chat templates take them, and which of them are learned.

    Args:
        messages: each with `role` (system, user, assistant or tool), `content`, and what else a template may read:
            `tool_calls`, `tool_call_id`, `name`, and thoughts under the three names that templates know them by.
        learned: per message; only an assistant's can be.
        options: further variables of the template, such as `enable_thinking`.
    """

    messages: list[Message]
    learned: list[bool]
    tools: list[Any] | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Record:
    """What a row says, and the names of what it holds besides, which training does not use."""

    content: Conversation | str
    unused: tuple[str, ...] = ()


def decode(row: dict[str, Any]) -> Any:
    """The content of a row: what a JSON line says, a text file's text, or the columns themselves."""
    if BYTES not in row:
        return _without_nulls({name: value for name, value in row.items() if name != WHERE})
    try:
        text = row[BYTES].decode("utf-8-sig")
        return json.loads(text) if row[FORM] == "json" else {"text": text}
    except UnicodeDecodeError as error:
        wide = row[BYTES][:2] in (b"\xff\xfe", b"\xfe\xff")
        hint = ", it looks like UTF-16: convert the file to UTF-8" if wide else ""
        raise BadRowError(f"not UTF-8 at byte {error.start}{hint}") from None
    except (ValueError, RecursionError) as error:
        raise BadRowError(f"not JSON: {error}") from None


def _without_nulls(value: Any) -> Any:
    """Tables fill keys that other rows have with nulls."""
    if isinstance(value, dict):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


Used: TypeAlias = set[str]


def normalise(row: Any) -> Record:
    """A conversation from messages or from a prompt and a response; else the plain `text`."""
    if isinstance(row, str | list):
        row = {"text" if isinstance(row, str) else "messages": row}
    if not isinstance(row, dict):
        raise BadRowError(f"{row!s:.40} instead of an object")
    row = {name: value for name, value in row.items() if value is not None}
    for name in {"messages", "conversations"} & row.keys():
        if isinstance(row[name], str):  # the cell of a table
            row[name] = from_json(row[name], name)
    used: Used = set()
    content = _content(row, used)
    _check_encoding(content)
    inner = sorted({name for part in _messages_in(row, used) for name in part if name not in KNOWN})
    outer = [name for name, value in row.items() if name not in used and value not in ("", [], {})]
    return Record(content, (*outer, *(f"{name} of messages" for name in inner)))


def _content(row: dict[str, Any], used: Used) -> Conversation | str:
    for name in ("messages", "conversations"):
        if name in row:
            return _chat(row, name, used)
    prompt, response = _first(row, PROMPTS), _first(row, RESPONSES)
    if response == "chosen" and isinstance(row["chosen"], list) and not isinstance(row.get("prompt"), list):
        # TRL's preferences with the prompt inside; beside it, the prompt's text only says the same again.
        used.add("prompt")
        return _chat(row, "chosen", used)
    if prompt and response:
        return _pair(row, prompt, response, used)
    if "text" in row:
        used.add("text")
        return text_of(row["text"], "text")
    raise BadRowError(
        f"none of messages, conversations, prompt and response, or text (it has {', '.join(row) or 'nothing'})"
    )


def _first(row: dict[str, Any], names: tuple[str, ...]) -> str | None:
    """The first name that the row has a value for; one without, if there is no better."""
    present = [name for name in names if name in row]
    return next((name for name in present if row[name] not in ("", [])), present[0] if present else None)


def _chat(row: dict[str, Any], name: str, used: Used) -> Conversation:
    used.add(name)
    return _conversation(row, _messages(row[name], name), used)


def _pair(row: dict[str, Any], prompt: str, response: str, used: Used) -> Conversation:
    used |= {prompt, response}
    if row.get("label") is False or row.get("kto_tag") is False:
        raise BadRowError("its label says that the response is not wanted")
    used |= {"label", "kto_tag"}
    if isinstance(row[prompt], list):
        before = [(one, False) for one, _ in _messages(row[prompt], prompt)]
    else:
        question = {"role": "user", "content": _question(row, prompt, used)}
        before = [*_history(row, used), (question, False)]
    if isinstance(row[response], list):
        after = _messages(row[response], response)
    else:
        after = [({"role": "assistant", "content": text_of(row[response], response)}, True)]
    return _conversation(row, [*before, *after], used)


def _question(row: dict[str, Any], prompt: str, used: Used) -> str:
    """The prompt with its material: Alpaca's `input` and Dolly's `context` after it, a document before a question."""
    text = row[prompt]
    if prompt == "instruction":
        names = [name for name in ("input", "context") if row.get(name)]
        used |= {*names, "input"}
        return "\n".join([text_of(text, prompt), *(text_of(row[name], name) for name in names)])
    document = next((name for name in ("context", "document") if row.get(name)), None)
    used |= {"instruction"}  # empty, else it would be the prompt
    if document is None:
        return text_of(text, prompt)
    used.add(document)
    return f"{text_of(row[document], document)}\n\n{text_of(text, prompt)}"


def _history(row: dict[str, Any], used: Used) -> list[tuple[Message, bool]]:
    """LLaMA-Factory's earlier turns: pairs of a prompt and a response, or messages."""
    history = row.get("history")
    if not history:
        return []
    used.add("history")
    if not isinstance(history, list):
        raise BadRowError("history is not a list")
    if isinstance(history[0], dict):
        return _messages(history, "history")
    found: list[tuple[Message, bool]] = []
    for turn in history:
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            raise BadRowError("history is not a list of pairs")
        found.append(({"role": "user", "content": text_of(turn[0], "history")}, False))
        found.append(({"role": "assistant", "content": text_of(turn[1], "history")}, True))
    return found


def _messages(value: Any, name: str) -> list[tuple[Message, bool]]:
    if not isinstance(value, list) or not value:
        raise BadRowError(f"{name} is not a list of messages")
    return [message(part) for part in value]


def _conversation(row: dict[str, Any], turns: list[tuple[Message, bool]], used: Used) -> Conversation:
    media = next((name for name in MEDIA if row.get(name)), None)
    if media:
        raise BadRowError(f"holds {media}; only text can be trained on")
    if row.get("system") and turns[0][0]["role"] != "system":
        used.add("system")
        turns = [({"role": "system", "content": text_of(row["system"], "system")}, False), *turns]
    if not any(learn for _, learn in turns):
        raise BadRowError("no assistant's turn to learn from")
    named = next((name for name in ("tools", "functions") if row.get(name)), None)
    options = row.get("chat_template_kwargs") or {}
    if not isinstance(options, dict):
        raise BadRowError("chat_template_kwargs is not an object")
    used |= {"chat_template_kwargs", *((named,) if named else ())}
    messages, learned = [one for one, _ in turns], [learn for _, learn in turns]
    return Conversation(messages, learned, tools_of(row[named], named) if named else None, options)


def _messages_in(row: dict[str, Any], used: Used) -> Iterator[dict[str, Any]]:
    for name in used & row.keys():
        if isinstance(row[name], list):
            yield from (part for part in row[name] if isinstance(part, dict) and ("role" in part or "from" in part))


def _check_encoding(content: Conversation | str) -> None:
    """Half of a character that JSON wrote in two has no UTF-8, and no token."""
    try:
        whole = content if isinstance(content, str) else json.dumps(dataclasses.asdict(content), ensure_ascii=False)
        whole.encode()
    except UnicodeEncodeError as error:
        raise BadRowError(f"holds half of a surrogate pair, {error.object[error.start]!a}") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRowError(f"holds something that is no JSON: {error}") from None
