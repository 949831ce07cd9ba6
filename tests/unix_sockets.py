"""Fixtures for tests over plain AF_UNIX sockets of both types that carry descriptors."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest
from c_programs import TIMEOUT

from fdshare.testing import room_for

if TYPE_CHECKING:
    from collections.abc import Iterator

Pair = tuple[socket.socket, socket.socket]


def type_of(kind: str) -> int:
    """Return the socket module's constant for "stream" or "seqpacket"."""
    return {"stream": socket.SOCK_STREAM, "seqpacket": socket.SOCK_SEQPACKET}[kind]


@pytest.fixture(params=["stream", "seqpacket"], name="kind")
def socket_kind(request: pytest.FixtureRequest) -> str:
    """A socket type, as the C programs name it."""
    name = str(request.param)
    try:
        with socket.socket(socket.AF_UNIX, type_of(name)):
            pass
    except OSError as error:
        pytest.skip(f"no AF_UNIX {name} sockets here: {error}")
    return name


@pytest.fixture(name="pair")
def connected_pair(kind: str) -> Iterator[Pair]:
    """Two connected sockets; the first one gives up after ``TIMEOUT`` seconds instead of blocking for ever."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, type_of(kind))
    ours.settimeout(TIMEOUT)
    with ours, theirs, room_for(1000):  # a message of 253 is held twice, before it is received and after
        yield ours, theirs
