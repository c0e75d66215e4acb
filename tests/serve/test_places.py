"""Where a server listens."""

from __future__ import annotations

import socket

import pytest

pytest.importorskip("fastapi")

from ahn.errors import AHNError
from ahn.serve.api.building import bound, listen


def test_a_place_is_taken_before_anyone_listens() -> None:
    with bound("127.0.0.1", 0) as first, pytest.raises(AHNError, match="in use"):  # while the first loads its model
        bound(*first.getsockname()[:2])


def test_who_listens_too_late_is_told() -> None:
    with socket.socket() as other, socket.socket() as place:
        for each in (other, place):
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", 0))
        place.bind(other.getsockname())
        other.listen()
        with pytest.raises(AHNError, match="in use"):
            listen(place)


def test_a_server_follows_another_at_once() -> None:
    """Connections that the one before closed are still known to the system, and no hindrance."""
    with bound("127.0.0.1", 0) as first:
        listen(first)
        where = first.getsockname()
        with socket.create_connection(where):
            first.accept()[0].close()
    with bound(*where) as second:
        listen(second)
