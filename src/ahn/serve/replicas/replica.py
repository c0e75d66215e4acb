"""One engine of several: the whole server in a process of Ray's, which only the front may ask."""

import asyncio
import os
import socket
import threading
from collections.abc import Callable
from typing import Any, cast

import ray
import uvicorn
from ray.exceptions import RayActorError, RayTaskError

from ahn.serve.api.app import CLOSE, PROTOCOL, make_app
from ahn.serve.api.building import bound
from ahn.serve.api.messages import MessageStore, StorageError
from ahn.serve.api.service import Service
from ahn.serve.replicas.wire import FrontAlone


class RemoteMessages:
    """The messages of all replicas: one process keeps them, as SQLite's locks do not hold on network file systems."""

    def __init__(self, keeper: Any) -> None:
        self._keeper = keeper

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._keeper, name)

        def asked(*given: Any, **named: Any) -> Any:
            try:
                return ray.get(method.remote(*given, **named))
            except RayTaskError as error:
                raise error.cause from None  # what the store raised; Ray's own message is a traceback
            except RayActorError as error:
                raise StorageError("The process that keeps conversations is gone.") from error

        return asked


class Replica:
    """What Ray starts, and starts again where it died.

    Args:
        start: loads the model and starts its engine, around the messages that it is given.
        keeper: Ray's handle of the messages.
        secret: without which nobody is answered.
        local: whether all of the cluster is this machine.
    """

    def __init__(self, start: Callable[[MessageStore], Service], keeper: Any, secret: str, local: bool) -> None:
        self._service = start(cast(MessageStore, RemoteMessages(keeper)))
        place = bound("127.0.0.1" if local else ray.util.get_node_ip_address(), 0)
        self._address: tuple[str, int] = place.getsockname()[:2]
        app = FrontAlone(make_app(self._service), secret)
        # Without its lifespan: the front's ends everything.
        options: dict[str, Any] = {"lifespan": "off", "log_level": "warning", "server_header": False}
        self._server = uvicorn.Server(uvicorn.Config(app, **PROTOCOL, **options))
        threading.Thread(target=self._server.run, kwargs={"sockets": [place]}, daemon=True).start()

    def address(self) -> tuple[str, int]:
        return self._address

    def page(self) -> tuple[str, bytes | None]:
        """Which replica this is (host:process), and its metrics; None for them if its engine has stopped."""
        alive = self._service.engine.alive()
        return f"{socket.gethostname()}:{os.getpid()}", self._service.metrics.text() if alive else None

    async def close(self, seconds: float) -> None:
        await asyncio.to_thread(self._service.engine.close, seconds)

    def check_health(self) -> None:
        """Asked by Ray, which starts a replica anew that raises."""
        if not self._service.engine.alive():
            raise RuntimeError("The engine has stopped.")

    def __del__(self) -> None:
        if service := self.__dict__.get("_service"):  # loading may have failed
            service.engine.close(CLOSE)
