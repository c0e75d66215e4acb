"""Which conversation a request belongs to, so that it comes to the replica that holds its state."""

import hashlib
import json
import re
import secrets
from typing import Any
from urllib.parse import unquote

from ahn.serve.api.settings import RESPONSE
from ahn.serve.api.wire import parsed

BY_NAME = re.compile(r"/(?:conversations|v1/responses)/([^/]+)")


def routing_key(path: str, body: bytes) -> str:
    """16 hexadecimal digits that stay the same over a conversation; drawn where a request goes on from nothing.

    In this order: the session or response that the path or the body names, what it names as the key of its prompts,
    the user, the messages up to the first one of the user. A response's id begins with the key of its conversation, so
    that the next turn has the same one.
    """
    if named := BY_NAME.match(path):
        return key_of(unquote(named[1]))
    fields = _fields(body)
    for name in ("session_id", "previous_response_id", "prompt_cache_key", "user"):
        if isinstance(fields.get(name), str):
            return key_of(fields[name])
    opening = _opening(fields.get("messages"))
    return key_of(json.dumps(opening)) if opening else secrets.token_hex(8)


def key_of(name: str) -> str:
    if own := re.match(f"{RESPONSE}([0-9a-f]{{16}})", name):
        return own[1]
    return hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:16]


def _fields(body: bytes) -> dict[str, Any]:
    """Of a request; the replica says what is wrong with it."""
    try:
        fields = parsed(body)
    except (ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _opening(messages: Any) -> list[Any]:
    """Every later turn of a client that sends the whole conversation begins with these."""
    if not isinstance(messages, list):
        return []
    users = (n for n, message in enumerate(messages) if isinstance(message, dict) and message.get("role") == "user")
    return messages[: next(users, -1) + 1]
