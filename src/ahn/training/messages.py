"""One message of a conversation, from any of the layouts, to what chat templates of transformers take."""

import json
from typing import Any, TypeAlias

Message: TypeAlias = dict[str, Any]

BYTES, FORM, WHERE = "ahn:bytes", "ahn:form", "ahn:where"
"""Our own columns of a raw row: its bytes and their form ("json" or "text") where it was not decoded yet, and where it
stands. No table has columns of these names."""

ROLES = {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool", "developer": "system"}
ROLES |= {"human": "user", "gpt": "assistant", "model": "assistant", "observation": "tool", "function": "tool"}
ROLES |= {"function_call": "assistant"}
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Names by which templates know an assistant's thoughts: Qwen3 the first, gpt-oss the last."""
TEXT_PARTS = ("text", "input_text", "output_text")


class BadRowError(Exception):
    """A row that cannot be used; the message says why."""


def printable(text: str, limit: int = 300) -> str:
    """Text for one line of a log and a column of UTF-8: what is no visible character is escaped, the rest cut off."""
    shown = text if len(text) <= limit else f"{text[:limit]}…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


def text_of(value: Any, name: str, may_be_empty: bool = False) -> str:
    """The value if it is text."""
    if not isinstance(value, str):
        raise BadRowError(f"{name} is not text")
    if not (value.strip() or may_be_empty):
        raise BadRowError(f"{name} is empty")
    if "\0" in value:
        raise BadRowError(f"{name} holds a NUL character")
    return value


def message(raw: Any) -> tuple[Message, bool]:
    """One message, and whether it is learned: an assistant's, unless its `weight` is 0."""
    if not isinstance(raw, dict):
        raise BadRowError("a message is not an object")
    name = raw.get("role", raw.get("from"))
    role = ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise BadRowError(f"unknown role {name!r}")
    calls = _calls(raw, name)
    content, thoughts = _said(raw, role, may_be_empty=role != "assistant" or bool(calls))
    found: Message = {"role": role, "content": "" if name == "function_call" else content}
    found |= {key: raw[key] for key in ("name", "tool_call_id") if isinstance(raw.get(key), str)}
    if calls:
        found["tool_calls"] = calls
    if thoughts and role == "assistant":
        found |= dict.fromkeys(THOUGHTS, thoughts)
    return found, role == "assistant" and _weight(raw)


def _weight(raw: dict[str, Any]) -> bool:
    weight = raw.get("weight")
    if weight not in (None, 0, 1):
        raise BadRowError(f"weight {weight!r}: a reply is learned (1) or not (0)")
    return weight != 0


def _said(raw: dict[str, Any], role: str, may_be_empty: bool) -> tuple[str, str]:
    """What the message says, and the thoughts before it."""
    content = raw.get("content", raw.get("value"))
    content = raw.get("refusal") if content is None else content
    thoughts = next((text_of(raw[name], name) for name in THOUGHTS if raw.get(name)), "")
    if isinstance(content, list):  # parts, as some APIs write them
        parts = [_part(part) for part in content]
        content = "".join(text for kind, text in parts if kind == "text")
        thoughts = thoughts or "".join(text for kind, text in parts if kind == "thinking")
    elif isinstance(content, dict) and role == "tool":
        content = json.dumps(content, ensure_ascii=False)
    elif content is None and may_be_empty:
        content = ""
    return text_of(content, "content", may_be_empty), thoughts


def _part(part: Any) -> tuple[str, str]:
    if isinstance(part, str):
        return "text", part
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in TEXT_PARTS:
        return "text", text_of(part.get("text"), "a part's text", may_be_empty=True)
    if kind == "thinking":
        return "thinking", text_of(part.get("thinking"), "a part's thinking", may_be_empty=True)
    raise BadRowError(f"holds something other than text ({kind}); only text can be trained on")


def _calls(raw: dict[str, Any], name: Any) -> list[Message]:
    """Calls of functions: OpenAI's today, its older single one, or LLaMA-Factory's, whose value is JSON."""
    calls = raw.get("tool_calls") or []
    if raw.get("function_call"):
        calls = [raw["function_call"]]
    if name == "function_call":
        value = from_json(raw.get("value", raw.get("content")), "function_call")
        calls = value if isinstance(value, list) else [value]
    if not isinstance(calls, list):
        raise BadRowError("tool_calls is not a list")
    return [_call(call) for call in calls]


def _call(call: Any) -> Message:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRowError("a call of a function has no name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = from_json(arguments or "{}", "the arguments of a call")
    found = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return found | ({"id": call["id"]} if isinstance(call.get("id"), str) else {})


def tools_of(value: Any, name: str) -> list[Any]:
    """Functions that may be called as transformers wants them: `{"type": "function", "function": …}` each."""
    tools = from_json(value, name) if isinstance(value, str) else value
    if not isinstance(tools, list) or any(not isinstance(tool, dict) for tool in tools):
        raise BadRowError(f"{name} is not a list of functions")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def from_json(value: Any, name: str) -> Any:
    """What a text says that is to be JSON."""
    try:
        return json.loads(value)
    except (ValueError, TypeError, RecursionError):
        raise BadRowError(f"{name} is not JSON") from None
