"""One request on its way through the engine."""

import dataclasses
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from ahn.cache.conversation import AHNCache
from ahn.errors import AHNError, is_out_of_memory
from ahn.serve.engine.index import KeptState
from ahn.serve.engine.prefixes import Prefixes
from ahn.serve.engine.reply import Reply
from ahn.serve.engine.sampling import Chooser, Chosen
from ahn.serve.engine.text import CONTEXT, TextStream
from ahn.serve.request import Delta, FinishReason, GenerationRequest, TokenLogprobs


@dataclasses.dataclass(eq=False)
class PromptReading:
    """Tokens that are read, in chunks, into a cache of one row.

    Attributes:
        tokens: what is read, and all that is before it.
        target: up to where it is read.
        read: how far it is; the cache has read so many.
        cuts: where a copy is kept on the way.
        lent: the cache is a kept state, which does not change: who reads on takes a copy.
    """

    owner: str
    tokens: Prefixes
    target: int
    cache: AHNCache | None = None
    read: int = 0
    cuts: set[int] = dataclasses.field(default_factory=set)
    lent: bool = False

    def next_stop(self, chunk: int) -> int:
        """Up to where the next chunk goes: to a multiple of its size, as kernels know the shapes that come again."""
        ahead = [cut for cut in self.cuts if cut > self.read]
        return min([(self.read // chunk + 1) * chunk, self.target, *ahead])


class RequestJob(PromptReading):
    """A request from its arrival to its last delta.

    Args:
        prompt: (L,) ids of the request's prompt.

    Attributes:
        new: ids of the reply; all but the last of prompt and reply are read, once the prompt is.
        cached: tokens of the prompt that a kept state had read.
        waits_for: another that is reading what this one begins with, and up to where.
        known: the state that it goes on from, until it is lent or on its way.
        loading: on its way from elsewhere, it or a copy; and whether it is lent.
        faults: how often it had to begin again.
        kept: digests of what was kept of it so far.
    """

    def __init__(
        self,
        request: GenerationRequest,
        prompt: NDArray[np.integer[Any]],
        reply: Reply,
        tokenizer: PreTrainedTokenizerBase,
        ends: Sequence[int],
        device: torch.device,
    ) -> None:
        super().__init__(request.owner, Prefixes(prompt), len(prompt) - 1)
        self.request, self.reply, self.ends = request, reply, frozenset(ends)
        self.prompt = self.tokens.ids
        self.new: list[int] = []
        self.chooser = Chooser(request.options, self.prompt, self.new, device)
        self.text = TextStream(tokenizer, self.prompt[-CONTEXT:].tolist(), request.options.stop)
        self.cached = 0
        self.waits_for: tuple[RequestJob, int] | None = None
        self.known: KeptState | None = None
        self.loading: Future[tuple[AHNCache, bool]] | None = None
        self.faults = 0
        self.kept: list[str] = []
        self.arrived = time.monotonic()
        self.finish: FinishReason | None = None
        self.prompt_logprobs: list[TokenLogprobs] = []

    @property
    def ids(self) -> NDArray[np.uint32]:
        """(L,) of prompt and reply."""
        return np.concatenate([self.prompt, np.array(self.new, self.prompt.dtype)])

    @property
    def next_token(self) -> int:
        place = self.read - len(self.prompt)
        return int(self.prompt[place]) if place < 0 else self.new[place]

    @property
    def on_last(self) -> bool:
        """Whether only the last token of prompt and reply is not read."""
        return self.read + 1 == len(self.prompt) + len(self.new)

    @property
    def fresh(self) -> bool:
        """Whether the prompt has to be read anew, so that its logits come by."""
        return self.request.options.prompt_logprobs is not None and not self.new

    @property
    def arrived_whole(self) -> bool:
        """Whether the state that it goes on from is there, if there is one."""
        return self.known is None and self.loading is None

    @property
    def reply_ids(self) -> list[int]:
        """What was written, without an end token that ended it."""
        ended = self.finish == "stop" and not self.text.stopped and self.new and self.new[-1] in self.ends
        return self.new[:-1] if ended else self.new

    def begin_again(self) -> None:
        """Read prompt and reply once more, after a fault that was not this request's own."""
        self.faults += 1
        self.tokens = Prefixes(self.ids)
        self.target, self.read, self.cache = len(self.tokens) - 1, 0, None
        self.waits_for = self.known = self.loading = None
        self.cuts, self.lent, self.prompt_logprobs = set(), False, []

    def progress(self) -> Delta:
        return Delta(read=min(self.read, len(self.prompt)), cached=self.cached)

    def take(self, token: int) -> None:
        """The next token is written; `finish` is set if that is enough to see that it was the last."""
        options = self.request.options
        self.new.append(token)
        if token in self.ends and not options.ignore_eos:
            self.finish = "stop"
        elif len(self.new) >= options.max_tokens:
            self.finish = "length"

    def delta(self, chosen: Chosen) -> Delta:
        """What the last token that was taken brings; `finish` is set if it ends a stop text."""
        ended = self.finish == "stop"  # with an end token, which is no text
        text = "" if ended else self.text.add(chosen.token)
        if self.text.stopped:
            self.finish = "stop"
        if self.finish:
            text += self.text.end()
        logprobs = () if chosen.logprobs is None else (chosen.logprobs,)
        return self._delta(text, (chosen.token,), logprobs)

    def last(self, finish: FinishReason, error: str | None = None) -> Delta:
        self.finish = finish
        return dataclasses.replace(self._delta("", (), ()), error=error)

    def _delta(self, text: str, tokens: tuple[int, ...], logprobs: tuple[TokenLogprobs, ...]) -> Delta:
        prompt, self.prompt_logprobs = tuple(self.prompt_logprobs), []
        read = min(self.read, len(self.prompt)) if not tokens else len(self.prompt)
        return Delta(text, tokens, logprobs, prompt, read, self.cached, self.finish)


def said(error: Exception) -> str:
    if isinstance(error, AHNError):
        return str(error)
    if is_out_of_memory(error):
        return "The server has not enough memory for this request."
    return f"The model failed on this request ({type(error).__name__})."
