"""`ahn serve`: a server with OpenAI's API."""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ahn.cli import common
from ahn.errors import AHNError
from ahn.files import expanded

if TYPE_CHECKING:
    import socket

    from ahn.serve.api.messages import MessageStore
    from ahn.serve.api.service import Service
    from ahn.serve.api.settings import ServerSettings

KEYS = "AHN_API_KEY"
"""Environment variable with keys, parted by spaces: on a command line every user of the machine could read them."""
MIB = 1 << 20

HostOption = Annotated[str, typer.Option("--host", help="Where to listen; beyond this machine only with a key.")]
PortOption = Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 takes a free one.")]
KeyOption = Annotated[
    list[str] | None,
    typer.Option("--api-key", help=f"Key that clients must send; may be given several times (or {KEYS})."),
]
DirectoryOption = Annotated[
    Path | None, typer.Option("--state-dir", help="Where conversations are kept that are not in use.")
]
AgeOption = Annotated[
    float | None, typer.Option("--max-age", help="Hours after which an unused conversation goes (default: never).")
]
QueueOption = Annotated[
    int, typer.Option("--queue", min=1, help="Requests that may wait beyond --conversations; more get error 429.")
]


def command(
    model: common.ModelOption = None,
    adapter: common.AdapterOption = None,
    window: common.WindowOption = None,
    sinks: common.SinksOption = None,
    quantized: common.QuantizedOption = None,
    device: common.DeviceOption = None,
    dtype: common.DtypeOption = None,
    host: HostOption = "127.0.0.1",
    port: PortOption = 8000,
    api_key: KeyOption = None,
    conversations: Annotated[
        int, typer.Option("--conversations", min=1, help="Conversations that are read or answered at once.")
    ] = 8,
    state_dir: DirectoryOption = None,
    state_mib: Annotated[
        int, typer.Option("--state-mib", min=1, help="MiB of memory for conversations that are not in use.")
    ] = 2048,
    device_mib: Annotated[
        int, typer.Option("--device-mib", min=0, help="MiB of these that may stay on the GPU, to go on at once.")
    ] = 0,
    disk_mib: Annotated[
        int | None, typer.Option("--disk-mib", min=1, help="MiB of conversations in --state-dir (default: no limit).")
    ] = None,
    max_age: AgeOption = None,
    replicas: Annotated[int, typer.Option("--replicas", min=1, help="Models that share the work (Ray Serve).")] = 1,
    queue: QueueOption = 256,
    max_prompt: Annotated[int, typer.Option("--max-prompt", min=1, help="Tokens of a conversation at most.")] = 1 << 20,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens of a reply at most.")] = 16384,
    max_body_mib: Annotated[int, typer.Option("--max-body-mib", min=1, help="MiB of a request at most.")] = 32,
    timeout: Annotated[float, typer.Option("--timeout", min=1, help="Seconds for one request at most.")] = 3600.0,
) -> None:
    """Serve a model with OpenAI's API, and a page to talk with it.

    Many long conversations are held at once: each is a fixed number of
    bytes, goes on where it was, can be forked, saved and moved. Without
    arguments the small model that comes with ahn is served, on this machine
    alone. Ctrl-C stops; what --state-dir holds is there again next time.

    \b
    Examples:
      ahn serve
      ahn serve --model BASE --adapter AHN --state-dir ~/conversations
      AHN_API_KEY=... ahn serve --model MERGED --host 0.0.0.0
    """
    from ahn.serve.api.building import bound, check_installed, is_loopback

    check_installed(replicas)
    from ahn.serve.api.settings import ServerSettings

    keys = _keys(api_key)
    if not is_loopback(host) and not keys:
        raise AHNError(f"Anyone who reaches {host} could use the model: set {KEYS}, or leave --host out.")
    if max_age is not None and not max_age > 0:
        raise AHNError(f"--max-age must be more than 0 hours, got {max_age}.")
    common.refuse_useless("without --state-dir", disk_mib=None if state_dir else disk_mib)
    settings = ServerSettings(
        model=served_name(model, adapter),
        keys=keys,
        local=not keys,
        body=max_body_mib * MIB,
        prompt=max_prompt,
        new_tokens=max_new_tokens,
        queue=queue,
        choices=min(ServerSettings.choices, conversations + queue),  # more would be too many whenever they came
        seconds=timeout,
    )
    directory = _directory(state_dir)
    place = bound(host, port)
    seconds = None if max_age is None else max_age * 3600

    from ahn.serve.api.app import make_app, serve_until_stopped
    from ahn.serve.api.messages import MessageStore

    bounds = {
        "conversations": conversations,
        "state_dir": directory,
        "state_bytes": state_mib * MIB,
        "device_bytes": device_mib * MIB,
        "disk_bytes": None if disk_mib is None else disk_mib * MIB,
        "max_age": seconds,
        "queue": queue,
    }
    source: dict[str, Any] = {"model": model, "adapter": adapter, "device": device, "dtype": dtype}
    source |= {"window": window, "sinks": sinks, "quantized": quantized}
    start = functools.partial(start_service, source, bounds, settings)
    if replicas == 1:
        app = make_app(start(MessageStore(directory, age=seconds)))
    else:
        from ahn.checkpoint.loading import pick_device
        from ahn.cli.session import named_or_shipped
        from ahn.serve.replicas.cluster import replicated

        runs_on = named_or_shipped(model, adapter, device)[2] or pick_device(None).type
        app = replicated(start, settings, replicas, runs_on.startswith("cuda"), directory, seconds)
    _tell(settings, place)
    try:
        serve_until_stopped(app, place)
    except KeyboardInterrupt:  # uvicorn has stopped already and says again what it was told
        common.err.print("Stopped.")


def start_service(
    source: dict[str, Any], bounds: dict[str, Any], settings: ServerSettings, store: MessageStore
) -> Service:
    """A service whose engine works.

    Args:
        source: arguments of `open_session`.
        bounds: options of `Engine`.
    """
    from ahn.cli.session import open_session
    from ahn.serve.api.building import build
    from ahn.serve.engine.engine import Engine

    session = open_session(**source)
    engine = Engine(session.model, session.tokenizer, **bounds)
    service = build(session.model, session.tokenizer, engine, settings, store)
    engine.start()
    return service


def served_name(model: str | None, adapter: str | None) -> str:
    """The name by which clients ask for a model: the last part of what was named."""
    return Path(model or adapter or "tiny").name or "model"


def _keys(given: list[str] | None) -> tuple[str, ...]:
    """Raises AHNError for a key that no client could send."""
    keys = tuple(given or os.environ.get(KEYS, "").split())
    for key in keys:
        if not (key.isascii() and key.isprintable()) or not key or " " in key:
            raise AHNError("A key is made of letters, digits and signs of ASCII, without spaces.")
    return keys


def _directory(path: Path | None) -> Path | None:
    if path is None:
        return None
    directory = expanded(path)
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):  # it may be read-only
            pass
    except OSError as error:
        raise AHNError(f"Conversations cannot be kept in {directory}: {error.strerror}.") from error
    if os.name == "posix" and directory.stat().st_mode & 0o077:  # it was there before; several users may share it
        common.err.print(f"Other users of this machine may read what is said in {directory}: chmod 700 stops that.")
    return directory


def _tell(settings: ServerSettings, place: socket.socket) -> None:
    host, port = place.getsockname()[:2]
    named = f"[{host}]" if ":" in host else host
    common.err.print(f"Serving {settings.model} at http://{named}:{port} (API under /v1, a page at /).", markup=False)
    if not settings.keys:
        common.err.print(f"No key is asked for; {KEYS} sets one.")
