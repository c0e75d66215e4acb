"""From a model to a server that listens."""

from __future__ import annotations

import dataclasses
import importlib.util
import ipaddress
import math
import socket
from typing import TYPE_CHECKING

from ahn.errors import AHNError, install_command, reason
from ahn.serve.request import SamplingOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ahn.serve.api.messages import MessageStore
    from ahn.serve.api.service import Service
    from ahn.serve.api.settings import ServerSettings
    from ahn.serve.engine.engine import Engine

PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "llguidance")


def check_installed(replicas: int) -> None:
    """Raises AHNError if an extra is missing, with the command that installs it."""
    if any(importlib.util.find_spec(package) is None for package in PACKAGES):
        raise AHNError(f"ahn serve needs more packages: {install_command('serve')}")
    if replicas > 1 and importlib.util.find_spec("ray") is None:
        raise AHNError(f"--replicas needs Ray: {install_command('ray')}")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server at this host."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bound(host: str, port: int) -> socket.socket:
    """A socket at this place, which listens only once a server takes it; before a model is loaded for nothing.

    Raises:
        AHNError: the place is taken, if only by one who loads a model too, or is none of this machine.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        place = socket.socket(family, kind, protocol)
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of a server before are no hindrance
        place.bind(address)
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)  # nobody else binds it before it listens
    except (OSError, OverflowError) as error:
        raise _no_place(f"{host}, port {port}", error) from error
    return place


def listen(place: socket.socket) -> None:
    """Take connections.

    Raises:
        AHNError: another server began to listen there first; uvicorn would wait for ever.
    """
    try:
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # for the server after this one
        place.listen()
    except OSError as error:
        host, port = place.getsockname()[:2]
        raise _no_place(f"{host}, port {port}", error) from error


def _no_place(where: str, error: Exception) -> AHNError:
    return AHNError(f"Cannot serve at {where}: {reason(error)}.")


def build(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    engine: Engine,
    settings: ServerSettings,
    store: MessageStore,
) -> Service:
    """What serves a model: its engine with texts, messages, metrics and grammars around it."""
    from ahn.costs import cost
    from ahn.evaluation.reader import end_tokens
    from ahn.serve.api.grammar import Grammars
    from ahn.serve.api.metrics import ServerMetrics
    from ahn.serve.api.service import Service
    from ahn.serve.api.texts import ChatText

    if (steady := model._ahn.steady) is not None:  # texts are read in chunks, in which none can go beyond
        settings = dataclasses.replace(settings, prompt=min(settings.prompt, steady))
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    grammars = Grammars(tokenizer, vocabulary, end_tokens(model, tokenizer))

    def full_bytes(tokens: int) -> int:
        return cost(model.config, model.ahn_config, max(1, tokens), model.dtype).full.cache_bytes

    return Service(
        engine,
        ChatText(tokenizer),
        settings,
        store,
        ServerMetrics(engine.stats),
        grammars,
        sampling_defaults(model),
        full_bytes,
    )


def sampling_defaults(model: PreTrainedModel) -> SamplingOptions:
    """How a model's settings say that tokens are drawn and replies end; OpenAI's defaults where they do not say it.

    Raises:
        AHNError: a setting is none that tokens can be chosen by.
    """
    settings = model.generation_config
    names = ["repetition_penalty"]  # which holds however they are chosen
    if settings.do_sample:
        names += ["temperature", "top_p", "top_k", "min_p"]
    given = {name: value for name in names if (value := getattr(settings, name, None)) is not None}
    for name, value in given.items():
        positive = isinstance(value, int | float) and 0 <= value < math.inf
        if not positive or (name == "repetition_penalty" and value == 0) or (name == "min_p" and value > 1):
            raise _unusable(name, value)
    stop = settings.stop_strings or ()
    stop = (stop,) if isinstance(stop, str) else stop
    if not isinstance(stop, list | tuple) or not all(isinstance(text, str) and text for text in stop):
        raise _unusable("stop_strings", stop)
    return SamplingOptions(**given, stop=tuple(stop))


def _unusable(name: str, value: object) -> AHNError:
    return AHNError(f"The model's generation settings (generation_config.json) do not work here: {name} is {value!r}.")
