"""What clients may send: OpenAI's fields, as far as they mean something here. Any other is an error that names it."""

from __future__ import annotations

import contextlib
import re
from array import array
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, PlainValidator, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from ahn.serve.api.settings import NAME, RESPONSE

Finite = Field(allow_inf_nan=False)
Stop = Annotated[str, Field(min_length=1, max_length=1024)]
Name = Annotated[str, Field(pattern=f"^{NAME}$", max_length=128)]


class KnownFields(BaseModel):
    """An object of a request.

    What asks for nothing is as if it were not there: null, and empty lists of fields that are not known, which clients
    send along (`tools`, `include`) or got with a reply and send back (`annotations`).
    """

    model_config = {"extra": "forbid"}

    @model_validator(mode="before")
    @classmethod
    def _that_ask_for_something(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        known = cls.model_fields
        return {
            name: given
            for name, given in value.items()
            if given is not None and (name in known or not isinstance(given, list) or given)
        }


class TextPart(KnownFields):
    """A piece of a message; pictures and sounds are not supported."""

    type: Literal["text", "input_text", "output_text"]
    text: str
    logprobs: list[Any] = []  # of a reply that is sent back


class ChatMessage(KnownFields):
    """One turn; `developer` is the same as `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: Annotated[str | None, Field(max_length=256)] = None

    def message(self) -> dict[str, str]:
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class JSONSchema(KnownFields):
    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class ResponseFormat(KnownFields):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None

    @property
    def schema_of_reply(self) -> dict[str, Any] | None:
        """None for any text."""
        if self.type == "json_object":
            return {"type": "object"}
        return None if self.json_schema is None else self.json_schema.schema_

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema: it is needed for type json_schema, and for no other")
        return self


class StreamOptions(KnownFields):
    include_usage: bool = False
    continuous_usage_stats: bool = False


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _by_token(value: Any) -> Any:
    for name in value if isinstance(value, dict) else ():
        if not re.fullmatch("[0-9]{1,9}", str(name)):
            raise PydanticCustomError("token", "{name} is no token id", {"name": ascii(name)[:50]})
    return value


class ReplyFields(KnownFields):
    """What all that ask for a reply share; ranges are OpenAI's.

    Attributes:
        SOURCE: the field with what is read.
        LIMITS: fields of how much to write; the first that is given counts.
        DEFAULT: tokens of a reply where none is.
    """

    SOURCE: ClassVar[str]
    LIMITS: ClassVar[tuple[str, ...]]
    DEFAULT: ClassVar[int] = 1024

    model: Annotated[str | None, Field(max_length=1024)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2), Finite] = None
    top_p: Annotated[float | None, Field(gt=0, le=1), Finite] = None
    seed: Annotated[int | None, Field(ge=-(1 << 63), lt=1 << 63)] = None
    stream: bool = False
    store: bool = True
    # Taken, and mean nothing here:
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] = {}
    service_tier: Literal["auto", "default"] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None

    @property
    def schema_of_reply(self) -> dict[str, Any] | None:
        """What JSON the reply must be; None for any text."""
        raise NotImplementedError


class SamplingFields(ReplyFields):
    """What chat and plain completions share."""

    max_tokens: Annotated[int | None, Field(ge=0)] = None
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31), AfterValidator(lambda k: max(k, 0))] | None = None
    min_p: Annotated[float | None, Field(ge=0, le=1), Finite] = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2), Finite] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2), Finite] = 0.0
    repetition_penalty: Annotated[float | None, Field(gt=0, le=10), Finite] = None
    n: Annotated[int, Field(ge=1)] = 1
    stop: Annotated[tuple[Stop, ...], BeforeValidator(_as_list), Field(max_length=32)] = ()
    logit_bias: Annotated[
        dict[int, Annotated[float, Field(ge=-100, le=100), Finite]], BeforeValidator(_by_token), Field(max_length=4096)
    ] = {}
    ignore_eos: bool = False
    response_format: ResponseFormat | None = None
    stream_options: StreamOptions | None = None

    @property
    def schema_of_reply(self) -> dict[str, Any] | None:
        return None if self.response_format is None else self.response_format.schema_of_reply

    @model_validator(mode="after")
    def _together(self) -> SamplingFields:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: they are for stream: true alone")
        return self


class ChatFields(SamplingFields):
    """`POST /v1/chat/completions`."""

    SOURCE, LIMITS = "messages", ("max_completion_tokens", "max_tokens")

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int | None, Field(ge=0)] = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    session_id: Name | None = None

    @model_validator(mode="after")
    def _one_of_each(self) -> ChatFields:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: they need logprobs: true")
        if self.session_id is not None:
            if self.n > 1:
                raise ValueError("n: it must be 1 in a session, which goes on from one reply")
            if self.session_id.startswith(RESPONSE):
                raise ValueError(f"session_id: it must not begin with {RESPONSE}")
        return self


def _prompts(value: Any) -> list[str | NDArray[np.int32]]:
    """The prompts of a request, which may name a single one; token ids are checked at once, as there may be many."""
    several = isinstance(value, list) and value and isinstance(value[0], str | list)
    return [one if isinstance(one, str) else _token_ids(one) for one in (value if several else [value])]


def _token_ids(value: Any) -> NDArray[np.int32]:
    if isinstance(value, np.ndarray):  # which `wire.parsed` has checked
        return value
    with contextlib.suppress(TypeError, OverflowError):
        numbers = isinstance(value, list) and bool not in set(
            map(type, value)
        )  # true is no token, though array takes it
        ids = np.frombuffer(array("i", value), np.int32) if numbers else None
        if ids is not None and (not len(ids) or ids.min() >= 0):
            return ids
    raise PydanticCustomError("prompt", "It must be a text, token ids from 0 to 2147483647, or a list of either")


_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": (1 << 31) - 1}}
_SEVERAL = {"type": "array", "minItems": 1, "items": {"anyOf": [{"type": "string"}, _IDS]}}
Prompts = Annotated[
    list[str | NDArray[np.int32]],
    PlainValidator(_prompts),
    WithJsonSchema({"anyOf": [{"type": "string"}, _IDS, _SEVERAL]}),
]


class CompletionFields(SamplingFields):
    """`POST /v1/completions`; a prompt is a text or token ids, and there may be several."""

    SOURCE, LIMITS, DEFAULT = "prompt", ("max_tokens",), 16  # as OpenAI has it

    prompt: Prompts
    echo: bool = False
    logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    best_of: Annotated[int | None, Field(ge=1)] = None
    session_id: Name | None = None

    @model_validator(mode="after")
    def _best_is_all(self) -> CompletionFields:
        if self.best_of not in (None, self.n):
            raise ValueError("best_of: only the value of n is supported")
        if self.session_id is not None:
            raise ValueError("session_id: it is for chat completions; a completion's prompt is found by its tokens")
        return self


class InputItem(ChatMessage):
    """A message of the Responses API."""

    type: Literal["message"] = "message"
    id: str | None = None
    status: str | None = None


class TextFormat(KnownFields):
    """What form the reply must have, as the Responses API says it."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None

    @model_validator(mode="after")
    def _has_schema(self) -> TextFormat:
        if (self.type == "json_schema") != (self.schema_ is not None):
            raise ValueError("schema: it is needed for type json_schema, and for no other")
        return self


class TextFields(KnownFields):
    format: TextFormat | None = None


class ResponsesFields(ReplyFields):
    """`POST /v1/responses`."""

    SOURCE, LIMITS = "input", ("max_output_tokens",)

    input: str | Annotated[list[InputItem], Field(min_length=1)]
    instructions: str | None = None
    previous_response_id: Annotated[str | None, Field(max_length=128)] = None
    max_output_tokens: Annotated[int | None, Field(ge=1)] = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    text: TextFields | None = None
    truncation: Literal["disabled"] = "disabled"
    background: Literal[False] = False

    @property
    def schema_of_reply(self) -> dict[str, Any] | None:
        form = None if self.text is None else self.text.format
        return None if form is None else {"type": "object"} if form.type == "json_object" else form.schema_


class TokenizeFields(KnownFields):
    """`POST /tokenize`: a text or messages."""

    model: Annotated[str | None, Field(max_length=1024)] = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _one(self) -> TokenizeFields:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt: give either this or messages")
        return self


class SessionFields(KnownFields):
    """`POST /close_session`."""

    session_id: Name
