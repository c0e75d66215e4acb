"""Ray: the cluster that there is, or one of this machine alone, and replicas in it."""

import logging
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.config import ProxyLocation, RequestRouterConfig

from ahn.errors import AHNError
from ahn.serve.api.messages import MessageStore
from ahn.serve.api.service import Service
from ahn.serve.api.settings import ServerSettings
from ahn.serve.replicas.front import make_front
from ahn.serve.replicas.replica import Replica

NAME = "ahn"
ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
AT_ONCE = 100_000
"""Requests of a replica, beyond any number that comes: its engine knows what it can take, and says 429."""
SHARED = 1 << 30
"""Bytes of memory in which processes of one machine hand each other requests and answers."""


def replicated(
    start: Callable[[MessageStore], Service],
    settings: ServerSettings,
    replicas: int,
    gpu: bool,
    directory: Path | None,
    max_age: float | None,
) -> FastAPI:
    """An app before replicas that are ready; they end with it.

    Args:
        start: as of `Replica`; it must be importable on every machine of the cluster.
        gpu: whether each replica has a GPU of its own.
        directory: of the messages, which a process of this machine keeps for all.
        max_age: seconds after whose last use a conversation goes.
    """
    MessageStore(directory).close()
    secret, quiet = secrets.token_hex(32), {"enable_access_log": False, "log_level": "WARNING"}
    try:
        local = connect()
        deployment = serve.deployment(
            Replica,
            name="Replica",
            num_replicas=replicas,
            max_ongoing_requests=AT_ONCE,
            ray_actor_options={"num_gpus": int(gpu)},
            request_router_config=RequestRouterConfig(
                request_router_class=ROUTER, request_router_kwargs={"num_fallback_replicas": 0}
            ),
        )
        serve.start(proxy_location=ProxyLocation.Disabled, logging_config=quiet)
        replica = deployment.bind(start, keep_messages(directory, max_age), secret, local)
        handle = serve.run(replica, name=NAME, route_prefix=None, logging_config=quiet)
    except Exception as error:  # of many kinds: the model cannot be loaded, a machine is too slow to answer Ray
        raise AHNError(f"The replicas could not be started: {' '.join(str(error).split())[:500]}") from error
    return make_front(handle, secret, settings, stop)


def stop() -> None:
    serve.delete(NAME)
    ray.shutdown()


def keep_messages(directory: Path | None, max_age: float | None) -> Any:
    """A process on this machine with a `MessageStore`, which Ray starts again when it dies; calls then wait for it."""
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    keeper = ray.remote(MessageStore).options(num_cpus=0, label_selector=here, max_restarts=-1, max_task_retries=-1)
    return keeper.remote(directory, age=max_age)


def connect() -> bool:
    """Whether the cluster was started here, of this machine alone."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would tell its makers
    quiet = {"logging_level": logging.ERROR, "log_to_driver": True}
    try:
        ray.init("auto", **quiet)
        return False
    except ConnectionError:
        ray.init("local", include_dashboard=False, object_store_memory=SHARED, **quiet)
        return True
