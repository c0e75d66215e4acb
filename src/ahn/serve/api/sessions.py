"""What a request adds to a conversation that the server knows."""

import asyncio
import dataclasses
from typing import Any

from ahn.cache.conversation import Message
from ahn.serve.api.fields import ResponsesFields
from ahn.serve.api.messages import MessageStore
from ahn.serve.api.problems import APIProblem


@dataclasses.dataclass(frozen=True)
class Turn:
    """A turn that is about to be answered.

    Attributes:
        owner: whose it is.
        messages: the whole conversation, up to where the reply begins.
        new: those of them that were not known before.
        parent: the turn that this one goes on from.
        session: whose next turn it is.
    """

    owner: str
    messages: list[Message]
    new: list[Message]
    parent: str | None = None
    session: str | None = None

    async def keep(self, store: MessageStore, reply: str, turn: str, shown: dict[str, Any] | None = None) -> None:
        """Write it down with its reply, before the client is told that it is finished; raises as `MessageStore.add`."""
        said = [*self.new, {"role": "assistant", "content": reply}]
        await asyncio.to_thread(store.add, self.owner, turn, said, self.parent, shown, self.session)


async def session_turn(store: MessageStore, owner: str, session: str | None, given: list[Message]) -> Turn:
    """The turn that a chat request asks for.

    In a session a request may hold the new messages alone. It may as well hold the whole conversation, as clients do
    that know of no sessions: then it begins with what is known, or it has replies in it, and takes its place.
    """
    head = None if session is None else await asyncio.to_thread(store.head, owner, session)
    known = None if head is None else await asyncio.to_thread(store.messages, owner, head)
    if known is None:
        return Turn(owner, given, given, None, session)
    if given[: len(known)] == known and len(given) > len(known):
        return Turn(owner, given, given[len(known) :], head, session)
    if any(message["role"] == "assistant" for message in given):
        return Turn(owner, given, given, None, session)
    if given[0]["role"] == "system" and given[0] == known[0] and len(given) > 1:
        given = given[1:]  # some clients send it each time
    return Turn(owner, known + given, given, head, session)


async def response_turn(store: MessageStore, owner: str, fields: ResponsesFields) -> Turn:
    """The turn that a request of the Responses API asks for; instructions hold for this turn alone, as there."""
    said, previous = fields.input, fields.previous_response_id
    given = [{"role": "user", "content": said}] if isinstance(said, str) else [each.message() for each in said]
    known: list[Message] | None = []
    if previous is not None:
        known = await asyncio.to_thread(store.messages, owner, previous)
        if known is None:
            raise unknown_response(previous, "previous_response_id", "previous_response_not_found")
    before = [] if fields.instructions is None else [{"role": "system", "content": fields.instructions}]
    return Turn(owner, [*before, *(known or []), *given], given, previous)


def unknown_response(name: str, field: str, code: str) -> APIProblem:
    """A client learns the name of a response when it begins, and it can be asked for once it has ended."""
    said = f"There is no response {ascii(name)[:150]}; one that is being written is there when it has ended."
    return APIProblem(404, said, field, code)
