"""Messages and texts as token ids, and ids as texts."""

import functools
import hashlib
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from ahn.cache.conversation import Message
from ahn.errors import AHNError
from ahn.measure.parts import render
from ahn.serve.engine.prefixes import Prefixes
from ahn.serve.engine.text import CONTEXT
from ahn.serve.request import TokenIds

APART = "\n\n"
"""Between messages that follow each other with no reply between them, for a model without a chat template."""
LONG = 4096
"""Characters from which on a piece's token ids are remembered."""
BETWEEN_WORDS = re.compile(r"(?<=[^\W\d_])(?=[ \n][^\W\d_])")
"""Where tokenizers that look at words look no further: behind a letter, before a space or new line and a letter."""
REMEMBERED = 1 << 23
"""Token ids that are remembered over all pieces (32 MiB)."""


class ChatText:
    """What a conversation looks like to the model.

    With a chat template the messages are what the template makes of them. Without one the text simply goes on, as in
    `ahn chat`: a reply follows the message, the next message begins a new line, and messages with no reply between
    them are set apart by an empty line.

    Every turn sends the whole conversation again, so the token ids of long pieces are remembered. A piece means the
    same wherever it stands: special tokens part a text before it is tokenised, and with most tokenizers so do words.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.template = bool(getattr(tokenizer, "chat_template", None))
        self._known: OrderedDict[bytes, NDArray[np.int32]] = OrderedDict()
        self._size, self._lock = 0, threading.Lock()
        self._special = self._separators()

    def _separators(self) -> re.Pattern[str] | None:
        """What parts a text for sure; None if this tokenizer looks across its special tokens."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).values()
        marks = [str(t) for t in added if t.special and not (t.lstrip or t.rstrip or t.single_word or t.normalized)]
        if not marks:
            return None
        pattern = re.compile("(" + "|".join(re.escape(mark) for mark in sorted(marks, key=len, reverse=True)) + ")")
        sample = f"A text, {marks[0]} and another\n{marks[-1]}\n\n  of 3 pieces{marks[0]}.{marks[-1]}"
        apart = np.concatenate([self._tokenise(piece) for piece in pattern.split(sample)])
        return pattern if np.array_equal(apart, self._tokenise(sample)) else None

    @functools.cached_property
    def _by_words(self) -> bool:
        """Whether this tokenizer never looks across `BETWEEN_WORDS`; tried with what is known to matter to some."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None or backend.pre_tokenizer is None:
            return False
        added = self.tokenizer.added_tokens_decoder.values()
        if any(BETWEEN_WORDS.search(f"a{t}a") or (t.rstrip and str(t)[-1:].isalpha()) for t in added):
            return False

        def words(text: str) -> list[str]:
            plain = text if backend.normalizer is None else backend.normalizer.normalize_str(text)
            return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(plain)]

        letters = "aTé中"
        left = [before + a for before in ("", "I'", "1", ". ", "\n\n", "_", "-a") for a in letters]
        right = [
            space + a + after for space in " \n" for a in letters for after in ("", "'s", "1", ". ", "\n", "\u0301")
        ]
        return all(words(a + b) == words(a) + words(b) for a in left for b in right)

    @functools.cached_property
    def _first(self) -> NDArray[np.int32] | None:
        """What this tokenizer puts before a text of its own accord; None if it does more than that."""
        bare, whole = self._tokenise("a"), self._tokenise("a", start=True)
        return whole[: len(whole) - len(bare)] if np.array_equal(whole[len(whole) - len(bare) :], bare) else None

    def ids(self, text: str, start: bool = False) -> NDArray[np.int32]:
        """Token ids (L,) of a text; at the `start` of one with the tokenizer's own first token, if it has one."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise AHNError(f"The text is no valid Unicode (character {error.start + 1:,} of it).") from error
        if len(text) < LONG or (start and self._first is None):
            return self._tokenise(text, start)
        parts = [text] if self._special is None else self._special.split(text)
        ids = [self._piece(piece) for part in parts for piece in self._pieces(part)]
        return np.concatenate([self._first, *ids] if start and self._first is not None else ids)

    def _pieces(self, text: str) -> Iterator[str]:
        """Pieces of at least `LONG` characters but for the last, the same ones whatever follows later."""
        place = 0
        while self._by_words and (cut := BETWEEN_WORDS.search(text, place + LONG)):
            yield text[place : cut.start()]
            place = cut.start()
        yield text[place:]

    def _tokenise(self, text: str, start: bool = False) -> NDArray[np.int32]:
        return np.array(self.tokenizer(text, add_special_tokens=start, verbose=False)["input_ids"], np.int32)

    def _piece(self, text: str) -> NDArray[np.int32]:
        if len(text) < LONG:
            return self._tokenise(text)
        key = hashlib.blake2b(text.encode(), digest_size=16).digest()
        with self._lock:
            if (found := self._known.get(key)) is not None:
                self._known.move_to_end(key)
                return found
        ids = self._tokenise(text)
        with self._lock:
            if key not in self._known:
                self._known[key] = ids
                self._size += len(ids)
            while self._size > REMEMBERED:
                self._size -= len(self._known.popitem(last=False)[1])
        return ids

    def prompt(self, messages: Sequence[Message]) -> NDArray[np.int32]:
        """Token ids (L,) of a conversation, up to where the next reply begins."""
        return self.ids(self.rendered(messages, ask=True), start=not self.template)

    def rendered(self, messages: Sequence[Message], ask: bool) -> str:
        """A conversation as text, up to where the next reply begins if `ask`, else up to the end of its last turn."""
        if self.template:
            return render(self.tokenizer, list(messages), ask)
        text = ""
        for before, message in zip((None, *messages), messages, strict=False):
            if before is not None and message["role"] != "assistant":
                text += "\n" if before["role"] == "assistant" else APART
            text += message["content"]
        return text if ask else text + "\n"

    def known_as(
        self, messages: Sequence[Message], prompt: TokenIds, stop: Sequence[str]
    ) -> Callable[[Sequence[int]], TokenIds]:
        """For a reply's token ids: those with which the next turn's prompt will begin, up to the end of the reply."""

        def known(reply: Sequence[int]) -> TokenIds:
            said = self.reply(prompt, reply, stop)
            closed = self.rendered([*messages, {"role": "assistant", "content": said}], ask=False)
            place = closed.rfind(said.strip()) if said.strip() else -1
            if place < 0:
                return prompt
            start = not self.template
            upto, whole = (self.ids(text, start) for text in (closed[: place + len(said.strip())], closed))
            return whole[: Prefixes(upto).shared(Prefixes(whole))]

        return known

    def reply(self, prompt: TokenIds, reply: Sequence[int], stop: Sequence[str] = ()) -> str:
        """A reply's text, up to a stop text."""
        before = [int(token) for token in prompt[-CONTEXT:]]
        text = self.decode([*before, *reply])[len(self.decode(before)) :]
        return text[: min([place for mark in stop if (place := text.find(mark)) >= 0], default=len(text))]

    def decode(self, ids: TokenIds, special: bool = False) -> str:
        """The text of token ids; `special` shows special tokens too."""
        numbers = np.asarray(ids).tolist()
        text: str = self.tokenizer.decode(numbers, skip_special_tokens=not special, clean_up_tokenization_spaces=False)
        return text
