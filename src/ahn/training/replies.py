"""A conversation in the model's chat template, and where in it stands what the assistant has to say.

Templates differ in what they put around a reply and in what they do with it: they trim it, move its thoughts, drop the
thoughts of earlier turns, and end a turn by a token of some name. So nothing is assumed about them. A reply is found by
rendering the conversation once more with a stand-in in its place: where the two texts part and meet again, it lies. It
begins where the template's generation prompt ends, since the model must say all that follows itself, and it takes in
the token that the template puts after it.
"""

import contextlib
import dataclasses
import json
import re
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from ahn.errors import AHNError
from ahn.measure.parts import as_shown
from ahn.training.messages import THOUGHTS, BadRowError, Message
from ahn.training.records import Conversation

OPENINGS = tuple(map(chr, range(0xE000, 0xE020)))
"""Characters for private use; a stand-in begins and ends with one that the conversation does not hold."""
OWN_OPTIONS = {"conversation", "messages", "chat_template", "add_generation_prompt", "continue_final_message", "tools"}
OWN_OPTIONS |= {"tokenize", "return_dict", "return_tensors", "padding", "truncation", "max_length", "documents"}
OWN_OPTIONS |= {"tokenizer_kwargs", "return_assistant_tokens_mask"}

Span = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A conversation's text, the learned replies in it as (first, last) characters, and what is not shown."""

    text: str
    spans: list[Span]
    unused: tuple[str, ...] = ()


class Frame(NamedTuple):
    """What a template puts around replies."""

    opening: str
    """Before one, to ask for it: the generation prompt."""
    header: str
    """How the opening begins where the reply is there already."""
    closing: str
    """After one, to end it."""


