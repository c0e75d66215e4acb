"""What the HTTP side is told once, when it starts: who may ask, and how much."""

import dataclasses
import hashlib
import hmac
import re

MIB = 1 << 20
NAME = r"[A-Za-z0-9_.:-]{1,128}"
"""What a session may be called; `\\A` and `\\Z` are put around it."""
RESPONSE = "resp_"
"""With this the names of responses begin, and of nothing else."""


@dataclasses.dataclass(frozen=True)
class ServerSettings:
    """Bounds and keys of a server.

    Attributes:
        model: the name by which clients ask for the model.
        keys: who may ask; with none, anyone who reaches the port.
        local: whether requests must name this machine as their host. A page in a browser can be led to a port of the
            same machine under a name of its own; without keys nothing else would stop it.
        body: bytes of a request.
        state: bytes of an uploaded conversation.
        prompt: tokens of a conversation.
        new_tokens: tokens of a reply.
        queue: turns that wait for others of their sessions.
        choices: replies that one request asks for, over all its prompts.
        seconds: for one request, from when it is read to its last token.
        stalled: seconds that a client may take for nothing, in sending a request or in taking a reply.
    """

    model: str = "tiny"
    keys: tuple[str, ...] = ()
    local: bool = True
    body: int = 32 * MIB
    state: int = 4096 * MIB
    prompt: int = 1 << 20
    new_tokens: int = 16384
    queue: int = 256
    choices: int = 128
    seconds: float = 3600.0
    stalled: float = 60.0

    def owner(self, given: str) -> str | None:
        """The digest under which the conversations of a key are kept; None for a key that is not known."""
        if not self.keys:
            return ""
        right = [hmac.compare_digest(_digest(key), _digest(given)) for key in self.keys]  # all, whichever is right
        return _digest(given)[:32] if any(right) else None


def is_session(name: str) -> bool:
    return bool(re.fullmatch(NAME, name)) and not name.startswith(RESPONSE)


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
