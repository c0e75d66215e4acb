"""What the engine is asked for, and what it gives: the form that the HTTP side and the engine share."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

TokenIds = Sequence[int] | NDArray[np.integer[Any]]
"""(L,) of a long text an array: a list of 131 072 takes milliseconds each time it is made, copied or compared."""
FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How the next token of one conversation is chosen.

    Attributes:
        max_tokens: tokens to write at most; 0 reads the prompt and writes nothing.
        temperature: 0 takes the most probable token.
        top_k: 0 keeps all tokens.
        seed: the same one gives the same text again; None draws one.
        stop: texts before which the reply ends; they are not part of it.
        logit_bias: added to the scores of tokens, by id.
        logprobs: number of most probable tokens to report per written token; None reports nothing.
        prompt_logprobs: the same for the prompt's tokens.
        ignore_eos: go on to `max_tokens` whatever is written.
        processors: of transformers' kind, (ids (1, n), scores (1, V)) -> scores; a grammar, for example.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    ignore_eos: bool = False
    processors: tuple[Callable[[Any, Any], Any], ...] = ()


@dataclasses.dataclass(frozen=True)
class GenerationRequest:
    """One reply that is wanted.

    Attributes:
        prompt: token ids of the whole conversation so far. What of it was read before is found again by these ids, and
            only the rest is read.
        owner: whose conversation it is; nobody else's is found. The digest of a key, or "".
        name: under which the conversation is kept after the reply, besides its token ids; None for no name.
        keep: whether the conversation is kept at all.
        known_as: gives, for the reply's token ids, the token ids with which a later prompt that goes on from this reply
            will begin, up to the reply's end. A chat template may tokenise a reply in another way than it was written.
            None: the prompt and the reply as they are.
    """

    prompt: TokenIds
    options: SamplingOptions
    owner: str = ""
    name: str | None = None
    keep: bool = True
    known_as: Callable[[Sequence[int]], TokenIds] | None = None


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """How probable a token was.

    Attributes:
        token: its id.
        logprob: natural logarithm of its probability before temperature and cuts; None for a prompt's first token.
        top: the most probable tokens at that place with theirs, best first.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Delta:
    """What became known since the last one.

    Attributes:
        text: what can be shown: whole characters, and nothing that may still become a stop text.
        tokens: ids written.
        logprobs: of `tokens`, if they were asked for.
        prompt_logprobs: of the prompt, in the first delta, if they were asked for.
        read: tokens of the prompt read so far, those found again included: while the prompt is read, deltas with no
            tokens say how far it is.
        cached: how many of the prompt's tokens had been read before this request.
        finish: set in the last delta.
        error: a sentence for the client where `finish` is "error".
    """

    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    read: int = 0
    cached: int = 0
    finish: FinishReason | None = None
    error: str | None = None


class EngineBusy(Exception):  # noqa: N818  (it is no fault)
    """More is waiting than the engine takes.

    Attributes:
        retry_after: seconds after which there may be room again.
    """

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@dataclasses.dataclass(frozen=True)
class ConversationInfo:
    """One kept conversation.

    Attributes:
        name: under which it is kept, or None.
        tokens: read and written so far.
        parts: bytes of its state by part, as `AHNCache.bytes_by_part`.
        where: the state is now.
        used: when it was last used, in seconds since 1970.
    """

    name: str | None
    tokens: int
    parts: Mapping[str, int]
    where: Literal["device", "memory", "disk"]
    used: float


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """What the engine does now, and what it did since it was started (`tokens_…`, `evicted`)."""

    waiting: int = 0
    running: int = 0
    in_memory: int = 0
    on_disk: int = 0
    bytes_in_memory: int = 0
    bytes_on_disk: int = 0
    tokens_read: int = 0
    tokens_cached: int = 0
    tokens_written: int = 0
    evicted: int = 0