class Renderer:
    """Puts conversations into a tokenizer's chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        added = sorted((str(token) for token in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
        self._added = re.compile(rf" *(?:{'|'.join(map(re.escape, added))})" if added else r"(?!)")
        self._around: dict[str, Frame] = {}

    def __call__(self, conversation: Conversation) -> Rendered:
        """The conversation's text and where its replies are."""
        if not self.tokenizer.chat_template:
            raise AHNError(
                "The data holds conversations, but the tokenizer has no chat template: use an instruction-tuned "
                "model's tokenizer, or plain text."
            )
        if OWN_OPTIONS & conversation.options.keys():
            raise BadRowError(f"chat_template_kwargs sets {min(OWN_OPTIONS & conversation.options.keys())}")
        text = self._template(conversation, conversation.messages)
        bounds = self._plain(conversation, text) or self._one_by_one(conversation, text)
        spans, before = [], 0
        for number, (first, last) in bounds.items():
            span = self._widened(conversation, text, first, last, before)
            before = span[1]
            if conversation.learned[number]:
                spans.append(span)
        return Rendered(text, spans, tuple(self._unused(conversation, text)))

    def _template(self, conversation: Conversation, messages: list[Message], prompt: bool = False) -> str:
        shown = as_shown(self.tokenizer, messages)
        try:
            return self.tokenizer.apply_chat_template(
                shown, tools=conversation.tools, tokenize=False, add_generation_prompt=prompt, **conversation.options
            )
        except Exception as error:  # jinja2's errors, and what templates raise by themselves
            raise BadRowError(f"the chat template refuses it: {error}") from None

    def _plain(self, conversation: Conversation, text: str) -> dict[int, Span] | None:
        """All replies by one more rendering, where a template shows them as they are or trimmed; else None."""
        replies = _replies(conversation)
        messages = conversation.messages
        if any(messages[n].get("tool_calls") or _thoughts(messages[n]) for n in replies):  # more than text
            return None
        mark = _mark(text)
        stand_ins = {number: f"{mark}{number}{mark}" for number in replies}
        outline = [_reply(stand_ins[n]) if n in stand_ins else m for n, m in enumerate(conversation.messages)]
        try:
            around = re.split("|".join(map(re.escape, stand_ins.values())), self._template(conversation, outline))
        except BadRowError:
            return None
        if len(around) != len(replies) + 1:
            return None
        contents = [conversation.messages[n]["content"] for n in replies]
        for shown in (contents, [content.strip() for content in contents]):
            whole, bounds = around[0], {}
            for number, reply, after in zip(replies, shown, around[1:], strict=True):
                bounds[number] = (len(whole), len(whole) + len(reply))
                whole += reply + after
            if whole == text:
                return bounds
        return None

    def _one_by_one(self, conversation: Conversation, text: str) -> dict[int, Span]:
        mark = _mark(text)
        found = {}
        for number in _replies(conversation):
            found[number] = self._replaced(conversation, text, number, f"{mark}0{mark}")
        return found

    def _replaced(self, conversation: Conversation, text: str, number: int, stand_in: str) -> Span:
        """Where one reply lies: between what the text with a stand-in for it begins with and what it ends with."""
        messages = conversation.messages
        reply = messages[number]
        try:
            other = self._template(conversation, [*messages[:number], _reply(stand_in), *messages[number + 1 :]])
        except BadRowError:  # such as an answer of a function without its call
            return self._by_prompt(conversation, text, number)
        if stand_in not in other:
            raise BadRowError("the chat template rewrites what a reply says")
        first = common_prefix(text, other)
        last = len(text) - common_prefix(text[first:][::-1], other[::-1])
        content, shown = _squeezed(reply["content"]), _squeezed(text[first:last])
        # Thoughts before a reply may be dropped or set apart, calls may be written in any way.
        fits = shown.endswith(content) if _thoughts(reply) else content.endswith(shown)
        if not fits and not reply.get("tool_calls"):
            raise BadRowError("the chat template rewrites what a reply says")
        return first, last

    def _by_prompt(self, conversation: Conversation, text: str, number: int) -> Span:
        """Where one reply lies: after the prompt that the model would have got."""
        messages = conversation.messages
        prompt = self._template(conversation, messages[:number], prompt=True)
        closing = self._frame(conversation).closing
        last = text.find(closing, len(prompt)) if closing else -1
        if not text.startswith(prompt) or last < 0:
            raise BadRowError("the chat template does not show where a reply begins and ends")
        return len(prompt), last

    def _widened(self, conversation: Conversation, text: str, first: int, last: int, before: int) -> Span:
        """From the end of the generation prompt to the end of the turn's last token."""
        opening, header, closing = self._frame(conversation)
        start = text.rfind(opening, before, first) if opening else -1
        # A later header means that the opening found is a user's words.
        if start >= 0 and not (header and header in text[start + len(header) : first]):
            first = start + len(opening)
        elif not opening:  # such as Mistral's, whose prompt adds nothing: the space before a reply is the reply's
            first = before + len(text[before:first].rstrip(" "))
        if closing and text.startswith(closing, last):
            return first, last + len(closing)
        token = self._added.match(text, last)  # gpt-oss ends the last turn by another token than the others
        return first, token.end() if token else last

    def _frame(self, conversation: Conversation) -> Frame:
        """What the template puts around replies; asked once."""
        key = json.dumps(conversation.options, sort_keys=True, default=str)
        if key not in self._around:
            asked = [{"role": "user", "content": "x"}]
            plain = dataclasses.replace(conversation, tools=None)
            mark = OPENINGS[0]
            try:
                without, prompt = self._template(plain, asked), self._template(plain, asked, prompt=True)
                answered, _, after = self._template(plain, [*asked, _reply(mark)]).partition(mark)
            except BadRowError:
                without = prompt = answered = after = ""
            opening = prompt[len(without) :] if prompt.startswith(without) else ""
            token = self._added.search(after)
            header = opening[: common_prefix(opening, answered[len(without) :])]
            self._around[key] = Frame(opening, header, after[: token.end()] if token else after.rstrip())
        return self._around[key]

    def _unused(self, conversation: Conversation, text: str) -> list[str]:
        found = []
        if conversation.tools:
            without = dataclasses.replace(conversation, tools=None)
            with contextlib.suppress(BadRowError):
                if self._template(without, conversation.messages) == text:
                    found.append("tools, which the chat template does not show")
        squeezed = None
        for reply in (conversation.messages[number] for number in _replies(conversation)):
            written, end, _ = reply["content"].partition("</think>")
            thoughts = _thoughts(reply) or (written if end else "")
            if thoughts:
                squeezed = _squeezed(text) if squeezed is None else squeezed
                if _squeezed(thoughts) not in squeezed:
                    found.append("thoughts, which the chat template does not show")
                    break
        return found


def _reply(content: str) -> Message:
    return {"role": "assistant", "content": content}


def _replies(conversation: Conversation) -> list[int]:
    return [n for n, message in enumerate(conversation.messages) if message["role"] == "assistant"]


def _thoughts(message: Message) -> str:
    return str(message.get(THOUGHTS[0], ""))


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _mark(text: str) -> str:
    mark = next((mark for mark in OPENINGS if mark not in text), None)
    if mark is None:
        raise BadRowError(f"holds all of the characters U+E000 to U+{ord(OPENINGS[-1]):X}")
    return mark


def common_prefix(one: str, other: str) -> int:
    """How many characters two texts have in common at their beginnings."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # they have `low` in common; comparing slices is quicker than characters
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
